"""The rows of queries and keys in Meta's order, which llama.cpp and torchtune have: halves of each head in turns."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError


@dataclass(frozen=True)
class Heads:
    """How many heads a model's attention has."""

    queries: int
    keys: int

    @staticmethod
    def of(queries: Any, keys: Any) -> "Heads | None":
        """Return what a configuration says; None where that is no number of heads."""
        whole = all(isinstance(count, int) and count > 0 for count in (queries, keys))
        return Heads(queries, keys) if whole else None

    def __str__(self) -> str:
        return f"{self.queries} heads of queries and {self.keys} of keys"


def heads_of(model: nn.Module) -> Heads | None:
    """Return the heads of a transformers model, as its configuration says; None where it does not."""
    config = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    return Heads.of(queries, getattr(config, "num_key_value_heads", None) or queries)


def rotated(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of q or k (out, ...) in Meta's order: of each head, both halves in turns.

    Raises AdapterError when there are not two halves for each head.
    """
    return _reordered(rows, heads, 2)


def unrotated(rows: Tensor, heads: int) -> Tensor:
    """Undo `rotated`."""
    return _reordered(rows, heads, -1)


def _reordered(rows: Tensor, heads: int, halves: int) -> Tensor:
    if heads < 1 or not rows.dim() or rows.shape[0] % (2 * heads):
        raise AdapterError(f"it is {tuple(rows.shape)}, which are no rows of {heads} heads")
    pairs = rows.shape[0] // heads // 2
    inner = (2, pairs) if halves == 2 else (pairs, 2)
    return rows.reshape(heads, *inner, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
