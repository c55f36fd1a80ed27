"""Adapted models among the tools that people use around them."""

import copy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lorank
from lorank import LoRA

from .. import models


def test_a_pickled_model_opens_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = models.Plain(), models.ids()
    lorank.adapt(model, LoRA(rank=2), ["up", "embed"], train_also=["head"])
    models.disturb(model)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    code = f"""
        import torch
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(saved["model"](saved["x"]), saved["y"])
        import lorank
        lorank.merge(saved["model"])
        torch.testing.assert_close(saved["model"](saved["x"]), saved["y"], rtol=1e-5, atol=1e-5)
    """
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=root)


def test_save_pretrained_and_from_pretrained_go_round(tmp_path: Path) -> None:
    model, x = models.llama(), models.ids()
    base = model(x).logits
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    models.disturb(model)
    y = model(x).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, base)  # every base weight is found under its own name
    lorank.adapt(again, LoRA(rank=2), "all-linear")
    result = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(again(x).logits, y)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_an_ordinary_checkpoint(tied: bool, tmp_path: Path) -> None:
    model, x = models.llama(tie_word_embeddings=tied), models.ids()
    names = list(model.state_dict())
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    models.disturb(model)
    lorank.merge(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # pyright: ignore
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_checkpoint_saved_in_a_merged_block_is_the_merged_model(tmp_path: Path) -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(rank=2), "all-linear", train_also=["lm_head"])
    models.disturb(model)
    y = model(x).logits
    with lorank.merged(model):
        model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # pyright: ignore
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(again(x).logits, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x).logits, y)


def test_generation_works_and_follows_the_active_adapter() -> None:
    model = models.llama()
    prompt = models.ids(1, 4)

    def text() -> list[int]:
        return model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()

    base = text()
    lorank.adapt(model, LoRA(rank=4), "all-linear")
    models.disturb(model)
    adapted = text()
    assert adapted != base
    with lorank.merged(model):
        assert text() == adapted
    lorank.activate(model)
    assert text() == base


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_run_the_adapter(hooked_first: bool) -> None:
    model, x = models.llama(), models.ids()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    lorank.adapt(plain, LoRA(rank=2), ["q_proj"], train_also=["lm_head"])
    models.disturb(plain)

    def hook() -> None:
        for module in model.modules():
            if not list(module.children()):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if hooked_first:
        hook()
    torch.manual_seed(1)
    lorank.adapt(model, LoRA(rank=2), ["q_proj"], train_also=["lm_head"])
    models.disturb(model)
    if not hooked_first:
        hook()
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    lorank.remove(model)
    assert not any(name in module.__dict__ for module in model.modules() for name in ("_old_forward", "_hf_hook"))
    with lorank.disabled(plain):
        assert torch.equal(model(x).logits, plain(x).logits)


def test_a_dispatched_model_can_be_adapted_and_merged() -> None:
    model, x = models.llama(), models.ids()
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    base = model(x).logits
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    models.disturb(model)
    y = model(x).logits
    assert not torch.allclose(y, base, atol=1e-3)
    lorank.merge(model)
    torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)


def test_wrappers_are_seen_through(tmp_path: Path) -> None:
    model, x = models.llama(), models.ids()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    plan = lorank.adapt(wrapped, LoRA(rank=2), "q_proj")  # pyright: ignore[reportArgumentType]
    assert plan.layers[0] == "model.layers.0.self_attn.q_proj"
    models.disturb(model)
    y = model(x).logits
    lorank.save(wrapped, tmp_path)  # pyright: ignore[reportArgumentType]
    lorank.remove(wrapped)  # pyright: ignore[reportArgumentType]
    lorank.load(model, tmp_path)
    assert torch.equal(model(x).logits, y)


def test_switching_a_compiled_model_runs_the_right_adapter() -> None:
    model, x = models.Plain(), models.ids()
    lorank.adapt(model, LoRA(rank=2), ["up"], name="a")
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["up", "down"], train_also=["head"], name="b")
    models.disturb(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (("a",), ("b",), ("a", "b"), (), ("a",)):
        lorank.activate(model, *names)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_inductor_compiles_forward_and_backward() -> None:
    model, x = models.Plain(), models.ids()
    lorank.adapt(model, LoRA(rank=2), ["up", "embed"], train_also=["head"])
    models.disturb(model)
    compiled = torch.compile(model, fullgraph=True)
    model(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in lorank.adapter_parameters(model).items()}
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, parameter in lorank.adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)


def test_a_load_that_assigns_keeps_the_optimisers_parameters_when_the_checkpoint_is_the_base() -> None:
    model = models.Plain()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lorank.adapt(model, LoRA(rank=2), ["up"])
    before = {name: id(parameter) for name, parameter in lorank.adapter_parameters(model).items()}
    model.load_state_dict(base, strict=True, assign=True)
    assert {name: id(parameter) for name, parameter in lorank.adapter_parameters(model).items()} == before


def test_two_models_of_one_class_share_the_adapted_class() -> None:
    a, b = models.sequential(nn.Linear(4, 4)), models.sequential(nn.Linear(4, 4))
    lorank.adapt(a, LoRA(rank=1), "0")
    lorank.adapt(b, LoRA(rank=1), "0")
    assert type(a[0]) is type(b[0])
    assert isinstance(a[0], nn.Linear) and type(a[0]).__name__ == "AdaptedLinear"
