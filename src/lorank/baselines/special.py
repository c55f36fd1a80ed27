"""Special tokens around a prompt: their numbers, where they stand in an input, and which batch has them."""

import threading
from array import array
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError

_REMEMBERED = 4096  # activations of checkpointed blocks that await their backward pass


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


class _Batch(threading.local):
    """The batch that runs in a thread."""

    ids: Tensor | None = None  # (batch, length), as the model was given them; None without special tokens
    begun = False  # it went through the embedding, and not through the last block yet
    seen = False  # special tokens were seen, in whatever batch


class Running:
    """Which tokens of the batch that runs are special. One object for all modules of an adapter; no part of a copy."""

    def __init__(self, tokens: SpecialTokens):
        self.tokens = tokens
        self._batch = _Batch()
        self.recomputed: dict[int, Tensor | None] = {}  # ids, by the address of the activations that a block was given

    def __reduce__(self) -> Any:
        return Running, (self.tokens,)

    @property
    def ids(self) -> Tensor | None:
        """The ids of the batch that runs (batch, length); None without special tokens."""
        return self._batch.ids

    def begin(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Note the ids of a batch, and return them with a token of the vocabulary in the place of special ones.

        Raises AdapterError when none is special and none ever was: the model would run as if it had no adapter.
        """
        first, end = self.tokens.first, self.tokens.first + len(self.tokens)
        if vocabulary != first:
            raise AdapterError(
                f"the vocabulary has {vocabulary} tokens; it had {first} when the adapter with the special tokens was "
                "put on the model, and their numbers follow on its last"
            )
        highest = end - 1 if ids.is_meta else int(ids.max())
        if highest >= end:
            raise AdapterError(f"there is no token {highest}: the vocabulary and the special tokens are {end}")
        if highest < first and not self._batch.seen:
            raise AdapterError(
                f"the input has none of the {len(self.tokens)} special tokens of the active adapter, which would "
                "change nothing: put them around each prompt with lorank.special_tokens(model)"
            )
        self._batch.seen = self._batch.seen or not ids.is_meta
        self._batch.begun, self._batch.ids = True, ids if highest >= first else None
        return ids.masked_fill(ids >= first, 0)

    def at_block(self, hidden: Tensor, checkpointed: bool, last: bool) -> Tensor | None:
        """Return the ids for activations (batch, length, width) that a block is given; None without special tokens.

        checkpointed: the block is run again in the backward pass, when other batches may have run in the meantime.
        last: it is the last block, behind which the batch is done.
        """
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            if hidden.data_ptr() not in self.recomputed:
                raise AdapterError(
                    "a block is run again in the backward pass, and the prefix cannot tell for which batch; turn "
                    "gradient checkpointing on by the model's own gradient_checkpointing_enable()"
                )
            return self.recomputed[hidden.data_ptr()]
        self._require_ids()
        if checkpointed:
            self.recomputed[hidden.data_ptr()] = self.ids
            if len(self.recomputed) > _REMEMBERED:
                del self.recomputed[next(iter(self.recomputed))]
        self._batch.begun = not last
        return self.ids

    def at_first_block(self) -> None:
        """Raise AdapterError when a batch has come to the blocks without having been through the embedding."""
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass, which runs a checkpointed block again
            self._require_ids()
            self._batch.begun = False

    def _require_ids(self) -> None:
        if not self._batch.begun:
            raise AdapterError(
                "the model was given embeddings (inputs_embeds), in which special tokens cannot be told; give input_ids"
            )

    def put(self, rows: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        """Return y (batch, length, width) with the special tokens' rows (number, width) in their places."""
        number = ids - self.tokens.first
        return torch.where((number >= 0)[..., None], F.embedding(number.clamp_min(0), rows.to(y.dtype)), y)
