"""Task: the interface between data and model."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..baselines import SpecialTokens
from ..data import IGNORED, Example, columns_of, padding_id
from ..errors import AdapterError

Tensors = dict[str, Tensor]
_CHUNK = 1000  # records that are encoded together


class Task(ABC):
    """What a model is trained for."""

    kind: ClassVar[str]  # the name on the command line and in files
    scores: ClassVar[dict[str, bool]]  # the names of all that `measure` returns, and whether more of it is better
    best: ClassVar[str]  # the one by which adapters are compared, unless another is asked for

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.special: SpecialTokens | None = None  # around every prompt, of an adapter with a prefix

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Return the columns that are needed, with what each is for."""

    @abstractmethod
    def encode(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Return records as tokens and labels, not cut to `max_length` yet."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, int]:
        """Return the summed loss of a batch and over how many tokens or records it is the sum."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: Iterable[Tensors]) -> dict[str, float]:
        """Return the scores over held-out batches; the model is in eval mode, without gradients."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return what has to be kept with an adapter to use it: task, columns, names of labels."""

    def examples(self, records: Any) -> list[Example]:
        """Return a `datasets.Dataset` encoded; raises AdapterError for missing columns and unusable records."""
        columns_of(records, self.columns())
        examples: list[Example] = []
        for begin in range(0, len(records), _CHUNK):
            chunk = records.select(range(begin, min(begin + _CHUNK, len(records)))).to_list()
            try:
                examples += self.encode(chunk)
            except AdapterError as error:
                raise AdapterError(f"cannot use record {_first_bad(self, chunk, begin)}: {error}") from None
        return examples

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Return what looks doubtful about encoded examples."""
        return []

    def cut(self, examples: Sequence[Example]) -> tuple[list[Example], list[str]]:
        """Return the examples cut to `max_length`, without those that have nothing to train on, and remarks."""
        remarks = []
        useful = [example for example in examples if _has_label(example)]
        empty = len(examples) - len(useful)
        if empty:
            remarks.append(f"{empty:,} of {len(examples):,} examples have no token to train on and were left out")
        long = [example for example in useful if len(example.ids) > self.max_length]
        if long:
            cut = [
                example if len(example.ids) <= self.max_length else self._shortened(example, self.max_length)
                for example in useful
            ]
            useful = [example for example in cut if _has_label(example)]
            remark = (
                f"{len(long):,} of {len(examples):,} examples are longer than {self.max_length} tokens and were cut"
            )
            lost = len(cut) - len(useful)
            if lost:
                remark += f"; {lost:,} of them have no trained token left and were left out"
            longest = max(len(example.ids) for example in long)
            remarks.append(f"{remark} (the longest has {longest:,}; max_length sets the limit)")
        return useful, remarks

    def _shortened(self, example: Example, length: int) -> Example:
        labels = example.labels[:length] if isinstance(example.labels, array) else example.labels
        types = None if example.types is None else example.types[:length]
        return Example(example.ids[:length], labels, types)

    @abstractmethod
    def prompt_of(self, example: Example) -> tuple[int, int]:
        """Return between which places the prompt lies that special tokens are put around.

        Raises AdapterError for an example that has no one prompt.
        """

    def surround(self, special: SpecialTokens | None, examples: Sequence[Example]) -> None:
        """Have `collate` put special tokens around the prompts; raises AdapterError for examples where it cannot."""
        self.special = special
        if special is not None:
            for example in examples:
                self.prompt_of(example)

    def collate(self, examples: Sequence[Example]) -> Tensors:
        """Return examples as one batch, padded on the right to the longest of them."""
        special = self.special
        return self._batch(examples if special is None else [self._surrounded(e, special) for e in examples])

    def _surrounded(self, example: Example, special: SpecialTokens) -> Example:
        begin, end = self.prompt_of(example)
        labels, types = example.labels, example.types
        if isinstance(labels, array):
            labels = special.around(labels, begin, end, (IGNORED, IGNORED))
        if types is not None:  # as their neighbours have it
            types = special.around(types, begin, end, (types[begin], types[end - 1]))
        return Example(special.around(example.ids, begin, end), labels, types)

    def _batch(self, examples: Sequence[Example]) -> Tensors:
        width = max(len(example.ids) for example in examples)
        batch = {
            "input_ids": _padded([example.ids for example in examples], width, padding_id(self.tokenizer)),
            "attention_mask": _padded([array("i", [1]) * len(example.ids) for example in examples], width, 0),
        }
        types = [example.types for example in examples if example.types is not None]
        if types:
            batch["token_type_ids"] = _padded(types, width, 0)
        return batch


def _padded(rows: Sequence[array], width: int, filler: int) -> Tensor:
    made = torch.full((len(rows), width), filler, dtype=torch.long, device="cpu")
    for row, target in zip(rows, made, strict=True):
        target[: len(row)] = torch.frombuffer(row, dtype=torch.int32) if len(row) else 0
    return made


def _has_label(example: Example) -> bool:
    return not isinstance(example.labels, array) or any(label >= 0 for label in example.labels[1:])


def _first_bad(task: Task, chunk: list[dict[str, Any]], begin: int) -> str:
    """Return the number of the first record that cannot be encoded, from 1."""
    for i, record in enumerate(chunk):
        try:
            task.encode([record])
        except AdapterError:
            return f"{begin + i + 1:,}"
    return f"in {begin + 1:,} to {begin + len(chunk):,}"


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """Return a batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode and without gradients; afterwards each module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
