"""Layers that run under W + ΔW: what a user does with a model goes on working while their parameters read so."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lorank
from lorank import AdapterError, LoRA
from lorank.tree import adapted_layers

from .. import models
from ..interop.test_peft import peft_model
from .test_experts import build, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")


class Net(nn.Module):
    """A bilinear layer, which has a bias and is substituted, an attention, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bilinear(x, x.flip(-1))
        return self.linear(self.attention(x, x, x)[0])


def adapted(targets: Any, **options: Any) -> tuple[Any, Tensor]:
    """Return a model with an active adapter that has an effect, and an input."""
    model = Net().eval()
    lorank.adapt(model, LoRA(rank=2, alpha=2), targets, name="first", **options)
    models.disturb(model)
    return model, torch.randn(2, 3, 6)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_is_planned_put_on_and_loaded_while_the_first_is_active(tmp_path: Path) -> None:
    model, x = adapted(["bilinear", "attention"], bias="none")
    lorank.adapt(model, LoRA(rank=2), ["bilinear", "linear"], name="biased", bias="adapted")
    models.disturb(model)
    y = model(x)
    lorank.save(model, tmp_path, "biased")
    plan = lorank.plan(model, LoRA(rank=2), ["bilinear", "linear"], name="third", bias="adapted")
    assert "bilinear.bias" in str(plan) and plan.trainable_parameters > 0
    lorank.adapt(model, LoRA(rank=2), ["bilinear", "linear"], name="third", bias="adapted", activate=False)
    lorank.load(model, tmp_path, name="again")
    assert_near(model(x), y)


def test_a_copy_of_a_layer_is_reset_to_the_base_while_an_adapter_of_it_is_active() -> None:
    model, x = adapted(["bilinear"])
    y = model(x)
    lorank.adapt(model, LoRA(rank=2), ["linear"], name="copied", train_also=["bilinear"])
    models.disturb(model)
    lorank.activate(model, "first")
    lorank.reset(model, "copied")
    assert_near(model(x), y)
    lorank.activate(model, "copied")
    with lorank.disabled(model):
        base = model(x)
    assert_near(model(x), base)


def test_a_file_of_peft_with_parameters_loads_beside_an_adapter_of_them(tmp_path: Path) -> None:
    base, x = build("mixtral"), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=[], target_parameters=["down_proj"], r=2, lora_alpha=3)
    theirs.save_pretrained(str(tmp_path))
    lorank.adapt(base, LoRA(rank=2), "experts", name="first")
    models.disturb(base)
    lorank.load(base, tmp_path, name="theirs")
    assert_near(run(base, x), run(theirs, x))


