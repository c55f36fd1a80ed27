"""What is found in the source of a class: which weights it reads without calling their layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import LoRA
from lorank.names import Names
from lorank.reading import weights_read

from . import models
from .hosts.checking import check_layer
from .sources import Decorated, HandsOn, Inherits, Mixed, OnlyAsks, Reads, Renames, Source, multiply


def test_every_way_of_reading_is_found() -> None:
    assert weights_read(Reads) == {
        ("a", "weight"),
        ("a", "b", "bias"),
        ("items", "*", "weight"),
        ("groups", "*", "inner", "*", "bias"),
        ("c", "weight"),
        ("d", "weight"),
        ("e", "weight"),
        ("f", "weight"),
        ("g", "weight"),
        ("g", "bias"),
    }


def test_asking_and_setting_up_are_no_reading() -> None:
    assert weights_read(OnlyAsks) == set()


def test_methods_of_base_classes_count() -> None:
    assert weights_read(Inherits) == weights_read(Reads) | {("own", "weight")}
    assert weights_read(Mixed) == {("embed", "weight")}


def test_decorated_methods_and_properties_count() -> None:
    assert weights_read(Decorated) == {(name, "weight") for name in "abcde"}


def test_a_layer_with_another_name_in_a_method_is_found() -> None:
    assert weights_read(Renames) == {
        ("a", "weight"),
        ("b", "c", "bias"),
        ("layers", "*", "weight"),
        ("blocks", "*", "proj", "weight"),
        ("ups", "*", "weight"),
        ("downs", "*", "bias"),
        ("heads", "*", "weight"),
        ("items", "*", "weight"),
        ("last", "weight"),
    }


def test_a_layer_that_is_handed_on_is_read_if_what_receives_it_reads_it() -> None:
    names = Names(HandsOn())
    assert {name: names.read_without_call(f"model.{name}") for name in names.modules["model"]._modules} == {
        "embed": {"weight"},
        "also": {"weight"},
        "scale": {"weight"},
        "own": {"bias"},
        "member": {"weight"},
        "called": frozenset(),
        "twice": {"weight"},
    }
    assert weights_read(HandsOn) == set()


@pytest.mark.parametrize("bases", [(nn.Module,), (Reads,)])
def test_a_class_without_source_reads_what_its_bases_do(bases: tuple[type, ...]) -> None:
    namespace: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.a.weight @ x", namespace)
    made = type("Made", bases, {"forward": namespace["forward"]})
    assert weights_read(made) == (weights_read(Reads) if Reads in bases else set())


def test_layers_of_the_standard_library_of_pytorch() -> None:
    assert weights_read(nn.MultiheadAttention) == {("out_proj", "weight"), ("out_proj", "bias")}
    read = weights_read(nn.TransformerEncoderLayer)
    layers = [("linear1",), ("linear2",), ("norm1",), ("norm2",), ("self_attn", "out_proj")]
    assert {(*layer, key) for layer in layers for key in ("weight", "bias")} <= read
    for cls in (nn.Linear, nn.Sequential, nn.LSTM, nn.TransformerDecoderLayer, nn.Conv2d):
        assert weights_read(cls) == set()


def test_only_modules_above_are_asked_and_only_about_their_own() -> None:
    inner = Reads()
    inner.a = nn.Linear(2, 2)
    inner.items = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.ModuleDict({"inner": inner, "a": nn.Linear(2, 2), "deep": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    names = Names(model)
    assert {name: names.read_without_call(name) for name in names.modules} == {
        "": frozenset(),
        "inner": frozenset(),
        "inner.a": {"weight"},
        "inner.items": frozenset(),
        "inner.items.0": {"weight"},
        "a": frozenset(),
        "deep": frozenset(),
        "deep.a": frozenset(),
    }
    assert names.read_without_call("inner.a", above="inner") == set()
    assert names.read_without_call("inner.a", above="inner.a") == {"weight"}


def test_a_layer_is_read_under_any_of_its_names() -> None:
    model = models.sequential(nn.Linear(2, 2), Reads())
    model[1].a = model[0]
    assert Names(model).read_without_call("0") == {"weight"}


class Tied(nn.Module):
    """A model that multiplies with its embedding as its head, in one of many ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(models.VOCABULARY, 8)
        self.blocks = nn.ModuleList([models.Block(8) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.way)(x)

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed.weight)

    def aliased(self, x: Tensor) -> Tensor:
        head = self.embed
        return x @ head.weight.T

    @property
    def matrix(self) -> Tensor:
        return self.embed.weight

    def by_property(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def handed_on(self, x: Tensor) -> Tensor:
        return multiply(x, self.embed)


@pytest.mark.parametrize("way", ["plain", "aliased", "by_property", "handed_on"])
def test_an_embedding_that_is_the_head_too_is_adapted_in_both_places(way: str) -> None:
    x = models.ids()
    check_layer(Tied(way), "embed", lambda model: model(x), size=1.0)


@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed", "conv1d"])
def test_a_layer_that_is_called_and_read_adds_its_update_once_in_each_place(kind: str) -> None:
    build: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(6, 6),
        "convolution": lambda: nn.Conv1d(6, 6, 1),
        "transposed": lambda: nn.ConvTranspose1d(6, 6, 1),
        "conv1d": lambda: Conv1D(6, 6),
    }

    class Both(Source):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = build[kind]()

        def forward(self, x: Any) -> Tensor:
            y = self.layer(x[..., None])[..., 0] if self.layer.weight.dim() > 2 else self.layer(x)
            return y @ self.layer.weight.flatten(1)

    for shape in [(6,), (3, 6)]:
        if kind in ("linear", "conv1d") or len(shape) == 2:
            x = torch.randn(shape)
            check_layer(Both(), "layer", lambda model, x=x: model(x), size=1.0)


