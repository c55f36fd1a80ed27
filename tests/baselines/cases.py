"""Every baseline on every architecture that the paper names, and inputs with the special tokens that some want."""

from array import array
from typing import Any

import torch
from torch import Tensor

import lorank
from lorank import LoRA
from lorank.baselines import (
    AdapterD,
    AdapterH,
    AdapterL,
    AdapterP,
    BitFit,
    PrefixEmbedding,
    PrefixLayer,
    TopK,
)

from .. import models

ARCHITECTURES = {"gpt2": models.gpt2, "roberta": models.roberta, "deberta": models.deberta, "llama": models.llama}
METHODS: dict[str, Any] = {
    "bitfit": BitFit(),
    "top-k": TopK(1),
    "adapter-h": AdapterH(size=4),
    "adapter-l": AdapterL(size=4),
    "adapter-p": AdapterP(size=4),
    "adapter-d": AdapterD(size=4, drop=1),
    "prefix-embedding": PrefixEmbedding(3, 2),
    "prefix-layer": PrefixLayer(3, 2),
    "lora+prefix-embedding": [LoRA(rank=2), PrefixEmbedding(3, 2)],
    "lora+prefix-layer": [LoRA(rank=2), PrefixLayer(3, 0)],
    "lora+adapter-h": [LoRA(rank=2), AdapterH(size=4)],
}
# LLaMA's layers have no biases: BitFit refuses it.
PAIRS = [(a, m) for a in ARCHITECTURES for m in METHODS if (a, m) != ("llama", "bitfit")]
FROM_THE_BASE = [m for m in METHODS if "prefix" not in m]  # these begin as the base computes


def adapted(model: Any, method: str, **options: Any) -> Any:
    """Put a method on a model, with a head of its own where it classifies, and return the plan."""
    heads = [] if hasattr(model, "lm_head") else ["classifier"]
    targets = "attention" if isinstance(METHODS[method], list) else None
    return lorank.adapt(model, METHODS[method], targets, train_also=heads, **options)


def surrounded(model: Any, ids: Tensor) -> Tensor:
    """Return ids (batch, length) with the special tokens that the active adapter wants around them."""
    tokens = lorank.special_tokens(model)
    if tokens is None:
        return ids
    return torch.tensor([tokens.around(array("q", row), 0, len(row)).tolist() for row in ids.tolist()])


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def loss(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.float().log_softmax(-1)[..., 2].mean()
