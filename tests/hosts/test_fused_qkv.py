"""The row layouts of fused projections, told by what the models do with the rows.

The layer's output is replaced by a given one, so what the module that splits it returns is a function of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

import lorank
from lorank.hosts import AdditiveHost, FusedHost, RowLayout, consecutive, fused_qkv, host_of, layout_of, register_layout
from tests.models import VOCABULARY, disturb, ids

POSITIONS = 6
GRID = (1, 2, POSITIONS // 2)  # the positions of an image, in a batch of one
SIZE = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

Built = tuple[nn.Module, Callable[[], Any]]  # a module, and a call that runs it
Build = Callable[[Any], Built]  # from the owner's class


@dataclass(frozen=True)
class Case:
    """A registered layout and how to build something that uses it."""

    package: str
    owner: str
    layer: str
    build: Build
    variant: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return f"transformers.models.{self.package}.modeling_{self.package}.{self.owner}", self.layer

    @property
    def label(self) -> str:
        return f"{self.package}-{self.layer}{self.variant and '-'}{self.variant}"


class Probe:
    """The owner of a fused layer; a call returns what it makes of a given output of the layer."""

    def __init__(self, case: Case):
        self.model, self.run = case.build(_class(case.package, case.owner))
        self.model.eval()
        self.owner = next(module for module in self.model.modules() if case.key[0] in _class_names(module))
        self.layer: nn.Module = getattr(self.owner, case.layer)
        self.rows = host_of(self.layer).shape(self.layer, "weight")[0]
        self.layout = layout_of(self.owner, case.layer, self.layer, self.rows)
        self.y = torch.randn(POSITIONS, self.rows)

    @torch.no_grad()
    def __call__(self, y: Tensor) -> Tensor:
        """Return the owner's output, (positions, features)."""
        with self.layer.register_forward_hook(lambda layer, inputs, output: y.view(output.shape)):
            return self._output_of(self.owner)

    def scaled(self, **factors: float) -> Tensor:
        """Return the owner's output with parts of the layer's output multiplied."""
        y = self.y.clone()
        for part, factor in factors.items():
            y[:, self.layout.index(part)] *= factor
        return self(y)

    def moved(self, part: str, position: int) -> set[int]:
        """Return the positions of the owner's output that noise on a part at one position changes."""
        index, y = self.layout.index(part), self.y.clone()
        y[position, index] += 2 * torch.randn(len(index))
        return differing(self(y), self(self.y))

    @torch.no_grad()
    def fused_output(self) -> Tensor:
        """Return what the layer itself puts out."""
        return self._output_of(self.layer)

    def _output_of(self, module: nn.Module) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        with module.register_forward_hook(keep):
            self.run()
        (result,) = found
        return result.reshape(POSITIONS, -1)

    def weight(self) -> Tensor:
        return host_of(self.layer).matrix(self.layer, "weight").detach().clone()


def differing(a: Tensor, b: Tensor) -> set[int]:
    """Return the positions at which two outputs differ by more than rounding."""
    far = (a - b).abs().amax(-1) > 1e-4 * b.abs().max()
    return set(far.nonzero().flatten().tolist())


def _class_names(module: nn.Module) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def _class(package: str, name: str) -> Any:
    return getattr(import_module(f"transformers.models.{package}.modeling_{package}"), name)


def _config(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **(SIZES | changes))


def _model(kind: str, **changes: Any) -> Build:
    """A whole model of one layer, run on token ids."""

    def build(owner: Any) -> Built:
        model = AutoModel.from_config(_config(kind, **changes))
        return model, partial(model, input_ids=ids(1, POSITIONS))

    return build


def _decision_transformer(owner: Any) -> Built:
    model = _class("decision_transformer", "DecisionTransformerGPT2Model")(_config("decision_transformer"))
    return model, partial(model, input_ids=ids(1, POSITIONS))


def _alone(kind: str, shape: tuple[int, ...] = (1, POSITIONS), **changes: Any) -> Build:
    """The owner alone, run on hidden states of a shape, given without its last dimension."""

    def build(owner: Any) -> Built:
        attention = owner(_config(kind, **changes))
        return attention, partial(attention, torch.randn(*shape, SIZE))

    return build


def _cross(kind: str) -> Build:
    def build(owner: Any) -> Built:
        attention = owner(_config(kind), is_cross_attention=True, layer_idx=0)
        x, encoded = 10 * torch.randn(1, POSITIONS, SIZE), torch.randn(1, POSITIONS, SIZE)
        return attention, partial(attention, x, encoder_hidden_states=encoded)

    return build


def _sam(owner: Any) -> Built:
    attention = owner(_config("sam_vision_model", use_rel_pos=False), window_size=0)
    return attention, partial(attention, torch.randn(*GRID, SIZE))


def _sam_sdpa(owner: Any) -> Built:
    return _sam(_class("sam", "SamVisionSdpaAttention"))


