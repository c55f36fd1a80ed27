"""Scores of what a language model writes: an answer for each prompt of the data, against all that the data answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import columns_of
from ..errors import AdapterError
from ..evaluation import Decoding, chosen_metrics, complete, require_metrics, text_scores
from .base import evaluating
from .causal_lm import CausalLM


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and the texts that the data has after it, without blanks around them."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """What a model wrote for a question, without blanks around it."""

    question: Question
    text: str


def questions(task: CausalLM, records: Iterable[Any]) -> list[Question]:
    """Return the different prompts of records, in their order, each with the answers of all records that have it.

    So do data sets such as E2E, WebNLG and DART give several references. records: mappings, or a `datasets.Dataset`.
    Raises AdapterError for records that have no prompt or no answer, and where there is no record.
    """
    if hasattr(records, "column_names"):  # a `datasets.Dataset`: all that is missing, at once
        columns_of(records, task.columns())
    found: dict[str, list[str]] = {}
    for number, record in enumerate(records, start=1):
        try:
            prompt, reference = task.rendering.prompt(record), task.rendering.reference(record)
        except AdapterError as error:
            raise AdapterError(f"cannot use record {number:,}: {error}") from None
        found.setdefault(prompt, []).append(reference.strip())
    if not found:
        raise AdapterError("there is no record to write an answer for")
    return [Question(prompt, tuple(references)) for prompt, references in found.items()]


def write(
    model: Any, task: CausalLM, asked: Sequence[Question], decoding: Decoding, *, batch_size: int = 8
) -> Iterator[tuple[int, Output]]:
    """Yield (number of the question, output), a batch at a time and in any order; the model must be in eval mode."""
    prompts = [question.prompt for question in asked]
    special = task.rendering.special_tokens
    for i, text in complete(model, task.tokenizer, prompts, decoding, special_tokens=special, batch_size=batch_size):
        yield i, Output(asked[i], text.strip())


def score(outputs: Sequence[Output], metrics: str | Iterable[str]) -> dict[str, float]:
    """Return scores of outputs; see `text_scores`."""
    return text_scores([output.text for output in outputs], [output.question.references for output in outputs], metrics)


def generate_and_score(
    model: Any,
    task: CausalLM,
    records: Iterable[Any],
    decoding: Decoding,
    metrics: str | Iterable[str],
    *,
    batch_size: int = 8,
) -> tuple[dict[str, float], list[Output]]:
    """Return scores of what a model writes for records, by name, and the outputs, one for each different prompt.

    The adapters that are active are used. metrics: see `text_scores`; what they need is checked before anything is
    written.
    """
    names = chosen_metrics(metrics)
    require_metrics(names)
    asked = questions(task, records)
    with evaluating(model):
        written = dict(write(model, task, asked, decoding, batch_size=batch_size))
    outputs = [written[i] for i in range(len(asked))]
    return score(outputs, names), outputs
