"""What `lorank generate` does for one record: text of a language model, or the label of a classifier."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import open_source, rendering_of
from ..data.rendering import PlainText, Rendering, Text, Turn
from ..errors import AdapterError, raise_problems
from ..evaluation import Decoding, complete, stream
from ..prefixes import special_tokens
from ..runs.loading import Loaded, require_trained_base
from ..surgery import activate
from ..tasks.base import evaluating, to_device
from ..tasks.sequence import Classification, Regression
from .console import UsageError

Record = Mapping[str, Any]
_PROMPT = "prompt"  # the column that stands for a prompt when nothing says what the columns are


class _Answerer(ABC):
    """How one adapter, or the base, is asked."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.tokenizer = loaded.model, loaded.base.tokenizer

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that a record needs."""

    @abstractmethod
    def check(self, record: Record) -> None:
        """Raise AdapterError for a record that cannot be answered."""

    @abstractmethod
    def answers(self, records: Sequence[Record], batch_size: int) -> Iterator[tuple[int, Any]]:
        """Yield (number of the record, answer), in any order."""

    @abstractmethod
    def show(self, record: Record, show: Callable[[str], Any]) -> None:
        """Show the answer to one record as it comes."""

    def record(self, prompt: str) -> dict[str, Any]:
        """Return a typed prompt as a record: the value of the only column, or JSON with all of them."""
        if len(self.columns) == 1:
            return {self.columns[0]: prompt}
        try:
            found = json.loads(prompt)
        except ValueError:
            found = None
        if not isinstance(found, dict) or set(self.columns) - found.keys():
            example = json.dumps(dict.fromkeys(self.columns, "..."))
            count = len(self.columns)
            raise AdapterError(f"a prompt for this adapter has {count} columns; give them as JSON: '{example}'")
        return found


class _Writer(_Answerer):
    """A language model, which goes on from a prompt."""

    def __init__(self, loaded: Loaded, rendering: Rendering, decoding: Decoding) -> None:
        super().__init__(loaded)
        self.rendering, self.decoding = rendering, decoding

    @property
    def columns(self) -> list[str]:
        return [column for column, purpose in self.rendering.columns().items() if purpose != "completion"]

    def record(self, prompt: str) -> dict[str, Any]:
        if "messages" in self.rendering.about():
            return {self.columns[0]: [{"role": "user", "content": prompt}]}
        return super().record(prompt)

    def check(self, record: Record) -> None:
        self.rendering.prompt(record)

    def answers(self, records: Sequence[Record], batch_size: int) -> Iterator[tuple[int, Any]]:
        prompts = [self.rendering.prompt(record) for record in records]
        special = self.rendering.special_tokens
        yield from complete(
            self.model, self.tokenizer, prompts, self.decoding, special_tokens=special, batch_size=batch_size
        )

    def show(self, record: Record, show: Callable[[str], Any]) -> None:
        prompt, special = self.rendering.prompt(record), self.rendering.special_tokens
        stream(self.model, self.tokenizer, prompt, self.decoding, show, special_tokens=special)


class _Predictor(_Answerer):
    """A classifier or a regression, which names a label or a number."""

    def __init__(self, loaded: Loaded, about: Mapping[str, Any]) -> None:
        super().__init__(loaded)
        pair = Text(about["text_pair"]) if about.get("text_pair") else None
        self.length = about.get("max_length") or 512
        parts = (self.tokenizer, self.length, Text(about.get("text") or "text"), pair, about.get("label") or "label")
        if loaded.about["task"] == "regression":
            self.task: Classification | Regression = Regression(*parts)
        else:
            self.task = Classification(*parts, labels=about.get("labels") or loaded.label_names())

    @property
    def columns(self) -> list[str]:
        return [column for column, purpose in self.task.columns().items() if purpose != "label"]

    def check(self, record: Record) -> None:
        self.task.encode_texts([record])

    def answers(self, records: Sequence[Record], batch_size: int) -> Iterator[tuple[int, Any]]:
        special = special_tokens(self.model)
        self.task.max_length = self.length - len(special or ())
        for begin in range(0, len(records), batch_size):
            examples, _ = self.task.cut(self.task.encode_texts(records[begin : begin + batch_size]))
            self.task.surround(special, examples)
            with evaluating(self.model):
                outputs = self.task.outputs(self.model, to_device(self.task.collate(examples), self.model.device))
            yield from ((begin + i, self._prediction(row)) for i, row in enumerate(outputs.cpu()))

    def show(self, record: Record, show: Callable[[str], Any]) -> None:
        ((_, answer),) = self.answers([record], 1)
        show(f"{answer['label']}  ({answer['probability']:.1%})" if isinstance(answer, dict) else f"{answer:g}")

    def _prediction(self, row: torch.Tensor) -> Any:
        if isinstance(self.task, Regression):
            return round(float(row[0]), 6)
        best = int(row.argmax())
        shares = row.softmax(dim=-1).tolist()
        return {
            "label": self.task.labels[best],
            "probability": round(shares[best], 4),
            "probabilities": {name: round(share, 4) for name, share in zip(self.task.labels, shares, strict=True)},
        }


class Answering:
    """The base and the adapters of a command, each asked in the way in which it was trained.

    The base is asked as the first adapter is. With `chat`, prompts go through the chat template, under `system` or the
    message that the adapter was trained with; with `raw` they are taken as they are.
    """

    def __init__(
        self, loaded: Loaded, *, with_base: bool, raw: bool, chat: bool, system: str | None, decoding: Decoding
    ):
        if (raw or chat or system) and loaded.about["task"] != "causal-lm":
            raise UsageError("--raw, --chat and --system are for language models; this is a " + loaded.about["task"])
        if (raw and chat) or (system and not chat):
            raise UsageError("--raw and --chat exclude each other, and --system goes with --chat")
        self.loaded = loaded
        names: list[str | None] = [*([None] if with_base or not loaded.adapters else []), *loaded.adapters]
        if None in names:
            require_trained_base(loaded)
        self.answerers: dict[str | None, _Answerer] = {}
        for name in names:
            about = loaded.abouts[name] if name is not None else loaded.about
            if loaded.about["task"] != "causal-lm":
                self.answerers[name] = _Predictor(loaded, about)
            else:
                rendering = _rendering(loaded, about, raw, chat, system)
                self.answerers[name] = _Writer(loaded, rendering, decoding)

    @property
    def names(self) -> list[str | None]:
        return list(self.answerers)

    def records(self, file: str, limit: int | None) -> list[Any]:
        """Return the records of a file, checked for all who are asked, or its lines when it is a text file."""
        path = Path(file)
        if path.suffix == ".txt":
            try:
                lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise AdapterError(f"{file} is not UTF-8 text: {error}") from None
            if not lines:
                raise AdapterError(f"{file} has no prompts")
            return lines[:limit]
        records = open_source(file, "test", limit).to_list()
        missing = {column for one in self.answerers.values() for column in one.columns if column not in records[0]}
        raise_problems(
            "cannot use the file",
            [f"there is no column '{column}' (there are {', '.join(records[0])})" for column in sorted(missing)],
        )
        for number, record in enumerate(records, start=1):
            try:
                for answerer in self.answerers.values():
                    answerer.check(record)
            except AdapterError as error:
                raise AdapterError(f"cannot use record {number}: {error}") from None
        return records

    def all_at_once(self, records: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
        """Return the answers to each record, or prompt, {adapter: answer}."""
        answers: list[dict[str, Any]] = [{} for _ in records]
        for name, answerer in self.answerers.items():
            self._switch(name)
            asked = [answerer.record(_text(record)) if isinstance(record, str) else record for record in records]
            for i, answer in answerer.answers(asked, batch_size):
                answers[i][name or "(base)"] = answer
        return answers

    def one(self, name: str | None, prompt: str, show: Callable[[str], Any]) -> None:
        """Show the answer to a typed prompt as it comes."""
        self._switch(name)
        self.answerers[name].show(self.answerers[name].record(_text(prompt)), show)

    def _switch(self, name: str | None) -> None:
        activate(self.loaded.model, *([name] if name else []))


def decoding_of(chosen: Mapping[str, Any]) -> Decoding:
    """Return the decoding that options choose, {name: value}, where None leaves the default."""
    try:
        return Decoding(**{name: value for name, value in chosen.items() if value is not None})
    except AdapterError as error:
        raise UsageError(str(error)) from None


def _text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise AdapterError(f"the prompt {prompt!r} is not UTF-8 text") from None
    return prompt


def _rendering(loaded: Loaded, about: Mapping[str, Any], raw: bool, chat: bool, system: str | None) -> Rendering:
    tokenizer = loaded.base.tokenizer
    own = about.get("prompt") or ""
    column = own if own and "{" not in own else _PROMPT
    if chat:
        return Turn(tokenizer, Text(column), Text("completion"), system or about.get("system"))
    if raw or not any(about.get(key) for key in ("prompt", "messages", "text")):
        return PlainText(Text(column))
    return rendering_of(about, tokenizer)
