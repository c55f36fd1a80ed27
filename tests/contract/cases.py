"""The grid of the contract: every host with every variant. A new host or variant adds a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import EVA, AdaLoRA, DoRA, LoHa, LoKr, LoRA, LoRAFA, LoRAGA, MiLoRA, OLoRA, PiSSA, VeRA
from lorank.planning import Plan
from lorank.variants import Spec

from ..models import VOCABULARY, gpt2, ids


class Between(nn.Module):
    """A layer between two others that are not adapted, so that it has a model around it."""

    def __init__(self, layer: nn.Module, before: nn.Module | None = None):
        super().__init__()
        self.before = before or nn.Identity()
        self.layer = layer
        self.after = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class Images(nn.Module):
    """A layer with channels in front of its places, and a norm of the channels behind it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.before = nn.GroupNorm(1, layer.in_channels)  # pyright: ignore[reportArgumentType]
        self.layer = layer
        self.after = nn.GroupNorm(2, layer.out_channels)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention from a sequence to another."""

    def __init__(self, kdim: int | None = None, vdim: int | None = None, **options: Any):
        super().__init__()
        self.keys = nn.Linear(12, kdim or 12)
        self.values = nn.Linear(12, vdim or 12)
        self.attention = nn.MultiheadAttention(12, 3, kdim=kdim, vdim=vdim, **options)
        self.after = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, self.keys(x), self.values(x))
        return self.after(output) + weights.sum()


class Recurrent(nn.Module):
    """A recurrent layer with a norm behind it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.after = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x)[0])


class Pair(nn.Module):
    """A layer of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(10, 10, 12)
        self.after = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x, x.flip(-1)))


class GroupedExperts(nn.Module):
    """A mixture of experts as parameters, (experts, out, in) or (experts, in, out), of which each row uses two."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(4, 10, 14) if is_transposed else torch.randn(4, 14, 10))
        self.down = nn.Parameter(torch.randn(4, 14, 12) if is_transposed else torch.randn(4, 12, 14))
        self.after = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        z = torch.einsum("...i,eio->...eo", x, up).tanh()
        return self.after(torch.einsum("...ei,eio->...o", z, down))


class Mixture(nn.Module):
    """Experts and a matrix, both plain parameters."""

    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(10, 10))
        self.experts = GroupedExperts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x @ self.projection)


