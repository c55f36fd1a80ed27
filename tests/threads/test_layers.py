"""Faults of other tools, by the thread that reports them: kinds of layers that were refused, or computed wrongly."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models
from ..hosts.checking import check_layer

Run = Callable[[nn.Module], Tensor]


def convolution(dimensions: int, *args: Any, **options: Any) -> tuple[nn.Module, Run]:
    """Return a model with a convolution, and a run of it on a fixed input."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](*args, **options)
    x = torch.randn(2, layer.in_channels, *[8] * dimensions)
    return models.sequential(layer), lambda model: model(x)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_peft_3697_dilation_and_padding_mode_hold_for_the_adapter_too(dimensions: int) -> None:
    for options in ({"dilation": 2}, {"padding_mode": "reflect"}, {"dilation": 2, "padding_mode": "reflect"}):
        model, run = convolution(dimensions, 1, 1, 3, padding=2, **options)
        check_layer(model, "0", run, rank=1)


@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_diffusers_5957_a_padding_mode_that_is_changed_later_holds_for_the_adapter_too(mode: str) -> None:
    model, run = convolution(2, 3, 4, 3, padding=1)
    lorank.adapt(model, LoRA(rank=2), "0")
    models.disturb(model)
    before = run(model)
    layer: Any = model.get_submodule("0")
    layer.padding_mode = mode
    y = run(model)
    assert not torch.allclose(y, before, atol=1e-3)
    lorank.merge(model)
    torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:0. rank 8 is above the layer's own, 3")
@pytest.mark.parametrize("thread", ["peft#2549", "peft#2403", "peft#2567"])
@pytest.mark.parametrize(
    ("channels", "groups", "rank"), [((6, 12), 2, 3), ((6, 9), 3, 4), ((8, 8), 8, 8), ((4, 8), 4, 1)]
)
def test_a_grouped_convolution_takes_any_rank_and_merges(
    thread: str, channels: tuple[int, int], groups: int, rank: int
) -> None:
    for dimensions in (1, 2):
        model, run = convolution(dimensions, *channels, 3, stride=2, padding=1, groups=groups, bias=False)
        check_layer(model, "0", run, rank)


@pytest.mark.parametrize("thread", ["peft#637", "peft#3768"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_convolution_merges_with_kernels_of_every_size(thread: str, dimensions: int, kernel: int) -> None:
    model, run = convolution(dimensions, 3, 4, kernel, stride=2)
    check_layer(model, "0", run)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 3)])
def test_loralib_adapts_no_kernel_but_square_ones_of_two_dimensions(kernel: tuple[int, ...]) -> None:
    model, run = convolution(len(kernel), 3, 4, kernel)
    check_layer(model, "0", run)


class Attending(nn.Module):
    """An attention with its own output, as scGPT and CLIP have it."""

    def __init__(self, **options: Any):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = x[..., : self.attn.kdim], x[..., : self.attn.vdim]
        return self.head(self.attn(x, keys, values, need_weights=False)[0])


OUT_PROJ = ["helical#405", "peft#761", "pytorch#78109", "LoRA-Torch#3"]


@pytest.mark.parametrize("thread", OUT_PROJ)
@pytest.mark.parametrize("target", ["out_proj", "attn[out]"])
def test_the_output_projection_of_an_attention_trains_alone(thread: str, target: str) -> None:
    x = torch.randn(2, 3, 16)
    for train in (True, False):
        plan = check_layer(Attending().train(train), target, lambda model: model(x))
        assert plan.layers == ["attn.out_proj"]


def test_pytorch_78109_an_adapter_has_its_effect_where_a_hook_is_never_called() -> None:
    model, x, calls = Attending(), torch.randn(2, 3, 16), []
    model.attn.out_proj.register_forward_hook(lambda *_: calls.append(1))
    check_layer(model, "out_proj", lambda model: model(x))
    assert not calls


