"""Sequence classification and regression: one label, or one number, for one or two texts."""

import re
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Example, Text
from ..errors import AdapterError, did_you_mean, enumerate_names
from ..evaluation import classification_scores, regression_scores
from .base import Task, Tensors

_MOST_LABELS = 200  # more different ones are a sign of the wrong column


class _Sequence(Task):
    """One or two texts in, one vector of outputs out."""

    def __init__(self, tokenizer: Any, max_length: int, text: Text, text_pair: Text | None, label: str) -> None:
        super().__init__(tokenizer, max_length)
        self.text, self.text_pair, self.label = text, text_pair, label

    def columns(self) -> dict[str, str]:
        pair = dict.fromkeys(self.text_pair.columns, "text_pair") if self.text_pair else {}
        return {**dict.fromkeys(self.text.columns, "text"), **pair, self.label: "label"}

    def encode(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        labels = [self.target(record[self.label]) for record in records]
        encoded = self.encode_texts(records)
        return [Example(e.ids, label, e.types) for e, label in zip(encoded, labels, strict=True)]

    def encode_texts(self, records: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Return the texts alone as tokens; the label of each example is 0."""
        texts = [[self.text.of(record) for record in records]]
        if self.text_pair is not None:
            texts.append([self.text_pair.of(record) for record in records])
        encoded = self.tokenizer(*texts, verbose=False)
        types = encoded.get("token_type_ids")
        return [
            Example(array("i", ids), 0, array("i", types[i]) if types is not None else None)
            for i, ids in enumerate(encoded["input_ids"])
        ]

    def prompt_of(self, example: Example) -> tuple[int, int]:
        """Return the place of the text: behind the sign that encoders put in front, before the last token.

        What is read of a model is the first token, or the last one; these stay where they are.
        """
        signs = (getattr(self.tokenizer, "cls_token_id", None), getattr(self.tokenizer, "bos_token_id", None))
        begin = 1 if len(example.ids) > 1 and example.ids[0] in signs else 0
        return begin, max(begin, len(example.ids) - 1)

    def _shortened(self, example: Example, length: int) -> Example:
        """Cut the text, or the longer one of a pair, at its end; the tokenizer's own signs stay."""
        last = len(example.ids) - 1
        keep = [*range(length - 1), last]
        seps = [i for i, token in enumerate(example.ids) if token == getattr(self.tokenizer, "sep_token_id", None)]
        if self.text_pair is not None and len(seps) > 1:
            middle = [i for i in seps if i < last and i - seps[0] < 2]  # one sign, or two, as RoBERTa has
            first, second = seps[0], last - middle[-1] - 1  # tokens of each, with the sign in front of the first
            room = length - len(middle) - 1
            of_second = min(second, max(room - first, room // 2))
            of_first = min(first, room - of_second)
            begin = middle[-1] + 1
            keep = [*range(of_first), *middle, *range(begin, begin + of_second), last]
        ids = array("i", (example.ids[i] for i in keep))
        types = None if example.types is None else array("i", (example.types[i] for i in keep))
        return Example(ids, example.labels, types)

    @abstractmethod
    def target(self, value: Any) -> float:
        """Return a record's label as a number; raises AdapterError for one that is none."""

    def outputs(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Return the model's outputs (records, labels) in float32."""
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()

    def about(self) -> dict[str, Any]:
        pair = {"text_pair": self.text_pair.form} if self.text_pair else {}
        return {"task": self.kind, "text": self.text.form, **pair, "label": self.label}


class Classification(_Sequence):
    """One of several labels."""

    kind = "classification"
    scores: ClassVar = {"loss": False, "accuracy": True, "f1": True, "matthews": True}
    best = "accuracy"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        text: Text,
        text_pair: Text | None,
        label: str,
        *,
        labels: Sequence[str],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, max_length, text, text_pair, label)
        self.labels, self.label_smoothing = list(labels), label_smoothing
        self._numbers = {name: i for i, name in enumerate(self.labels)}

    def target(self, value: Any) -> int:
        try:
            return self._numbers[str(value)]
        except KeyError:
            near = did_you_mean(str(value), self.labels, "the labels are")
            raise AdapterError(f"the label {value!r} is not one of the {len(self.labels)} known; {near}") from None

    def _batch(self, examples: Sequence[Example]) -> Tensors:
        labels = torch.tensor([example.labels for example in examples], dtype=torch.long, device="cpu")
        return super()._batch(examples) | {"labels": labels}

    def loss(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, int]:
        labels = batch["labels"]
        smoothing = self.label_smoothing
        return F.cross_entropy(self.outputs(model, batch), labels, reduction="sum", label_smoothing=smoothing), len(
            labels
        )

    def measure(self, model: nn.Module, batches: Iterable[Tensors]) -> dict[str, float]:
        total = 0.0
        labels: list[int] = []
        predicted: list[int] = []
        for batch in batches:
            outputs = self.outputs(model, batch)
            total += float(F.cross_entropy(outputs, batch["labels"], reduction="sum"))
            labels += batch["labels"].tolist()
            predicted += outputs.argmax(dim=-1).tolist()
        return {"loss": total / len(labels), **classification_scores(labels, predicted, len(self.labels))}

    def about(self) -> dict[str, Any]:
        return {**super().about(), "labels": self.labels}


class Regression(_Sequence):
    """A number; the loss is the squared error."""

    kind = "regression"
    scores: ClassVar = {"loss": False, "pearson": True, "spearman": True}
    best = "loss"

    def target(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise AdapterError(f"the label {value!r} is no number") from None
        if number != number or number in (float("inf"), -float("inf")):
            raise AdapterError(f"the label {value!r} is not finite")
        return number

    def _batch(self, examples: Sequence[Example]) -> Tensors:
        labels = torch.tensor([example.labels for example in examples], dtype=torch.float32, device="cpu")
        return super()._batch(examples) | {"labels": labels}

    def loss(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, int]:
        labels = batch["labels"]
        return (self.outputs(model, batch)[:, 0] - labels).square().sum(), len(labels)

    def measure(self, model: nn.Module, batches: Iterable[Tensors]) -> dict[str, float]:
        values: list[float] = []
        predicted: list[float] = []
        for batch in batches:
            values += batch["labels"].tolist()
            predicted += self.outputs(model, batch)[:, 0].tolist()
        loss = sum((a - b) ** 2 for a, b in zip(values, predicted, strict=True)) / len(values)
        return {"loss": loss, **regression_scores(values, predicted)}


def label_names(values: Iterable[Any], column: str) -> list[str]:
    """Return the different labels of a column in a fixed order: numbers by size, texts by the alphabet."""
    names = set()
    for value in values:
        if isinstance(value, list | dict):
            raise AdapterError(
                f"column '{column}' holds a {type(value).__name__} where one label is needed: {value!r:.80}"
            )
        if value is not None:  # `columns_of` says where
            names.add(str(value))
    if len(names) < 2:
        raise AdapterError(f"column '{column}' has one label, {enumerate_names(names)}: there is nothing to tell apart")
    if len(names) > _MOST_LABELS:
        raise AdapterError(
            f"column '{column}' has {len(names):,} different labels ({enumerate_names(sorted(names), 3)}); for numbers "
            "use task=regression, or name the right column with label="
        )
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)
