"""What importing the package costs and brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lorank


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_brings_torch_and_safetensors_alone() -> None:
    code = """
import sys, torch, safetensors.torch
before = {name.partition(".")[0] for name in sys.modules}
import lorank
for name in lorank.__all__:
    getattr(lorank, name)
after = {name.partition(".")[0] for name in sys.modules}
outside = sorted(name for name in after - before if name not in sys.stdlib_module_names)
print(outside)
"""
    assert run(code).strip() == "['lorank']"


def test_a_name_is_imported_when_it_is_used() -> None:
    assert run("import sys, lorank; lorank.__version__; print('torch' in sys.modules)").strip() == "False"
    assert (
        run("import lorank; lorank.LoRA; print('LoRA' in dir(lorank), 'merge' in dir(lorank))").strip() == "True True"
    )
    with pytest.raises(AttributeError, match="module 'lorank' has no attribute 'adopt'"):
        _ = lorank.adopt  # type: ignore[attr-defined]


def test_every_public_name_has_a_home() -> None:
    homes = [name for names in lorank._HOMES.values() for name in names]
    assert sorted([*homes, "__version__"]) == sorted(lorank.__all__)
    tree = ast.parse(Path(lorank.__file__ or "").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))  # what type checkers see
    seen = {node.module: tuple(a.name for a in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert seen == lorank._HOMES


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