@pytest.mark.parametrize("target", ["attn[q]", "attn[k]", "attn[v]", "attn[q,k,v]"])
def test_peft_adapts_the_input_projection_only_whole_and_with_the_output(target: str) -> None:
    x = torch.randn(2, 3, 16)
    for options in ({}, {"kdim": 6, "vdim": 10}, {"bias": False, "add_bias_kv": True}):
        check_layer(Attending(**options), target, lambda model: model(x))


def test_peft_merges_an_attention_for_every_call_and_lorank_leaves_the_weights_alone() -> None:
    model, x = Attending(), torch.randn(2, 3, 16)
    before = {name: (p, p.clone(), p._version) for name, p in model.named_parameters()}
    lorank.adapt(model, LoRA(rank=2), "attn")
    models.disturb(model)
    model(x).square().sum().backward()
    after = dict(model.named_parameters())
    for name, (parameter, value, version) in before.items():
        assert after[name] is parameter and parameter._version == version and torch.equal(parameter, value)


ENCODER = ["helical#405", "peft#761"]


@pytest.mark.parametrize("thread", ENCODER)
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["out_proj"], ["self_attn"], ["all-linear"]], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_computes_in_eval_mode_what_it_does_in_training(
    thread: str, targets: list[str], norm_first: bool
) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
    model, x = nn.Sequential(nn.Linear(16, 16), layer), torch.randn(2, 3, 16)
    base = model(x)
    lorank.adapt(model, LoRA(rank=2, alpha=2), targets)
    models.disturb(model, size=0.5)
    y = model(x)
    assert not torch.allclose(y, base, atol=1e-2)
    model.eval()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lorank.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_helical_405_all_linear_leaves_nothing_of_an_encoder_out() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    plan = lorank.adapt(model, LoRA(rank=2), "all-linear")
    assert set(plan.layers) == {"0", "1.linear1", "1.linear2", "1.self_attn", "1.self_attn.out_proj"}
    assert plan.left_out == {}
    model(torch.randn(2, 3, 16)).square().sum().backward()
    lorank.check(model)


SIZES = models.SMALL_DECODER
QWEN = {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8, "num_experts_per_tok": 2}
NEMOTRON = {
    "layers_block_type": ["attention", "moe"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
    "moe_latent_size": None,
}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "peft#2527": ("GptOss", FOUR | {"head_dim": 8}, ["gate_up_proj", "down_proj"]),
    "peft#2545": ("GraniteMoe", FOUR, ["gate_up_proj", "down_proj"]),
    "transformers#36518": ("GraniteMoe", FOUR, ["gate_up_proj", "down_proj"]),
    "peft#3009": ("Qwen3Moe", QWEN, ["gate_up_proj", "down_proj"]),
    "unsloth#4476": ("NemotronH", NEMOTRON, ["up_proj", "down_proj"]),
}


