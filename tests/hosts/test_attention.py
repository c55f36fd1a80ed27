"""nn.MultiheadAttention in all its modes, also where one kernel is handed all weights."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models
from .checking import adapt, assert_near, counted

pytestmark = [
    pytest.mark.usefixtures("wide"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

PARTS = ["q", "k", "v", "out"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "without-bias": {"bias": False, "batch_first": True},
    "other-keys": {"kdim": 6, "batch_first": True},
    "other-values": {"vdim": 10},
    "other-keys-and-values": {"kdim": 6, "vdim": 10, "bias": False, "add_bias_kv": True},
    "bias-kv": {"add_bias_kv": True, "batch_first": True},
    "zero-attention": {"add_zero_attn": True},
    "three-heads": {"num_heads": 3, "embed_dim": 12, "batch_first": True},
    "one-head": {"num_heads": 1, "batch_first": True},
}
CHOICES = [*(f"[{part}]" for part in PARTS), "[q,v]", "[v,out]", "[q,k,v]", ""]


def attention(settings: dict[str, Any]) -> Any:
    """Return an attention with biases that are not zero."""
    options: dict[str, Any] = {"embed_dim": 8, "num_heads": 2} | settings
    made = nn.MultiheadAttention(**options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made


def inputs(layer: Any, batch: int | None = 3, same: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of length 4, and keys and values of length 5; or one tensor three times."""
    shapes = [(4, layer.embed_dim), (5, layer.kdim), (5, layer.vdim)]
    if batch is not None:
        order = (lambda n, d: (batch, n, d)) if layer.batch_first else (lambda n, d: (n, batch, d))
        shapes = [order(*shape) for shape in shapes]
    if same:
        x = torch.randn(shapes[0])
        return x, x, x
    return torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[2])


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_part_has_its_effect_in_every_mode(settings: str, chosen: str) -> None:
    model = nn.ModuleDict({"self_attn": attention(SETTINGS[settings])})
    layer: Any = model["self_attn"]
    adapt(model, f"self_attn{chosen}")
    same = layer._qkv_same_embed_dim and settings != "plain"
    for x in (inputs(layer), inputs(layer, None), inputs(layer, same=same)):
        layer.train()
        y, weights = layer(*x)
        layer.eval()
        found = [layer(*x)]
        with torch.no_grad():  # where PyTorch's kernel takes the weights, if it can
            found.append(layer(*x))
            found.append((layer(*x, need_weights=False)[0], weights))
            with lorank.merged(model):
                found.append(layer(*x))
        for output, of_output in found:
            assert_near(output, y)
            assert_near(of_output, weights)
        with lorank.disabled(model):
            base, base_weights = layer(*x)
        assert not torch.allclose(base, y, atol=1e-3)
        touched = {"[v]", "[out]", "[v,out]"}.isdisjoint([chosen])
        assert torch.allclose(base_weights, weights, atol=1e-5) != touched


def test_the_kernel_of_pytorch_was_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, "_native_multi_head_attention")
    model = nn.ModuleDict({"self_attn": attention({"batch_first": True})}).eval()
    x = inputs(model["self_attn"], same=True)
    adapt(model, "self_attn")
    y = model["self_attn"](*x)[0]
    assert not calls
    with torch.no_grad():
        assert_near(model["self_attn"](*x)[0], y)
    assert len(calls) == 1


