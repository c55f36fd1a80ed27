"""The hard cases of merging: what is refused, and what is rounded only once."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(model: nn.Module, reason: str) -> None:
    before = snapshot(model)
    with pytest.raises(AdapterError, match=reason):
        lorank.merge(model)
    with pytest.raises(AdapterError, match=reason), lorank.merged(model):
        pass
    after = model.state_dict()
    assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in before.items())
    assert lorank.active_adapters(model) == ["default"]


def test_what_float16_cannot_hold_is_refused() -> None:
    model = models.sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    with torch.no_grad():
        model[1].weight.fill_(60000)
    lorank.adapt(model, LoRA(rank=1, alpha=1), "all-linear")
    with torch.no_grad():
        model[1].adapters["default"].A.fill_(100.0)
        model[1].adapters["default"].B.fill_(100.0)
    assert_refused(model, r"1: W \+ ΔW is too large for float16")


def test_large_factors_that_cancel_are_no_overflow() -> None:
    model = models.sequential(nn.Linear(4, 4)).half()
    lorank.adapt(model, LoRA(rank=2, alpha=2), "0")
    with torch.no_grad():
        model[0].adapters["default"].A.copy_(torch.tensor([[300.0] * 4, [300.0] * 4]))
        model[0].adapters["default"].B.copy_(torch.tensor([[300.0, -300.0]] * 4))
    before = model[0].weight.clone()
    lorank.merge(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    model = models.llama()
    lorank.adapt(model, LoRA(), "q_proj")
    models.disturb(model)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.adapters["default"].B[0, 0] = value
    assert_refused(broken, r"the adapter's B at model\.layers\.1\.self_attn\.q_proj holds NaN or Inf")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = value
    assert_refused(model, r"model\.layers\.1\.self_attn\.q_proj holds NaN or Inf in the base's own weights")


def test_weights_that_overlap_in_memory_are_tied_and_neighbours_are_not() -> None:
    flat = torch.randn(48)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("a", "b", "c")})
    for name, start in (("a", 0), ("b", 16), ("c", 24)):  # c overlaps b, a only lies beside it
        model[name].weight = nn.Parameter(flat[start : start + 16].view(4, 4))
    lorank.adapt(model, LoRA(rank=1), ["a"])
    models.disturb(model)
    neighbours = flat[16:].clone()
    lorank.merge(model)
    assert torch.equal(flat[16:], neighbours)
    with pytest.warns(lorank.AdapterWarning, match="b shares its weight with c"):
        lorank.adapt(model, LoRA(rank=1), ["b"])
    assert_refused(model, r"b shares its weight with c\.weight")


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = models.llama()
    lorank.adapt(model, LoRA(), "q_proj")
    with pytest.raises(AdapterError, match="meta device"):
        lorank.merge(model)


def test_several_adapters_are_added_in_float32_and_rounded_once() -> None:
    model = models.gpt2().to(torch.bfloat16)
    lorank.adapt(model, LoRA(rank=2), ["c_attn"], name="whole")
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q]"], name="part")
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q,v]"], name="parts")
    models.disturb(model)
    lorank.activate(model, "whole", "part", "parts")
    wide = copy.deepcopy(model).float()
    lorank.merge(wide)
    lorank.merge(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(torch.bfloat16)), name


def test_merging_one_adapter_keeps_the_others() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), "q_proj", name="a")
    models.disturb(model)
    lorank.adapt(model, LoRA(), ["q_proj", "v_proj"], name="b")
    models.disturb(model)
    lorank.activate(model, "a", "b")
    y = model(x).logits
    report = lorank.merge(model, "a")
    assert report.adapters == ("a",)
    assert lorank.adapter_names(model) == ["b"] and lorank.active_adapters(model) == ["b"]
    torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)
    lorank.remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_merged_block_folds_what_is_named_and_leaves_the_others_active() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), "q_proj", name="a")
    models.disturb(model)
    a = model(x).logits
    lorank.adapt(model, LoRA(), "v_proj", name="b")
    models.disturb(model)
    b = model(x).logits
    lorank.activate(model, "a", "b")
    both = model(x).logits
    with lorank.merged(model, "a"):
        assert lorank.active_adapters(model) == ["b"]
        torch.testing.assert_close(model(x).logits, both, rtol=1e-5, atol=1e-5)
        kept = [name for name in model.state_dict() if ".adapters." in name]
        assert kept and all(".adapters.b." in name for name in kept)
    assert torch.equal(model(x).logits, both)
    lorank.activate(model)
    with lorank.merged(model, "a"):
        torch.testing.assert_close(model(x).logits, a, rtol=1e-5, atol=1e-5)
    lorank.activate(model, "b")
    assert torch.equal(model(x).logits, b)


def test_merging_is_float32_whatever_the_switches_say() -> None:
    model = models.sequential(nn.Linear(64, 64))
    lorank.adapt(model, LoRA(rank=16), "0")
    models.disturb(model, size=1.0)
    exact = copy.deepcopy(model)
    lorank.merge(exact)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            lorank.merge(model)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(model[0].weight, exact[0].weight)


def test_a_float64_base_is_merged_in_float64() -> None:
    model = models.sequential(nn.Linear(8, 8)).double()
    lorank.adapt(model, LoRA(rank=2), "0")
    models.disturb(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    y = model(x)
    report = lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    assert report.worst is not None and report.worst.relative_error < 1e-13


def test_layers_whose_class_changed_after_adapt_are_refused() -> None:
    model = models.sequential(nn.Linear(4, 4))
    lorank.adapt(model, LoRA(rank=1), "0")
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    for action in (lorank.merge, lorank.remove):
        with pytest.raises(AdapterError, match="its class became Sharded after it was adapted"):
            action(model)
