"""Tiny models of real architectures, with random weights. Their type is Any: tests reach deep into them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 97


class Block(nn.Module):
    """A residual block with two linear layers."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Plain(nn.Module):
    """A plain module with an embedding, blocks and a head: nothing that transformers knows about."""

    def __init__(self, size: int = 16, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size)
        self.blocks = nn.ModuleList([Block(size) for _ in range(2)])
        self.head = nn.Linear(size, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sequential(*layers: nn.Module) -> Any:
    return nn.Sequential(*layers)


def gpt2(**changes: Any) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    return GPT2LMHeadModel(config).eval()


def llama(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


# What most decoders of transformers call their sizes.
SMALL_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def bert(**changes: Any) -> Any:
    return BertForSequenceClassification(BertConfig(**(_ENCODER | changes))).eval()


def roberta(**changes: Any) -> Any:
    return RobertaForSequenceClassification(RobertaConfig(**(_ENCODER | changes))).eval()


def deberta(**changes: Any) -> Any:
    settings = _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**(settings | changes))).eval()


def ids(rows: int = 3, columns: int = 7) -> Tensor:
    """Return token ids (rows, columns) that avoid the special tokens of every model here."""
    return torch.randint(5, VOCABULARY, (rows, columns))


def disturb(model: nn.Module, name: str | None = None, size: float = 0.2) -> None:
    """Give an adapter's parameters random values, so that it has an effect."""
    import lorank

    with torch.no_grad():
        for parameter in lorank.adapter_parameters(model, name).values():
            parameter.add_(size * torch.randn_like(parameter))