def masks(heads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
    yield "bool", {"attn_mask": causal}
    yield "float", {"attn_mask": torch.randn(4, 4)}
    yield "per head", {"attn_mask": causal.expand(3 * heads, 4, 4).clone()}
    yield "float per head", {"attn_mask": torch.randn(3 * heads, 4, 4)}
    yield "causal", {"attn_mask": causal, "is_causal": True, "need_weights": False}
    yield "padding", {"key_padding_mask": padding}
    yield "float padding", {"key_padding_mask": torch.zeros(3, 4).masked_fill(padding, float("-inf"))}
    yield "both", {"attn_mask": causal, "key_padding_mask": padding}
    yield "every head", {"average_attn_weights": False}


@pytest.mark.parametrize("kind", [name for name, _ in masks(2)])
@pytest.mark.parametrize("settings", ["plain", "batch-first", "bias-kv", "other-keys"])
def test_masks_reach_an_adapted_attention(settings: str, kind: str) -> None:
    model = nn.ModuleDict({"self_attn": attention(SETTINGS[settings])}).eval()
    layer: Any = model["self_attn"]
    options = dict(masks(2))[kind]
    shape = (3, 4) if layer.batch_first else (4, 3)
    x = torch.randn(*shape, 8), torch.randn(*shape, layer.kdim), torch.randn(*shape, 8)
    adapt(model, "self_attn")
    y, weights = layer(*x, **options)
    with torch.no_grad():
        again, weights_again = layer(*x, **options)
        with lorank.merged(model):
            merged, merged_weights = layer(*x, **options)
    for found, expected in ((again, y), (merged, y), (weights_again, weights), (merged_weights, weights)):
        assert_near(found, expected)
    if weights is not None:
        assert weights.dim() == (4 if kind == "every head" else 3)


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("settings", ["batch-first", "other-keys-and-values"])
def test_only_the_chosen_parts_get_gradients(settings: str, chosen: str) -> None:
    model = nn.ModuleDict({"self_attn": attention(SETTINGS[settings])}).train()
    adapt(model, f"self_attn{chosen}")
    layer: Any = model["self_attn"]
    output, weights = layer(*inputs(layer))
    (output.square().sum() + weights.square().sum()).backward()
    lorank.check(model, moved=True)
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = chosen.strip("[]").split(",") if chosen else PARTS
    prefixes = ["out_proj.adapters.default" if p == "out" else f"adapters.default.{p}" for p in parts]
    assert gradients == {f"self_attn.{prefix}.{factor}" for prefix in prefixes for factor in "AB"}


@pytest.mark.parametrize("settings", ["batch-first", "other-keys"])
def test_gradients_are_those_of_dense_weights(settings: str) -> None:
    base = attention(SETTINGS[settings])
    model = nn.ModuleDict({"self_attn": copy.deepcopy(base)})
    adapt(model, "self_attn")
    x = inputs(base)
    model["self_attn"](*x)[0].square().sum().backward()
    leaves = {p.label: p for p in lorank.plan(nn.ModuleDict({"self_attn": base}), LoRA(), "self_attn").places}
    lorank.merge(dense := copy.deepcopy(model))
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    dense["self_attn"](*x)[0].square().sum().backward()
    assert len(leaves) == 4
    for place in leaves.values():
        path = f"{place.name}.{place.host.attribute(place.layer, place.part)}"
        gradient: Any = dense.get_parameter(path).grad
        if "in_proj_weight" in path:
            gradient = gradient.unflatten(0, (3, -1))["qkv".index(place.part)]
        adapter: Any = model.get_submodule(f"{place.name}.adapters.default")
        adapter = adapter if place.part == "weight" else getattr(adapter, place.part)
        assert_near(adapter.B.grad, adapter.scale * gradient @ adapter.A.mT)
        assert_near(adapter.A.grad, adapter.scale * adapter.B.mT @ gradient)


def test_dropout_of_the_base_and_of_the_adapter_follow_the_seed() -> None:
    model = nn.ModuleDict({"self_attn": attention({"dropout": 0.5, "batch_first": True})}).train()
    layer: Any = model["self_attn"]
    x = inputs(layer, same=True)
    adapt(model, "self_attn[v,out]", dropout=0.5)  # the output is a linear function of each

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(*x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    mean = torch.stack([run(seed) for seed in range(1000)]).mean(0)
    model.eval()
    assert torch.equal(run(1), run(2))
    assert (mean - run(0)).norm() < 0.1 * run(0).norm()
    with lorank.merged(model):
        assert_near(layer(*x)[0], run(0))


def test_parts_that_are_no_parts_are_refused() -> None:
    model = nn.ModuleDict({"self_attn": attention({})})
    with pytest.raises(AdapterError, match=r"it has no part key; its parts are q, k, v, out"):
        lorank.adapt(model, LoRA(rank=2), "self_attn[q,key]")
    with pytest.raises(AdapterError, match=r"it has no part in_proj_weight"):
        lorank.adapt(model, LoRA(rank=2), ["self_attn[q]", "in_proj_weight"])


def test_the_whole_input_projection_is_a_matrix_by_its_own_name() -> None:
    model = nn.ModuleDict({"self_attn": attention({"batch_first": True})}).eval()
    plan = lorank.adapt(model, LoRA(rank=2), "self_attn.in_proj_weight", name="whole")
    assert [(place.part, place.shape) for place in plan.places] == [("in_proj_weight", (24, 8))]
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), "self_attn[q,out]", name="parts")
    models.disturb(model)
    lorank.activate(model, "whole", "parts")
    x = inputs(model["self_attn"], same=True)
    y = model["self_attn"](*x)[0]
    lorank.merge(model)
    assert_near(model["self_attn"](*x)[0], y)


def test_two_adapters_of_parts_add_up() -> None:
    model = nn.ModuleDict({"self_attn": attention({"batch_first": True})}).eval()
    x = inputs(model["self_attn"], same=True)
    for name, parts in (("one", "[q,out]"), ("two", "[q,v]")):
        lorank.adapt(model, LoRA(rank=2), f"self_attn{parts}", name=name)
        models.disturb(model)
    alone = model["self_attn"](*x)[0]
    lorank.activate(model, "one", "two")
    y = model["self_attn"](*x)[0]
    assert not torch.allclose(y, alone, atol=1e-3)
    with torch.no_grad():
        assert_near(model["self_attn"](*x)[0], y)
    lorank.remove(model, "two")
    lorank.activate(model, "one")
    assert not torch.allclose(model["self_attn"](*x)[0], y, atol=1e-3)


def test_an_attention_takes_nested_tensors_without_a_gradient() -> None:
    model = nn.ModuleDict({"self_attn": attention({"batch_first": True})}).eval()
    adapt(model, "self_attn")
    rows = [torch.randn(length, 8) for length in (5, 2, 3)]
    with torch.no_grad():
        nested = torch.nested.nested_tensor(rows)
        found = model["self_attn"](nested, nested, nested, need_weights=False)[0]
        expected = [model["self_attn"](*[row[None]] * 3)[0][0] for row in rows]
    for one, other in zip(found.unbind(), expected, strict=True):
        assert_near(one, other)
