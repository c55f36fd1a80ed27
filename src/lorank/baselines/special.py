"""Special tokens around a prompt: their numbers, where they stand in an input, and which batch has them."""

from array import array
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError


@dataclass(frozen=True)
class SpecialTokens:
    """The numbers of the special tokens, which are no tokens of the vocabulary: those that follow on its last."""

    first: int
    prefix: int  # how many stand in front of the prompt
    infix: int  # and how many behind it

    def __len__(self) -> int:
        return self.prefix + self.infix

    def around(self, ids: array, begin: int, end: int, fill: tuple[Any, Any] | None = None) -> array:
        """Return ids with the prefix in front of place `begin`, and the infix in front of place `end` of them.

        fill: of an array that runs beside the ids (labels), what it has at the prefix and at the infix.
        """
        before = range(self.first, self.first + self.prefix) if fill is None else [fill[0]] * self.prefix
        behind = range(self.first + self.prefix, self.first + len(self)) if fill is None else [fill[1]] * self.infix
        return ids[:begin] + array(ids.typecode, before) + ids[begin:end] + array(ids.typecode, behind) + ids[end:]


class Running:
    """Which tokens of the batch that runs are special. One object for all modules of an adapter; no part of a copy."""

    def __init__(self, tokens: SpecialTokens):
        self.tokens = tokens
        self.ids: Tensor | None = None  # (batch, length), as the model was given them; None without special tokens
        self.seen = False  # special tokens were seen, in whatever batch
        self.recomputed: dict[int, Tensor | None] = {}  # ids, by the address of the activations that a block was given

    def __reduce__(self) -> Any:
        return Running, (self.tokens,)

    def begin(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Note the ids of a batch, and return them with a token of the vocabulary in the place of special ones.

        Raises AdapterError when none is special and none ever was: the model would run as if it had no adapter.
        """
        if vocabulary != self.tokens.first:
            raise AdapterError(
                f"the vocabulary has {vocabulary} tokens; it had {self.tokens.first} when the adapter with the special "
                "tokens was put on the model, and their numbers follow on its last"
            )
        special = ids >= self.tokens.first
        found = ids.is_meta or bool(special.any())
        if not found and not self.seen:
            raise AdapterError(
                f"the input has none of the {len(self.tokens)} special tokens of the active adapter, which would "
                "change nothing: put them around each prompt with lorank.special_tokens(model)"
            )
        self.seen = self.seen or not ids.is_meta
        self.ids = ids if found else None
        return ids.masked_fill(special, 0)

    def at_block(self, hidden: Tensor, checkpointed: bool) -> Tensor | None:
        """Return the ids for activations (batch, length, width) that a block is given; None without special tokens.

        checkpointed: the block is run again in the backward pass, when other batches may have run in the meantime.
        """
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            if checkpointed:
                self.recomputed[hidden.data_ptr()] = self.ids
            return self.ids
        if hidden.data_ptr() not in self.recomputed:
            raise AdapterError(
                "a block is run again in the backward pass, and the prefix cannot tell for which batch; turn gradient "
                "checkpointing on by the model's own gradient_checkpointing_enable()"
            )
        return self.recomputed[hidden.data_ptr()]

    def put(self, rows: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        """Return y (batch, length, width) with the special tokens' rows (number, width) in their places."""
        number = ids - self.tokens.first
        return torch.where((number >= 0)[..., None], F.embedding(number.clamp_min(0), rows.to(y.dtype)), y)
