"""Which layers targets select, and what is said when they select none."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import T5Config, T5ForConditionalGeneration

import lorank
from lorank import AdapterError, LoRA

from .. import models


def layers(model: nn.Module, targets: object) -> list[str]:
    return lorank.plan(model, LoRA(rank=1), targets).layers  # pyright: ignore[reportArgumentType]


def test_names_are_whole_components_from_the_end() -> None:
    model = models.llama()
    assert layers(model, "q_proj") == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert layers(model, "0.self_attn.q_proj") == ["model.layers.0.self_attn.q_proj"]
    assert layers(model, "model.layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(AdapterError, match="'proj' selects no layer"):
        layers(model, "proj")


def test_patterns_and_regular_expressions() -> None:
    model = models.llama()
    assert layers(model, "layers.1.self_attn.*_proj") == [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    assert layers(model, "layers.1.self_attn.*") == [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    assert layers(model, r"re:.*\.0\..*(gate|up)_proj") == [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")]
    with pytest.raises(AdapterError, match="not a regular expression"):
        layers(model, "re:(")


def test_layers_come_in_the_models_order_and_once() -> None:
    model = models.llama()
    assert layers(model, ["v_proj", "q_proj", "*.q_proj"]) == [
        f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("q", "v")
    ]


def test_a_function_selects_by_name_and_layer() -> None:
    model = models.llama()
    chosen = layers(model, lambda name, layer: isinstance(layer, nn.Linear) and layer.out_features == 48)
    assert chosen == [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up")]
    with pytest.raises(AdapterError, match="selects no layer"):
        layers(model, lambda name, layer: False)


def test_exclusions_win_over_everything() -> None:
    model = models.llama()
    assert layers(model, ["attention", "!layers.0", "!o_proj"]) == [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
    with pytest.raises(AdapterError, match=r"exclusion 'o_porj' names no module; nearest: o_proj"):
        layers(model, ["attention", "!o_porj"])
    with pytest.raises(AdapterError, match="exclude every layer"):
        layers(model, ["q_proj", "!self_attn"])


def test_all_linear_leaves_the_output_head() -> None:
    plan = lorank.plan(models.llama(), LoRA(rank=1), "all-linear")
    assert len(plan.layers) == 2 * 7
    assert plan.left_out == {"lm_head": "output head"}
    plan = lorank.plan(models.roberta(), LoRA(rank=1), "all-linear")
    assert len(plan.layers) == 2 * 6
    assert set(plan.left_out) == {"classifier.dense", "classifier.out_proj"}
    assert len(layers(models.gpt2(), "all-linear")) == 2 * 4
    assert layers(models.Plain(), "all-linear") == [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]


@pytest.mark.parametrize(
    ("build", "per_layer"),
    [
        (models.llama, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (models.gpt2, ["c_attn", "c_proj"]),
        (models.bert, ["query", "key", "value", "dense"]),
        (models.roberta, ["query", "key", "value", "dense"]),
        (models.deberta, ["query_proj", "key_proj", "value_proj", "dense"]),
    ],
)
def test_attention_selects_the_projections_of_attention(build: object, per_layer: list[str]) -> None:
    chosen = layers(build(), "attention")  # pyright: ignore[reportCallIssue]
    assert [name.rpartition(".")[2] for name in chosen] == per_layer * 2
    assert all("attn" in name or "attention" in name for name in chosen)


def test_attention_in_an_encoder_decoder() -> None:
    config = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    chosen = layers(T5ForConditionalGeneration(config), "attention")
    assert len(chosen) == 3 * 4
    assert not any("DenseReluDense" in name for name in chosen)
    with pytest.raises(AdapterError, match="no attention module"):
        layers(models.Plain(), "attention")


def test_a_container_is_no_layer_and_its_layers_are_named() -> None:
    with pytest.raises(AdapterError, match=r"no host for LlamaAttention; layers in it: q_proj, k_proj, v_proj, o_proj"):
        layers(models.llama(), "self_attn")


def test_parts_whole_and_words_do_not_mix_unnoticed() -> None:
    model = models.gpt2()
    plan = lorank.plan(model, LoRA(rank=1), ["c_attn[q]", "c_attn[v, q]"])
    assert [place.label for place in plan.places][:2] == [
        "transformer.h.0.attn.c_attn[q]",
        "transformer.h.0.attn.c_attn[v]",
    ]
    with pytest.raises(AdapterError, match="once as a whole and once by parts"):
        layers(model, ["c_attn", "c_attn[q]"])
    with pytest.raises(AdapterError, match="excludes parts"):
        layers(model, ["c_attn[q,v]", "!c_attn[q]"])


def test_what_is_trained_whole_is_left_to_that_unless_it_is_named() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), before_head=nn.Linear(4, 4), last=nn.Linear(4, 2)))
    made = lorank.plan(model, LoRA(rank=2), "all-linear", train_also=["before_head"])
    assert [place.name for place in made.places] == ["body", "last"]
    assert made.left_out["before_head"] == "trained whole" and list(made.copies) == ["before_head"]
    with pytest.raises(AdapterError, match="before_head would be adapted and trained whole at once"):
        lorank.plan(model, LoRA(rank=2), ["all-linear", "before_head"], train_also=["before_head"])
    with pytest.raises(AdapterError, match="all layers that the targets select are in train_also"):
        lorank.plan(model, LoRA(rank=2), "all-linear", train_also=["body", "before_head", "last"])


def test_a_shared_layer_is_adapted_once_under_its_first_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Shared()
    assert layers(model, "second") == ["first"]
    lorank.adapt(model, LoRA(rank=1), ["first", "second"])
    models.disturb(model)
    x = torch.randn(2, 4)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_lone_layer_is_a_model_too() -> None:
    model = nn.Linear(4, 3)
    plan = lorank.adapt(model, LoRA(rank=1), lambda name, layer: True)
    assert plan.layers == [""]
    models.disturb(model)
    assert set(lorank.adapter_parameters(model)) == {"adapters.default.A", "adapters.default.B"}
    lorank.merge(model)
    assert type(model) is nn.Linear


@pytest.mark.parametrize("targets", [[], [3], ""])
def test_no_targets_are_an_error(targets: object) -> None:
    with pytest.raises(AdapterError, match="target"):
        layers(models.llama(), targets)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Logging(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.0


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = super().forward(input)
        return y, y.softmax(-1)


def test_a_subclass_is_adapted_when_it_computes_what_its_base_does() -> None:
    plan = lorank.plan(nn.Sequential(Logging(4, 4)), LoRA(rank=1), "all-linear")
    assert plan.layers == ["0"]
    for kind in (Doubling, Router):
        with pytest.raises(AdapterError, match=f"{kind.__name__} does not compute what its base class Linear does"):
            lorank.plan(nn.Sequential(kind(4, 4)), LoRA(rank=1), "0")


def test_weights_that_are_no_plain_parameters_are_refused() -> None:
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    reshaped = nn.Linear(4, 4)
    reshaped.weight = nn.Parameter(torch.zeros(8, 2))
    renormed = nn.Embedding(8, 4, max_norm=1.0)
    for layer, reason in [
        (parametrised, "not a parameter of its own"),
        (pruned, "not a parameter of its own"),
        (packed, "packed as uint8"),
        (reshaped, "packed, it needs a host of its own"),
        (nn.LazyLinear(4), "UninitializedParameter"),
        (renormed, "max_norm"),
    ]:
        with pytest.raises(AdapterError, match=reason):
            lorank.plan(nn.Sequential(layer), LoRA(rank=1), "0")
