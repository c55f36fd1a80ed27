"""What `lorank generate` does for one record: text of a language model, or the label of a classifier."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import open_source, rendering_of
from ..data.rendering import PlainText, Rendering, Text, Turn
from ..errors import AdapterError, raise_problems
from ..evaluation import Decoding, complete, stream
from ..runs.loading import Loaded, require_trained_base
from ..surgery import activate
from ..tasks.base import evaluating, to_device
from ..tasks.sequence import Classification, Regression

_PROMPT = "prompt"  # the column that stands for a prompt when nothing says what the columns are


class Answering:
    """The base and the adapters of a command, and how records are put to them."""

    def __init__(
        self, loaded: Loaded, *, with_base: bool, raw: bool, chat: bool, system: str | None, decoding: Mapping[str, Any]
    ):
        self.loaded, self.decoding = loaded, Decoding(**decoding)
        self.names: list[str | None] = [*([None] if with_base or not loaded.adapters else []), *loaded.adapters]
        if None in self.names:
            require_trained_base(loaded)
        self.rendering: Rendering | None = None
        self.task: Classification | Regression | None = None
        about, tokenizer = loaded.about, loaded.base.tokenizer
        if about["task"] == "causal-lm":
            if chat:
                self.rendering = Turn(tokenizer, Text(_PROMPT), Text("completion"), system)
            elif raw or not any(about.get(key) for key in ("prompt", "messages", "text")):
                self.rendering = PlainText(Text(_PROMPT))
            else:
                self.rendering = rendering_of(about, tokenizer)
        else:
            self.task = _predictor(loaded)

    @property
    def columns(self) -> list[str]:
        """The columns that a record needs."""
        if self.task is not None:
            return [column for column, purpose in self.task.columns().items() if purpose != "label"]
        assert self.rendering is not None
        return [column for column, purpose in self.rendering.columns().items() if purpose != "completion"]

    def record(self, prompt: str) -> dict[str, Any]:
        """Return a typed prompt as a record: the value of the only column, or JSON with all of them."""
        columns = self.columns
        if self.loaded.about.get("messages") and columns == [self.loaded.about["messages"]]:
            return {columns[0]: [{"role": "user", "content": prompt}]}
        if len(columns) == 1:
            return {columns[0]: prompt}
        try:
            found = json.loads(prompt)
        except ValueError:
            found = None
        if not isinstance(found, dict) or set(columns) - found.keys():
            example = json.dumps(dict.fromkeys(columns, "..."))
            raise AdapterError(f"a prompt for this adapter has {len(columns)} columns; give them as JSON: '{example}'")
        return found

    def records(self, file: str, limit: int | None) -> list[dict[str, Any]]:
        """Return the records of a file; a line of a text file is a prompt."""
        path = Path(file)
        if path.suffix == ".txt":
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            return [self.record(line) for line in lines[:limit]]
        return open_source(file, "test", limit).to_list()

    def check(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise AdapterError unless every record has the columns that are needed."""
        if not records:
            raise AdapterError("the file has no prompts")
        missing = [column for column in self.columns if column not in records[0]]
        raise_problems(
            "cannot use the file",
            [f"there is no column '{column}' (there are {', '.join(records[0])})" for column in missing],
        )
        for number, record in enumerate(records, start=1):
            try:
                self._prompt(record)
            except AdapterError as error:
                raise AdapterError(f"cannot use record {number}: {error}") from None

    def all_at_once(self, records: Sequence[Mapping[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        """Return the answers to each record, {adapter: answer}."""
        answers: list[dict[str, Any]] = [{} for _ in records]
        for name in self.names:
            self._switch(name)
            for i, answer in self._answers(records, batch_size):
                answers[i][name or "(base)"] = answer
        return answers

    def one(self, name: str | None, record: Mapping[str, Any], show: Callable[[str], Any]) -> None:
        """Show the answer to one record as it comes."""
        self._switch(name)
        if self.task is not None:
            ((_, answer),) = self._answers([record], 1)
            show(_readable(answer))
            return
        assert self.rendering is not None
        model, tokenizer = self.loaded.model, self.loaded.base.tokenizer
        special = self.rendering.special_tokens
        stream(model, tokenizer, self._prompt(record), self.decoding, show, special_tokens=special)

    def _switch(self, name: str | None) -> None:
        activate(self.loaded.model, *([name] if name else []))

    def _prompt(self, record: Mapping[str, Any]) -> str:
        if self.rendering is not None:
            return self.rendering.prompt(record)
        assert self.task is not None
        self.task.encode_texts([record])
        return ""

    def _answers(self, records: Sequence[Mapping[str, Any]], batch_size: int) -> list[tuple[int, Any]]:
        model, tokenizer = self.loaded.model, self.loaded.base.tokenizer
        if self.rendering is not None:
            prompts = [self.rendering.prompt(record) for record in records]
            special = self.rendering.special_tokens
            return list(
                complete(model, tokenizer, prompts, self.decoding, special_tokens=special, batch_size=batch_size)
            )
        assert self.task is not None
        found: list[tuple[int, Any]] = []
        for begin in range(0, len(records), batch_size):
            examples, _ = self.task.cut(self.task.encode_texts(records[begin : begin + batch_size]))
            with evaluating(model):
                outputs = self.task.outputs(model, to_device(self.task.collate(examples), model.device))
            found += [(begin + i, self._prediction(row)) for i, row in enumerate(outputs.cpu())]
        return found

    def _prediction(self, row: torch.Tensor) -> Any:
        if isinstance(self.task, Classification):
            best = int(row.argmax())
            shares = row.softmax(dim=-1).tolist()
            return {
                "label": self.task.labels[best],
                "probability": round(shares[best], 4),
                "probabilities": {name: round(share, 4) for name, share in zip(self.task.labels, shares, strict=True)},
            }
        return round(float(row[0]), 6)


def _readable(answer: Any) -> str:
    return f"{answer['label']}  ({answer['probability']:.1%})" if isinstance(answer, dict) else f"{answer:g}"


def _predictor(loaded: Loaded) -> Classification | Regression:
    about = loaded.about
    pair = Text(about["text_pair"]) if about.get("text_pair") else None
    length = about.get("max_length") or 512
    parts = (loaded.base.tokenizer, length, Text(about.get("text") or "text"), pair, about.get("label") or "label")
    if about["task"] == "regression":
        return Regression(*parts)
    known = loaded.model.config.id2label
    return Classification(*parts, labels=about.get("labels") or [known[i] for i in range(len(known))])