def mixture(family: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("thread", MIXTURES)
def test_experts_as_stacks_of_matrices_are_adapted_all_of_them(thread: str) -> None:
    family, sizes, parts = MIXTURES[thread]
    x = models.ids(4, 9)
    plan = check_layer(mixture(family, sizes), "all-linear", lambda model: model(x).logits)
    found = {(place.part, len(place.shape)) for place in plan.places if "experts" in place.name and place.part in parts}
    assert found == {(part, 3) for part in parts}


def test_peft_refuses_for_parameters_what_holds_for_every_layer_here(tmp_path: Path) -> None:
    model, x = mixture("GraniteMoe", FOUR), models.ids(4, 9)
    base = model(x).logits
    # dropout; a pattern; another rank for one layer; adapters of different parameters
    lorank.adapt(model, LoRA(rank=2, dropout=0.5), "re:.*gate_up_proj", name="one", ranks={"layers.1.*": 3})
    models.disturb(model)
    model.train()
    torch.manual_seed(1)
    first = model(x).logits
    assert not torch.allclose(first, model(x).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(x).logits)
    model.eval()
    lorank.adapt(model, LoRA(rank=1), ["layers.0.*down_proj", "q_proj"], name="two")
    models.disturb(model)
    lorank.activate(model, "one", "two")
    y = model(x).logits
    model(x, labels=x).loss.backward()
    lorank.check(model)
    for name in ("one", "two"):
        lorank.save(model, tmp_path / name, name)
    lorank.merge(twin := copy.deepcopy(model))
    torch.testing.assert_close(twin(x).logits, y, rtol=1e-4, atol=1e-4)
    lorank.remove(model, "one")
    lorank.remove(model, "two")
    assert torch.equal(model(x).logits, base)
    for name in ("one", "two"):
        lorank.load(model, tmp_path / name, name=name)
    lorank.activate(model, "one", "two")
    assert torch.equal(model(x).logits, y)


@pytest.mark.parametrize("thread", ["peft#2018", "peft#2864"])
def test_merging_a_tied_head_does_not_change_what_the_embedding_looks_up(thread: str) -> None:
    model, x = models.Plain(tied=True), models.ids()
    with pytest.warns(lorank.AdapterWarning, match="head shares its weight with embed"):
        lorank.adapt(model, LoRA(rank=2), "head")
    models.disturb(model)
    y, embedded = model(x), model.embed(x)
    try:
        lorank.merge(model)
    except AdapterError as error:
        assert "head shares its weight with embed.weight" in str(error)
    torch.testing.assert_close(model.embed(x), embedded, rtol=0, atol=0)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("thread", ["unsloth#3235", "unsloth#3178", "unsloth#328"])
def test_norms_are_trained_whole_beside_an_adapter(thread: str, tmp_path: Path) -> None:
    model, x = models.llama(), models.ids()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(x).logits
    norms = ["input_layernorm", "post_attention_layernorm", "model.norm"]
    plan = lorank.adapt(model, LoRA(rank=2), ["q_proj"], train_also=norms)
    assert len(plan.copies) == 5
    config = lorank.TrainConfig(steps=3, learning_rate=1e-2)
    for step in lorank.train(lorank.adapter_parameters(model), lambda x: model(x, labels=x).loss, [x], config):
        lorank.check(model, moved=step.index > 1)
    y = model(x).logits
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    moved = {name for name, p in lorank.adapter_parameters(model).items() if "norm" in name and not (p == 1).all()}
    assert len(moved) == 5
    lorank.save(model, tmp_path)
    lorank.remove(model)
    assert torch.equal(model(x).logits, before)
    lorank.load(model, tmp_path)
    assert torch.equal(model(x).logits, y)
    lorank.merge(model)
    torch.testing.assert_close(model(x).logits, y, rtol=1e-4, atol=1e-4)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), lambda: (torch.randn(2, 3, 4, 4),)),
    "recurrent layer": (lambda: nn.LSTM(6, 5, 2, bidirectional=True), lambda: (torch.randn(4, 2, 6),)),
    "recurrent cell": (lambda: nn.GRUCell(6, 5), lambda: (torch.randn(2, 6), torch.randn(2, 5))),
    "bilinear layer": (lambda: nn.Bilinear(6, 5, 4), lambda: (torch.randn(2, 6), torch.randn(2, 5))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_other_tool_adapts(kind: str) -> None:
    build, make = KINDS[kind]
    inputs = make()

    def run(model: Any) -> Tensor:
        output = model["layer"](*inputs)
        return output[0] if isinstance(output, tuple) else output

    check_layer(nn.ModuleDict({"layer": build()}), "all-linear", run)


def test_a_matrix_that_belongs_to_no_layer_is_adapted_by_its_name() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.text_projection = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.body(x) @ self.text_projection, dim=-1)

    x = torch.randn(3, 6)
    plan = lorank.plan(Projected(), LoRA(rank=2), "all-linear")
    assert list(plan.left_out) == ["text_projection"]
    check_layer(Projected(), "text_projection", lambda model: model(x)[:, 0])
    check_layer(Projected(), ["text_projection", "body"], lambda model: model(x)[:, 0])
