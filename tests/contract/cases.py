"""The grid of the contract: every host with every variant. A new host or variant adds a line here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lorank import LoRA
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

    def model(self) -> nn.Module:
        return self.build().eval()


def _features() -> Tensor:
    return torch.randn(3, 5, 10)


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
}

SPECS: dict[str, Spec] = {
    "lora": LoRA(rank=3, alpha=6),
    "lora-gaussian": LoRA(rank=4, alpha=2, init="gaussian"),
    "lora-rank-stabilised": LoRA(rank=4, alpha=8, rank_stabilised=True),
    "lora-rank-1-dropout": LoRA(rank=1, alpha=1, dropout=0.3),
}
