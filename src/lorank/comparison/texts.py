"""What the trained language models of a comparison write, and how good that is."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..data import open_source, rendering_of
from ..evaluation import Decoding, require_room
from ..formats.safetensors_file import write_atomically
from ..models import configuration, load_tokenizer, longest
from ..runs.finished import load_result
from ..runs.method import special_tokens_around
from ..runs.recipe import Recipe
from ..tasks import CausalLM
from ..tasks.base import evaluating
from ..tasks.writing import Output, Question, questions, score, write
from .trials import Trial

SCORES, OUTPUTS = "scores.json", "outputs.jsonl"


@dataclass(frozen=True)
class Texts:
    """What is to be written and by which metrics it is scored."""

    data: str
    limit: int | None
    metrics: tuple[str, ...]
    decoding: Decoding
    split: str


def require_questions(texts: Texts, recipes: Iterable[Recipe]) -> None:
    """Raise AdapterError unless models that recipes train could write all texts; done before anything is trained."""
    for recipe in recipes:
        tokenizer = load_tokenizer(recipe.model)
        task = _task(recipe, tokenizer)
        require_room(
            tokenizer,
            [question.prompt for question in _questions(texts, task, recipe)],
            texts.decoding,
            longest(configuration(recipe.model), tokenizer),
            special_tokens=task.rendering.special_tokens,
            around=special_tokens_around(recipe),
        )


def scores_of(trial: Trial, texts: Texts, progress: Callable[[int, int], None]) -> dict[str, float]:
    """Return the scores of what a finished trial's model writes, which is kept in its folder with the references."""
    path, asked = trial.folder / SCORES, json.loads(json.dumps(dataclasses.asdict(texts)))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["of"] == asked:
            return before["scores"]
    outputs = _written(trial, texts, progress)
    lines = [
        {"prompt": one.question.prompt, "output": one.text, "references": list(one.question.references)}
        for one in outputs
    ]
    kept = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically({trial.folder / OUTPUTS: kept.encode()})
    found = score(outputs, texts.metrics)
    write_atomically({path: (json.dumps({"of": asked, "scores": found}, indent=2) + "\n").encode()})
    return found


def _written(trial: Trial, texts: Texts, progress: Callable[[int, int], None]) -> list[Output]:
    recipe = trial.recipe
    loaded = load_result(recipe, trial.folder)
    task = _task(recipe, loaded.base.tokenizer)
    asked = _questions(texts, task, recipe)
    found: dict[int, Output] = {}
    with evaluating(loaded.model):
        for number, output in write(loaded.model, task, asked, texts.decoding, batch_size=recipe.batch_size):
            found[number] = output
            progress(len(found), len(asked))
    return [found[number] for number in range(len(asked))]


def _questions(texts: Texts, task: CausalLM, recipe: Recipe) -> list[Question]:
    return questions(task, open_source(texts.data, texts.split, texts.limit, recipe.reader))


def _task(recipe: Recipe, tokenizer: Any) -> CausalLM:
    return CausalLM(tokenizer, recipe.max_length or 1024, rendering_of(dataclasses.asdict(recipe), tokenizer))