class Logits(nn.Module):
    """A transformers model as a function from ids to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, use_cache=False).logits


@dataclass(frozen=True)
class Case:
    """A model with layers of one kind, what selects them, and an input."""

    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: Callable[[], Tensor]
    has_bias: bool = True
    compiles: bool = True  # the base does: torch.compile and torch.export know nothing of some layers

    def model(self) -> nn.Module:
        return self.build().eval()


def _features() -> Tensor:
    return torch.randn(3, 5, 10)


def _tokens() -> Tensor:
    return torch.randn(3, 5, 12)


def _conv1d() -> nn.Module:
    layer = Conv1D(12, 10)
    nn.init.normal_(layer.bias)
    return Between(layer, nn.LayerNorm(10))


def _phi3() -> nn.Module:
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return Logits(Phi3ForCausalLM(config))


def _neox() -> nn.Module:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    return Logits(GPTNeoXForCausalLM(config))


def _places(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, *sizes)


CASES: dict[str, Case] = {
    "linear": Case(lambda: Between(nn.Linear(10, 12), nn.LayerNorm(10)), ["layer"], _features),
    "linear-without-bias": Case(
        lambda: Between(nn.Linear(10, 12, bias=False), nn.LayerNorm(10)), ["layer"], _features, has_bias=False
    ),
    "conv1d": Case(_conv1d, ["layer"], _features),
    "embedding": Case(lambda: Between(nn.Embedding(VOCABULARY, 12)), ["layer"], ids, has_bias=False),
    "embedding-with-padding": Case(
        lambda: Between(nn.Embedding(VOCABULARY, 12, padding_idx=7)), ["layer"], ids, has_bias=False
    ),
    "embedding-scaled": Case(
        lambda: Between(Gemma3TextScaledWordEmbedding(VOCABULARY, 12, 0, embed_scale=3.5)),
        ["layer"],
        ids,
        has_bias=False,
    ),
    "fused-contiguous": Case(lambda: Logits(gpt2()), ["c_attn[q,v]"], ids),
    "fused-grouped-query": Case(_phi3, ["qkv_proj[q,k]", "gate_up_proj[up]"], ids, has_bias=False),
    "fused-interleaved": Case(_neox, ["query_key_value[k,v]"], ids),
    "conv-1d": Case(lambda: Images(nn.Conv1d(6, 8, 3, padding=1)), ["layer"], _places(6, 9)),
    "conv-2d": Case(
        lambda: Images(nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), padding_mode="reflect")),
        ["layer"],
        _places(6, 9, 8),
    ),
    "conv-3d": Case(lambda: Images(nn.Conv3d(4, 6, 2, bias=False)), ["layer"], _places(4, 4, 4, 4), has_bias=False),
    "conv-grouped": Case(lambda: Images(nn.Conv2d(6, 9 * 2, 3, groups=3)), ["layer"], _places(6, 6, 6)),
    "conv-depthwise": Case(lambda: Images(nn.Conv1d(8, 8, 4, groups=8, padding=3)), ["layer"], _places(8, 7)),
    "conv-transpose-1d": Case(lambda: Images(nn.ConvTranspose1d(6, 8, 3)), ["layer"], _places(6, 9)),
    "conv-transpose-2d": Case(
        lambda: Images(nn.ConvTranspose2d(6, 8, 3, stride=(2, 3), padding=1, output_padding=(1, 0))),
        ["layer"],
        _places(6, 5, 4),
    ),
    "conv-transpose-3d": Case(lambda: Images(nn.ConvTranspose3d(4, 6, 2)), ["layer"], _places(4, 3, 3, 3)),
    "conv-transpose-grouped": Case(
        lambda: Images(nn.ConvTranspose1d(6, 8, 3, groups=2, stride=2, dilation=2)), ["layer"], _places(6, 5)
    ),
    "attention": Case(lambda: Attention(batch_first=True), ["attention[q,v]"], _tokens, has_bias=False),
    "attention-output": Case(lambda: Attention(), ["attention[out]"], _tokens),
    "attention-unequal": Case(
        lambda: Attention(kdim=7, vdim=5, bias=False, add_bias_kv=True), ["attention"], _tokens, has_bias=False
    ),
    "lstm": Case(
        lambda: Recurrent(nn.LSTM(10, 6, num_layers=2, bidirectional=True, bias=False)),
        ["layer"],
        _features,
        has_bias=False,
        compiles=False,
    ),
    "lstm-projected": Case(
        lambda: Recurrent(nn.LSTM(10, 14, proj_size=12, bias=False)),
        ["layer"],
        _features,
        has_bias=False,
        compiles=False,
    ),
    "gru": Case(
        lambda: Recurrent(nn.GRU(10, 12, bias=False, batch_first=True)),
        ["layer"],
        _features,
        has_bias=False,
        compiles=False,
    ),
    "rnn": Case(lambda: Recurrent(nn.RNN(10, 12, bias=False)), ["layer"], _features, has_bias=False, compiles=False),
    "bilinear": Case(Pair, ["layer"], _features),
    "experts": Case(Mixture, ["experts"], _features, has_bias=False),
    "experts-transposed": Case(lambda: Mixture(True), ["experts.up"], _features, has_bias=False),
    "parameter": Case(Mixture, ["projection", "experts.down"], _features, has_bias=False),
}

SPECS: dict[str, Spec] = {
    "lora": LoRA(rank=3, alpha=6),
    "lora-gaussian": LoRA(rank=4, alpha=2, init="gaussian"),
    "lora-rank-stabilised": LoRA(rank=4, alpha=8, rank_stabilised=True),
    "lora-rank-1-dropout": LoRA(rank=1, alpha=1, dropout=0.3),
    "dora": DoRA(rank=3, alpha=6),
    "pissa": PiSSA(rank=2, alpha=3),
    "olora": OLoRA(rank=2, alpha=2, rank_stabilised=True),
    "milora": MiLoRA(rank=2, alpha=4),
    "eva": EVA(rank=2, alpha=4),
    "lora-ga": LoRAGA(rank=2, alpha=4),
    "lora-fa": LoRAFA(rank=3, alpha=6),
    "vera": VeRA(rank=5),
    "adalora": AdaLoRA(rank=3, target_rank=2, alpha=6),
    "loha": LoHa(rank=2, alpha=4),
    "lokr": LoKr(rank=1, alpha=2, decompose_both=True),
}

_LOOKUPS = dict.fromkeys(("embedding", "embedding-with-padding", "embedding-scaled"))
# Layers that multiply the last dimension of their input, and are called.
_LINEAR = ("linear", "linear-without-bias", "conv1d", "fused-contiguous", "fused-grouped-query", "fused-interleaved")
# EVA is refused here when it is calibrated, as nobody calls this layer.
UNSEEN = "attention-output"
# Where a method makes no sense: {spec: {case: what it says}}.
REFUSALS: dict[str, dict[str, str]] = {
    "eva": {name: "EVA looks at the inputs of linear layers" for name in CASES if name not in (*_LINEAR, UNSEEN)},
    "vera": dict.fromkeys(_LOOKUPS, "VeRA's shared matrix would need a column for every token"),
    "loha": dict.fromkeys(_LOOKUPS, "LoHa would form the whole update of an embedding"),
    "lokr": dict.fromkeys(_LOOKUPS, "LoKr would form the whole update of an embedding"),
}


def adapt(model: nn.Module, spec: Spec, case: Case, **options: Any) -> Plan:
    """Adapt a model, and show a method its data that needs any."""
    plan = lorank.adapt(model, spec, case.targets, **options)
    if not next(model.parameters()).is_meta:
        show_data(model, spec, case, options.get("name", "default"))
    return plan


def show_data(model: nn.Module, spec: Spec, case: Case, name: str = "default") -> None:
    """Show a method its data, if it needs any."""
    if isinstance(spec, EVA | LoRAGA):
        x = case.inputs()
        x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
        lorank.calibrate(model, lambda x: model(x).square().sum(), [x, x], name)