@pytest.mark.parametrize("target", ["bilinear", "attention"])
def test_a_copy_and_an_update_of_one_layer_run_together_or_are_refused(target: str) -> None:
    model, x = adapted({"bilinear": "bilinear", "attention": "attention[q]"}[target])
    lorank.adapt(model, LoRA(rank=2), ["linear"], name="copied", train_also=[target])
    models.disturb(model)
    try:
        lorank.activate(model, "first", "copied")
    except AdapterError as error:
        assert target in str(error)
        return
    y = model(x)
    lorank.merge(model)
    assert_near(model(x), y)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own that computes what its class does."""

    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Plain(nn.Linear):
    """A linear layer with a forward of its own that computes what its class does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Reads(nn.Module):
    """A model that calls such layers and multiplies with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Scaled(models.VOCABULARY, 6)
        self.plain = Plain(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.plain(self.embed(ids)) @ self.plain.weight @ self.embed.weight.T


@pytest.mark.parametrize("target", ["embed", "plain"])
def test_a_subclass_whose_weight_is_read_is_told_by_its_base_alone(target: str, tmp_path: Path) -> None:
    model, x = Reads(), models.ids()
    lorank.adapt(model, LoRA(rank=2), target, name="first")
    models.disturb(model)
    y = model(x)
    lorank.save(model, tmp_path)
    lorank.adapt(model, LoRA(rank=2), target, name="second", activate=False)
    plan = lorank.load(model, tmp_path, name="third", activate=False)
    assert [place.part for place in plan.places] == ["weight"]
    lorank.merge(model)
    assert_near(model(x), y)


def test_parameters_keep_their_names_and_stay_what_they_are() -> None:
    model, _ = adapted(["attention[q]", "bilinear", "linear"])
    bare = Net()
    names = [name for name, _ in model.named_parameters() if "adapters." not in name]
    assert names == [name for name, _ in bare.named_parameters()]
    model.load_state_dict(bare.state_dict(), strict=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bare.state_dict().items())
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        if "adapters." not in name:
            assert model.get_submodule(path)._parameters[key] is parameter and isinstance(parameter, nn.Parameter)
    model.attention.in_proj_weight = nn.Parameter(torch.zeros_like(state["attention.in_proj_weight"]))
    assert not model.state_dict()["attention.in_proj_weight"].any()


def test_reading_a_weight_gives_what_the_model_computes_with() -> None:
    model, _ = adapted(["attention[q]"])
    read = model.attention.in_proj_weight
    own = model.attention._parameters["in_proj_weight"]
    assert read.requires_grad and not torch.equal(read, own)
    assert torch.equal(read[6:], own[6:])  # keys and values
    with lorank.disabled(model):
        assert model.attention.in_proj_weight is own
    with lorank.merged(model) as report:
        assert report.rows and torch.allclose(own, read, atol=1e-6)
    lorank.remove(model)
    assert model.attention.in_proj_weight is own and not adapted_layers(model)


def test_an_update_is_computed_once_in_a_call_however_often_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorank.variants import LoRAAdapter

    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = (x @ self.w).tanh()
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often = Often()

        def forward(self, x: Tensor) -> Tensor:
            return self.often(x)

    model, x, calls = Outer(), torch.randn(2, 4), []
    lorank.adapt(model, LoRA(rank=2, dropout=0.5), "w")
    models.disturb(model)
    change = LoRAAdapter.change
    monkeypatch.setattr(LoRAAdapter, "change", lambda self, layer: (calls.append(1), change(self, layer))[1])
    model.train()(x).sum().backward()
    assert len(calls) == 1
    lorank.check(model, moved=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    with torch.no_grad():  # what an interrupted call has read is forgotten
        for parameter in lorank.adapter_parameters(model).values():
            parameter.zero_()
    model.eval()
    y = model(x)
    with lorank.disabled(model):
        assert torch.equal(model(x), y)


def test_a_parametrised_convolution_is_adapted_by_what_its_weight_is_made_of() -> None:
    model, x = models.sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3))), torch.randn(2, 4, 5)
    with pytest.raises(AdapterError, match="its weight is not a parameter of its own"):
        lorank.plan(model, LoRA(rank=2), "0")
    lorank.adapt(model, LoRA(rank=2), "original1")
    models.disturb(model)
    y = model(x)
    with lorank.disabled(model):
        assert not torch.allclose(model(x), y, atol=1e-3)
    y.sum().backward()
    lorank.check(model, moved=True)
    lorank.merge(model)
    assert_near(model(x), y)


FUNCTIONS: dict[Any, Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_convolution_with_a_forward_of_its_own_is_adapted_by_its_weights_name(kind: Any, tmp_path: Path) -> None:
    class Normalised(kind):
        def forward(self, input: Tensor) -> Tensor:
            return FUNCTIONS[kind](input, self.weight / self.weight.norm(), self.bias).tanh()

    model = models.sequential(layer := Normalised(3, 4, 2))
    x = torch.randn(2, 3, *[5] * len(layer.kernel_size))
    with pytest.raises(AdapterError, match="name the parameter itself"):
        lorank.adapt(model, LoRA(rank=2), "0")
    lorank.adapt(model, LoRA(rank=2), "0.weight")
    models.disturb(model)
    y = model(x)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    lorank.load(model, tmp_path)
    assert torch.equal(model(x), y)
    y.sum().backward()
    lorank.merge(model)
    assert_near(model(x), y)


def test_lists_and_dictionaries_of_parameters_are_adapted_one_by_one(tmp_path: Path) -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.some = nn.ParameterList([torch.randn(4, 4) for _ in range(3)])
            self.named = nn.ParameterDict({"x": torch.randn(4, 4)})
            self.own = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for matrix in self.some:
                x = x @ matrix
            return x @ self.named["x"] @ self.own

    model, x = Lists(), torch.randn(2, 4)
    base = model(x)
    plan = lorank.adapt(model, LoRA(rank=2), ["some.1", "named.x", "own"])
    assert [place.label for place in plan.places] == ["own", "some[1]", "named[x]"]
    models.disturb(model)
    y = model(x)
    y.sum().backward()
    lorank.check(model, moved=True)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    assert torch.equal(model(x), base) and type(model) is Lists
    lorank.load(model, tmp_path)
    assert torch.equal(model(x), y)
    lorank.merge(model)
    assert_near(model(x), y)
