"""What importing the package costs and brings along."""

import subprocess
import sys

import lorank


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_brings_torch_and_safetensors_alone() -> None:
    code = """
import sys, torch, safetensors.torch
before = {name.partition(".")[0] for name in sys.modules}
import lorank
after = {name.partition(".")[0] for name in sys.modules}
outside = sorted(name for name in after - before if name not in sys.stdlib_module_names)
print(outside)
"""
    assert run(code).strip() == "['lorank']"


def test_the_core_works_without_anything_else_installed() -> None:
    code = """
import sys, tempfile
for name in ("numpy", "transformers", "peft", "accelerate", "typer", "rich"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, lorank
model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4))
lorank.adapt(model, lorank.LoRA(rank=2), ["0", "1"])
for step in lorank.train(lorank.adapter_parameters(model).values(), lambda x: model(x).sum(), [torch.arange(5)] * 2):
    pass
with tempfile.TemporaryDirectory() as folder:
    lorank.save(model, folder)
    lorank.remove(model)
    lorank.load(model, folder)
lorank.merge(model)
print("done")
"""
    assert run(code).strip() == "done"


def test_public_names_are_documented() -> None:
    for name in lorank.__all__:
        assert (getattr(lorank, name).__doc__ or "").strip(), name
