"""From a record to text: which columns make it, and which part of it is trained on."""

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError


@dataclass(frozen=True)
class Segment:
    """A stretch of text, trained on or only read."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Text:
    """A text made from a record: a column, or a template with columns in braces, "Question: {q}\\nAnswer:"."""

    form: str

    @property
    def columns(self) -> list[str]:
        if "{" not in self.form:
            return [self.form]
        try:
            return [name for _, name, _, _ in string.Formatter().parse(self.form) if name is not None]
        except ValueError as error:
            raise AdapterError(
                f"the template {self.form!r} cannot be read: {error}; double a brace to mean it"
            ) from None

    def of(self, record: Mapping[str, Any]) -> str:
        """Return the text; raises AdapterError for a value that is no text and no number."""
        values = {}
        for column in self.columns:
            value = record[column]
            if not isinstance(value, str | int | float):
                raise AdapterError(
                    f"column '{column}' holds a {type(value).__name__} where text is needed: {value!r:.80}"
                )
            values[column] = str(value)
        if "{" not in self.form:
            return values[self.form]
        try:
            return self.form.format_map(values)
        except (ValueError, LookupError, AttributeError) as error:
            raise AdapterError(f"the template {self.form!r} cannot be filled with texts: {error}") from None


class Rendering(ABC):
    """How a record becomes a sequence of segments for a causal language model."""

    rewrites: bool = False  # some answers of a conversation are not what was said at their time, and only read
    special_tokens: bool = True  # the tokenizer adds its own at the beginning, and the end token follows the text

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Return the columns that are needed, with what each is for."""

    @abstractmethod
    def segments(self, record: Mapping[str, Any]) -> list[Segment]:
        """Return the record's whole text."""

    @abstractmethod
    def prompt(self, record: Mapping[str, Any]) -> str:
        """Return the text after which the model is to go on."""

    @abstractmethod
    def reference(self, record: Mapping[str, Any]) -> str:
        """Return the text that the record has after the prompt; raises AdapterError where there is none."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return what `rendering_of` makes the same rendering from."""


@dataclass(frozen=True)
class PlainText(Rendering):
    """The whole of one text, all of it trained on."""

    text: Text

    def columns(self) -> dict[str, str]:
        return dict.fromkeys(self.text.columns, "text")

    def segments(self, record: Mapping[str, Any]) -> list[Segment]:
        return [Segment(self.text.of(record), True)]

    def prompt(self, record: Mapping[str, Any]) -> str:
        return self.text.of(record)

    def reference(self, record: Mapping[str, Any]) -> str:
        raise AdapterError("a text without a prompt holds no answer to compare with: give prompt and completion")

    def about(self) -> dict[str, Any]:
        return {"text": self.text.form}


@dataclass(frozen=True)
class Completion(Rendering):
    """A prompt, and a completion that is trained on."""

    before: Text
    after: Text

    def columns(self) -> dict[str, str]:
        return dict.fromkeys(self.before.columns, "prompt") | dict.fromkeys(self.after.columns, "completion")

    def segments(self, record: Mapping[str, Any]) -> list[Segment]:
        return [Segment(self.before.of(record), False), Segment(self.after.of(record), True)]

    def prompt(self, record: Mapping[str, Any]) -> str:
        return self.before.of(record)

    def reference(self, record: Mapping[str, Any]) -> str:
        return self.after.of(record)

    def about(self) -> dict[str, Any]:
        return {"prompt": self.before.form, "completion": self.after.form}


class _Templated(Rendering):
    """Messages through the tokenizer's own chat template."""

    special_tokens = False  # the template writes them

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise AdapterError(
                "the tokenizer has no chat template; use prompt and completion columns, or a tokenizer of a chat model"
            )
        self.tokenizer = tokenizer
        self.rewrites = False  # the template wrote an earlier answer in another way, so that it is only read

    @abstractmethod
    def messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the record's turns."""

    def segments(self, record: Mapping[str, Any]) -> list[Segment]:
        messages = self.messages(record)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise AdapterError("a conversation without a turn of the assistant has nothing to train on")
        whole = self._render(messages, record)
        segments: list[Segment] = []
        done = 0
        for i in answers:
            before = self._render(messages[:i], record, add_generation_prompt=True)
            through = self._render(messages[: i + 1], record)
            if not (whole.startswith(before) and whole.startswith(through.rstrip())):
                if i != answers[-1]:
                    self.rewrites = True  # thoughts are dropped, say: not what was said then
                    continue
                raise AdapterError("the chat template writes the last answer in another way than it is asked for")
            # Through the end-of-turn sign, without the line break after it. An empty answer may have no sign.
            end = max(len(before), len(through.rstrip()))
            segments += [Segment(whole[done : len(before)], False), Segment(whole[len(before) : end], True)]
            done = end
        return segments

    def prompt(self, record: Mapping[str, Any]) -> str:
        messages = self.messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._render(messages, record, add_generation_prompt=True)

    def reference(self, record: Mapping[str, Any]) -> str:
        last = self.messages(record)[-1]
        if last["role"] != "assistant" or not isinstance(last["content"], str):
            raise AdapterError("a conversation that does not end with a text of the assistant has none to compare with")
        return last["content"]

    def _render(self, messages: list[dict[str, Any]], record: Mapping[str, Any], **options: Any) -> str:
        import jinja2

        tools = record.get("tools") or None
        if tools is not None and (isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools)):
            raise AdapterError(f"column 'tools' holds no list of descriptions: {tools!r:.80}")
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"the chat template does not take these messages: {error}") from None


class Chat(_Templated):
    """A column of messages, [{"role": ..., "content": ...}]; the assistant's turns are trained on."""

    def __init__(self, tokenizer: Any, column: str) -> None:
        super().__init__(tokenizer)
        self.column = column

    def columns(self) -> dict[str, str]:
        return {self.column: "messages"}

    def messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = record[self.column]
        whole = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
        )
        if isinstance(messages, str) or not whole or not messages:
            raise AdapterError(f"column '{self.column}' holds no list of {{role, content}}: {messages!r:.80}")
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

    def about(self) -> dict[str, Any]:
        return {"messages": self.column}


class Turn(_Templated):
    """A prompt and a completion as a user's turn and the assistant's answer, which is trained on."""

    def __init__(self, tokenizer: Any, before: Text, after: Text, system: str | None) -> None:
        super().__init__(tokenizer)
        self.before, self.after, self.system = before, after, system

    def columns(self) -> dict[str, str]:
        return Completion(self.before, self.after).columns()

    def messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": self.before.of(record)})
        if all(column in record for column in self.after.columns):
            turns.append({"role": "assistant", "content": self.after.of(record)})
        return turns

    def about(self) -> dict[str, Any]:
        return {"prompt": self.before.form, "completion": self.after.form, "chat": True, "system": self.system}


def rendering_of(about: Mapping[str, Any], tokenizer: Any) -> Rendering:
    """Return the rendering for the columns and templates in `about`, as `Rendering.about` gives them."""
    if about.get("messages"):
        return Chat(tokenizer, about["messages"])
    if about.get("prompt") or about.get("completion"):
        missing = [name for name in ("prompt", "completion") if not about.get(name)]
        if missing:
            raise AdapterError(f"a {missing[0]} is missing: prompt and completion go together")
        before, after = Text(about["prompt"]), Text(about["completion"])
        if about.get("chat"):
            return Turn(tokenizer, before, after, about.get("system"))
        return Completion(before, after)
    if about.get("text"):
        return PlainText(Text(about["text"]))
    raise AdapterError("nothing says which columns to use: give messages, prompt and completion, or text")