def _qwen2_vl(owner: Any) -> Built:
    attention = owner(_config("qwen2_vl_vision", embed_dim=SIZE, num_heads=4))
    angles = torch.rand(POSITIONS, SIZE // 8).repeat(1, 2)
    return attention, partial(
        attention,
        torch.randn(POSITIONS, SIZE),
        cu_seqlens=torch.tensor([0, POSITIONS]),
        position_embeddings=(angles.cos(), angles.sin()),
    )


FALCON = ("falcon", "FalconAttention", "query_key_value")
BIGCODE = ("gpt_bigcode", "GPTBigCodeAttention", "c_attn")
DECISION = ("decision_transformer", "DecisionTransformerGPT2Attention", "c_attn")
JAPANESE = ("gpt_neox_japanese", "GPTNeoXJapaneseAttention", "query_key_value")
PHI4 = _model(
    "phi4_multimodal",
    num_key_value_heads=2,
    vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    audio_config={"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
)
DBRX = _model(
    "dbrx",
    d_model=SIZE,
    attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
    ffn_config={"hidden_size": SIZE, "ffn_hidden_size": 16},
)

SELF = [
    Case("gpt2", "GPT2Attention", "c_attn", _model("gpt2")),
    Case("imagegpt", "ImageGPTAttention", "c_attn", _model("imagegpt")),
    Case(*DECISION, _decision_transformer),
    Case(*BIGCODE, _model("gpt_bigcode", multi_query=True), "multi_query"),
    Case(*BIGCODE, _model("gpt_bigcode", multi_query=False), "heads"),
    Case("gpt_neox", "GPTNeoXAttention", "query_key_value", _model("gpt_neox")),
    Case(*JAPANESE, _model("gpt_neox_japanese")),
    Case("bloom", "BloomAttention", "query_key_value", _model("bloom")),
    Case("persimmon", "PersimmonAttention", "query_key_value", _model("persimmon", qk_layernorm=False)),
    Case("deberta", "DisentangledSelfAttention", "in_proj", _model("deberta")),
    Case(*FALCON, _model("falcon", new_decoder_architecture=True, num_kv_heads=2), "grouped"),
    Case(*FALCON, _model("falcon", multi_query=True), "multi_query"),
    Case(*FALCON, _model("falcon", multi_query=False), "heads"),
    Case("codegen", "CodeGenAttention", "qkv_proj", _model("codegen", rotary_dim=4)),
    Case("phi3", "Phi3Attention", "qkv_proj", _model("phi3", num_key_value_heads=2)),
    Case("phi4_multimodal", "Phi4MultimodalAttention", "qkv_proj", PHI4),
    Case("dbrx", "DbrxAttention", "Wqkv", DBRX),
    Case("mpt", "MptAttention", "Wqkv", _model("mpt")),
    Case("modernbert", "ModernBertAttention", "Wqkv", _model("modernbert", cls_token_id=0, sep_token_id=0)),
    Case("blip", "BlipAttention", "qkv", _alone("blip_vision_model")),
    Case("blip_2", "Blip2Attention", "qkv", _alone("blip_2_vision_model")),
    Case("vitdet", "VitDetAttention", "qkv", _alone("vitdet", GRID)),
    Case("sam", "SamVisionAttention", "qkv", _sam),
    Case("sam", "SamVisionAttention", "qkv", _sam_sdpa, "subclass"),
    Case("qwen2_vl", "VisionAttention", "qkv", _qwen2_vl),
    Case("timesformer", "TimesformerSelfAttention", "qkv", _alone("timesformer")),
]
CROSS = [
    Case("gpt2", "GPT2Attention", "c_attn", _cross("gpt2"), "cross"),
    Case("imagegpt", "ImageGPTAttention", "c_attn", _cross("imagegpt"), "cross"),
    Case(*DECISION, _cross("decision_transformer"), "cross"),
]
GATED = [
    Case("phi3", "Phi3MLP", "gate_up_proj", _model("phi3")),
    Case("phi4_multimodal", "Phi4MultimodalMLP", "gate_up_proj", PHI4),
    Case("glm", "GlmMLP", "gate_up_proj", _model("glm", num_key_value_heads=2, head_dim=8)),
    Case("glm4", "Glm4MLP", "gate_up_proj", _model("glm4", num_key_value_heads=2, head_dim=8)),
]


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("probe", cases, indirect=True, ids=lambda case: case.label)


@pytest.fixture(scope="module")
def probe(request: pytest.FixtureRequest) -> Probe:
    torch.manual_seed(0)
    return Probe(request.param)


def test_every_registered_layout_is_tried_here() -> None:
    assert {case.key for case in SELF + CROSS + GATED} == set(fused_qkv._LAYOUTS)


@over(SELF + CROSS + GATED)
def test_parts_divide_the_rows(probe: Probe) -> None:
    index = {part: probe.layout.index(part) for part in probe.layout.parts}
    assert torch.cat(list(index.values())).sort().values.tolist() == list(range(probe.rows))
    base = host_of(probe.layer)
    assert isinstance(base, AdditiveHost)
    host = FusedHost(base, probe.layout)
    for part, rows in index.items():
        assert torch.equal(host.matrix(probe.layer, part), probe.weight()[rows])
        assert torch.equal(host.padded(part, torch.ones(len(rows), 1)).flatten().nonzero().flatten(), rows)


@over(SELF + CROSS)
def test_attention_is_linear_in_v(probe: Probe) -> None:
    zero, one, two = (probe.scaled(v=factor) for factor in (0, 1, 2))
    assert_close(two - zero, 2 * (one - zero), rtol=1e-4, atol=1e-5)
    assert differing(one, zero) == set(range(POSITIONS))


@over(SELF + CROSS)
def test_attention_without_v_sees_nothing_of_q_and_k(probe: Probe) -> None:
    others = {part: 3.0 for part in probe.layout.parts if part != "v"}
    assert_close(probe.scaled(**others, v=0), probe.scaled(v=0))


@over(SELF)
def test_only_the_product_of_q_and_k_counts(probe: Probe) -> None:
    plain = probe(probe.y)
    assert_close(probe.scaled(q=2, k=0.5), plain, rtol=1e-4, atol=1e-5)
    assert differing(probe.scaled(q=2), plain)


@over(SELF)
def test_q_acts_on_its_own_position_and_k_on_the_others(probe: Probe) -> None:
    last = POSITIONS - 1
    assert probe.moved("q", last) == {last}
    assert probe.moved("q", 0) <= {0}
    assert probe.moved("k", 0) >= set(range(1, POSITIONS))


@over(CROSS)
def test_k_of_cross_attention_acts_on_every_position(probe: Probe) -> None:
    assert tuple(probe.layout.parts) == ("k", "v")
    assert probe.moved("k", 0) == set(range(POSITIONS))
    zero, one, two = (probe.scaled(k=factor) for factor in (0, 1, 2))
    assert differing(two - zero, 2 * (one - zero))


@over(GATED)
def test_gated_layer_is_linear_in_up_alone(probe: Probe) -> None:
    zero, one, two = (probe.scaled(up=factor) for factor in (0, 1, 2))
    assert_close(two - zero, 2 * (one - zero), rtol=1e-4, atol=1e-5)
    assert_close(probe.scaled(gate=3, up=0), zero)
    zero, one, two = (probe.scaled(gate=factor) for factor in (0, 1, 2))
    assert differing(two - zero, 2 * (one - zero)) == set(range(POSITIONS))


@pytest.mark.parametrize("package", ["gpt2", "gpt_neox", "phi3", "codegen"])
def test_adapter_of_parts_changes_their_rows_only(package: str) -> None:
    (case,) = (case for case in SELF if case.package == package)
    probe = Probe(case)
    rows = sorted(probe.layout.index("q").tolist() + probe.layout.index("v").tolist())
    weight, output = probe.weight(), probe.fused_output()

    lorank.adapt(probe.model, lorank.LoRA(rank=2), [f"{case.layer}[q,v]"])
    assert torch.equal(probe.fused_output(), output)
    disturb(probe.model)
    adapted = probe.fused_output()
    assert (adapted != output).any(0).nonzero().flatten().tolist() == rows

    lorank.merge(probe.model)
    assert (probe.weight() != weight).any(1).nonzero().flatten().tolist() == rows
    assert_close(probe.fused_output(), adapted, rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """An attention that the table does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.softmax(q @ k.mT, dim=-1) @ v


class OwnChild(Own):
    pass


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[RowLayout], None]:
    """Return a function that registers a layout for `Own` until the test is over."""
    monkeypatch.setattr(fused_qkv, "_LAYOUTS", dict(fused_qkv._LAYOUTS))
    return lambda layout: register_layout(f"{Own.__module__}.{Own.__qualname__}", "qkv", lambda owner, layer: layout)


def test_unknown_owner_is_refused() -> None:
    with pytest.raises(lorank.AdapterError, match=r"layout of 'qkv' in Own is not known.*register_layout"):
        lorank.adapt(nn.Sequential(Own()), lorank.LoRA(rank=2), "qkv[q]")


def test_unknown_part_is_refused() -> None:
    model = AutoModel.from_config(_config("gpt2"))
    with pytest.raises(lorank.AdapterError, match=r"no part gate; its parts are q, k, v"):
        lorank.adapt(model, lorank.LoRA(rank=2), "c_attn[q,gate]")


@pytest.mark.parametrize("owner", [Own, OwnChild])
def test_registered_layout_is_known(owner: type[Own], register: Callable[[RowLayout], None]) -> None:
    register(consecutive(q=4, k=4, v=4))
    own = owner()
    model = nn.Sequential(own)
    x = torch.randn(3, 4)
    before = own.qkv(x)
    lorank.adapt(model, lorank.LoRA(rank=2), "qkv[k]")
    disturb(model)
    assert (own.qkv(x) != before).any(0).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_layout_of_another_size_is_refused(register: Callable[[RowLayout], None]) -> None:
    register(consecutive(q=4, k=2, v=2))
    with pytest.raises(lorank.AdapterError, match="layout in Own has 8 rows, its weight 12"):
        lorank.adapt(nn.Sequential(Own()), lorank.LoRA(rank=2), "qkv[q]")
