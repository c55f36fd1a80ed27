"""DoRA: its norm, its gradient, and what stands beside it."""

from typing import Any

import pytest
import torch

import lorank
from lorank import AdapterError, DoRA, LoRA
from lorank.tree import adapted_layers

from ..contract.cases import CASES
from ..models import disturb
from .cases import Stack, leaves, stacked


@pytest.mark.parametrize("alpha, size", [(3, 1.0), (-8, 3.0), (1e-3, 1e3)])
@pytest.mark.parametrize("host", ["linear", "conv1d", "conv-grouped", "embedding"])
def test_the_norm_of_dora_is_that_of_the_dense_matrix(host: str, alpha: float, size: float) -> None:
    model = CASES[host].model().double()
    lorank.adapt(model, DoRA(rank=3, alpha=alpha), CASES[host].targets)
    disturb(model, size=size)
    ((_, layer),) = adapted_layers(model).items()
    leaf: Any = layer.adapters["default"]
    W = leaf.host.matrix(layer, "weight").detach()
    V = W + alpha / 3 * leaf.B.detach() @ leaf.A.detach()
    dense = torch.linalg.vector_norm(V, dim=1)
    torch.testing.assert_close(leaf._norm(layer), dense, rtol=1e-11, atol=1e-11)
    expected = leaf.magnitude.detach()[:, None] * V / dense[:, None]
    torch.testing.assert_close(W + leaf.delta_weight(layer).detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_row_of_zeros_keeps_its_output_under_dora() -> None:
    model, x = Stack(), torch.randn(3, 6)
    model.first.weight.data[2] = 0
    before = model(x)
    lorank.adapt(model, DoRA(rank=2), ["first"])
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lorank.adapter_parameters(model).values() if p.grad is not None)


def test_the_norm_has_no_gradient_in_dora() -> None:
    model, x = stacked(DoRA(rank=2)), torch.randn(3, 6)
    disturb(model)
    leaf, layer = leaves(model)["second"], model.second
    model(x).square().sum().backward()
    norm = leaf._norm(layer)
    h = torch.tanh(model.first(x))
    V = layer.weight + leaf.scale * leaf.B @ leaf.A
    y = h @ (leaf.magnitude / norm * V.T) + layer.bias
    gradients = torch.autograd.grad(y.square().sum(), [leaf.A, leaf.B, leaf.magnitude])
    for gradient, parameter in zip(gradients, [leaf.A, leaf.B, leaf.magnitude], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_lora_adds_to_dora_and_two_doras_are_refused() -> None:
    model, x = stacked(DoRA(rank=2)), torch.randn(3, 6)
    disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["first", "second"], name="lora")
    disturb(model, "lora")
    lorank.adapt(model, DoRA(rank=1), ["first"], name="other")
    expected = Stack()
    for name, layer in adapted_layers(model).items():
        layer.adapters.activate(("default", "lora"))
        one, other = leaves(model)[name], leaves(model, "lora")[name]
        weight: Any = layer.weight
        weight = weight + one.delta_weight(layer).detach() + other.delta_weight(layer).detach()
        expected.get_submodule(name).load_state_dict({"weight": weight, "bias": layer.bias})
    for order in (("default", "lora"), ("lora", "default")):
        lorank.activate(model, *order)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"'default', 'other' are not additive.*only one of them can be active"):
        lorank.activate(model, "default", "other")
    assert lorank.active_adapters(model) == ["lora", "default"]


def test_a_dora_does_not_stay_on_a_base_that_is_merged() -> None:
    model, x = stacked(DoRA(rank=2)), torch.randn(3, 6)
    disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["first"], name="lora")
    disturb(model, "lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"'default' stays on first, and is no sum with its base"):
        lorank.merge(model, "lora")
    with pytest.raises(AdapterError, match=r"'default' stays on first"), lorank.merged(model, "lora"):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lorank.activate(model, "default", "lora")
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_update_and_not_of_the_base() -> None:
    model, x = stacked(DoRA(rank=2, dropout=0.9)), torch.randn(50, 6)
    disturb(model)
    y = model.train().first(x)
    assert not torch.equal(y, model.first(x))
    leaves(model)["first"].A.data.zero_()
    assert torch.equal(model.first(x), model.eval().first(x))


def test_a_base_can_be_assigned_under_dora_on_the_meta_device() -> None:
    base, x = Stack(), torch.randn(4, 6)
    with torch.device("meta"):
        model = Stack()
    lorank.adapt(model, DoRA(rank=2), ["first", "second"])
    model.load_state_dict(base.state_dict(), assign=True)
    lorank.reset(model)
    torch.testing.assert_close(model(x), base(x))
