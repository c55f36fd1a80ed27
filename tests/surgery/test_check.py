"""check says which adapter parameters do not train, and why."""

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models
from ..variants.cases import METHODS, leaves, stacked


def backward(model: nn.Module, x: Tensor) -> None:
    model(x, labels=x).loss.backward()


def test_on_the_first_step_one_factor_of_each_pair_may_stand_still() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj", "embed_tokens"])
    backward(model, x)
    adapters = [
        model.model.layers[0].self_attn.q_proj.adapters["default"],
        model.model.embed_tokens.adapters["default"],
    ]
    assert not adapters[0].A.grad.any() and adapters[0].B.grad.any()
    assert adapters[1].A.grad.any() and not adapters[1].B.grad.any()
    assert [remark.partition(":")[0] for remark in lorank.check(model)] == ["model.embed_tokens"]


def test_on_later_steps_both_factors_must_move() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"])
    backward(model, x)
    with pytest.raises(AdapterError) as error:
        lorank.check(model, moved=True)
    assert "layers.0.self_attn.q_proj.adapters.default.A has a gradient of zeros" in str(error.value)
    assert "its update is still zero after your steps; is it in the optimiser?" in str(error.value)
    models.disturb(model)
    backward(model, x)
    assert lorank.check(model, moved=True) == []


def test_a_pair_of_which_neither_factor_moves_is_an_error() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"])
    backward(model, x)
    model.model.layers[1].self_attn.q_proj.adapters["default"].B.grad.zero_()
    with pytest.raises(AdapterError) as error:
        lorank.check(model)
    for factor in ("A", "B"):
        assert f"layers.1.self_attn.q_proj.adapters.default.{factor} has a gradient of zeros" in str(error.value)
    assert "layers.0" not in str(error.value)


class Reads(nn.Module):
    """A model that computes with the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight


def test_a_layer_that_is_read_without_being_called_is_read_with_its_update() -> None:
    model, x = Reads(), torch.randn(2, 4)
    lorank.adapt(model, LoRA(rank=1), "all-linear")
    models.disturb(model)
    y = model(x)
    y.sum().backward()
    assert lorank.check(model) == []
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)


def test_a_layer_that_is_read_where_no_source_tells_is_named() -> None:
    class Hidden(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ next(self.read.parameters())

    model = Hidden()
    lorank.adapt(model, LoRA(rank=1), "all-linear")
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(AdapterError) as error:
        lorank.check(model)
    text = str(error.value)
    assert "read.adapters.default.A has no gradient" in text and "read.adapters.default.B has no gradient" in text
    assert "called.adapters" not in text
    assert "reads the layer's weight without calling the layer" in text


def test_gradients_that_are_not_finite_and_flags_that_are_off_are_named() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"])
    backward(model, x)
    first, second = (layer.self_attn.q_proj.adapters["default"] for layer in model.model.layers)
    first.B.grad[0, 0] = float("nan")
    second.B.requires_grad_(False)
    with pytest.raises(AdapterError) as error:
        lorank.check(model)
    assert "layers.0.self_attn.q_proj.adapters.default.B has a gradient with NaN or Inf" in str(error.value)
    assert "layers.1.self_attn.q_proj.adapters.default.B has requires_grad=False" in str(error.value)


def test_an_unused_copy_is_an_error() -> None:
    model, x = models.bert(), models.ids()
    lorank.adapt(model, LoRA(), ["query"], train_also=["classifier", "pooler"])
    model.bert(x).last_hidden_state.sum().backward()
    with pytest.raises(AdapterError, match=r"classifier\.adapters\.default\.weight has no gradient"):
        lorank.check(model)


def test_dropout_that_does_nothing_is_told() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(dropout=0.1), ["q_proj"])
    backward(model, x)
    assert lorank.check(model) == ["'default': dropout 0.1 has no effect in eval mode; model.train() turns it on"]
    model.train()
    assert lorank.check(model) == []


def test_only_the_active_adapters_are_checked() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"], name="idle")
    lorank.adapt(model, LoRA(), ["v_proj"], name="busy")
    backward(model, x)
    assert lorank.check(model) == []
    with pytest.raises(AdapterError, match="adapter 'idle' is not active"):
        lorank.check(model, "idle")


def test_before_the_backward_pass_it_says_when_to_call_it() -> None:
    model = models.llama()
    lorank.adapt(model, LoRA(), ["q_proj"])
    with pytest.raises(AdapterError, match=r"Call check after loss\.backward\(\)"):
        lorank.check(model)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_that_never_left_its_start_is_named(method: str) -> None:
    model, x = stacked(METHODS[method]), torch.randn(9, 6)
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in leaves(model)["second"].parameters():
            parameter.add_(1e-2 * torch.randn_like(parameter))
    with pytest.raises(AdapterError, match=r"\n  first: its update is still zero after your steps"):
        lorank.check(model, moved=True)


def test_rows_of_tokens_that_never_left_their_start_are_named() -> None:
    model, x = models.llama(), models.ids()
    x[0, 0] = 40
    lorank.adapt(model, LoRA(), ["q_proj"], train_tokens={"embed_tokens": [40]})
    for leaf in (layer.self_attn.q_proj.adapters["default"] for layer in model.model.layers):
        with torch.no_grad():
            leaf.B.normal_()
    backward(model, x)
    with pytest.raises(AdapterError, match=r"\n  model\.embed_tokens: its update is still zero"):
        lorank.check(model, moved=True)
    x[x == 40] = 41  # did not occur
    model.zero_grad()
    backward(model, x)
    assert lorank.check(model, moved=True) == ["model.embed_tokens: none of the 1 trained tokens occurred"]