@pytest.mark.parametrize("name", ["linear", "embed", "transposed"])
def test_a_layer_that_is_read_may_be_called_by_keyword(name: str) -> None:
    class Keywords(Source):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(models.VOCABULARY, 6)
            self.linear = nn.Linear(6, 6)
            self.transposed = nn.ConvTranspose1d(6, 6, 3, stride=3)

        def forward(self, ids: Any) -> Tensor:
            x = self.linear(input=self.embed(input=ids))
            x = self.transposed(input=x.mT, output_size=[23]).mT
            matrix = self.transposed.weight.sum(-1) + self.linear.weight
            return x @ matrix @ self.embed.weight.T

    x = models.ids()
    check_layer(Keywords(), name, lambda model: model(x), size=1.0)


def test_mamba_multiplies_with_a_weight_and_an_adapter_of_it_trains() -> None:
    config = MambaConfig(
        vocab_size=models.VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=3, time_step_rank=4
    )
    model, x = MambaForCausalLM(config).eval(), models.ids()
    mixer: Any = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.x_proj.weight.normal_()  # so that what goes into dt_proj is not too small to tell
    for target, bias in [("dt_proj", "none"), ("dt_proj", "adapted"), ("all-linear", "none"), ("A_log", "none")]:
        lorank.adapt(model, LoRA(rank=2), target, bias=bias)  # pyright: ignore[reportArgumentType]
        models.disturb(model, size=1.0)
        y = model(x).logits
        model.zero_grad()
        model(x, labels=x).loss.backward()
        lorank.check(model, moved=True)
        with lorank.disabled(model):
            assert not torch.allclose(model(x).logits, y, atol=1e-3)
        with lorank.merged(model):
            torch.testing.assert_close(model(x).logits, y, rtol=1e-4, atol=1e-4)
        lorank.remove(model)


def test_debertas_head_is_given_the_embedding_and_multiplies_with_it() -> None:
    config = DebertaV2Config(
        vocab_size=models.VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        legacy=False,
    )
    x = models.ids()
    check_layer(DebertaV2ForMaskedLM(config).eval(), "word_embeddings", lambda model: model(x).logits, size=1.0)
