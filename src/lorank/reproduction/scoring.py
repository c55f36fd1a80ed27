"""The scores of a finished job, on the scale on which the paper prints them."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..data import open_source, rendering_of
from ..data.rendering import Rendering
from ..errors import AdapterError
from ..evaluation import Decoding, complete, require_metrics, require_room, text_scores
from ..formats.safetensors_file import write_atomically
from ..models import configuration, load_tokenizer, longest
from ..runs.finished import load_result
from ..runs.loading import Loaded
from ..runs.method import special_tokens_around
from ..tasks.base import evaluating
from .jobs import Job
from .task import Test

SCORES, OUTPUTS = "scores.json", "outputs.jsonl"
# Scores that the paper prints as they are; the others are shares, and printed in percent.
_AS_THEY_ARE = ("nist", "cider", "meteor-webnlg", "ter-webnlg")
Progress = Callable[[int, int], Any]  # texts that are written, and all


def score(job: Job, progress: Progress | None = None) -> dict[str, float]:
    """Return a finished job's scores by metric, or "metric group", as the paper prints them.

    Those of classifiers were measured in training; for a language model the texts are written now, unless they were
    already, and stay in the run's folder with their references.
    """
    best = job.best
    if best is None:
        raise AdapterError(f"{job.name} is not finished")
    if job.test is None:
        return {metric: printed(metric, best[metric]) for metric in job.task.metrics}
    path = job.folder / SCORES
    of = json.loads(json.dumps({"test": dataclasses.asdict(job.test), "metrics": list(job.task.metrics)}))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("of") != of:  # of another test set, or written in another way
        found = _score_texts(job, job.test, progress)
        before = {"of": of, "scores": found}
        write_atomically({path: (json.dumps(before, indent=2) + "\n").encode()})
    return before["scores"]


def printed(metric: str, value: float) -> float:
    """Return a score on the paper's scale."""
    return value if metric in _AS_THEY_ARE else 100 * value


def require_scorers(jobs: Iterable[Job]) -> None:
    """Raise AdapterError unless the texts of jobs could be written and scored once these are trained."""
    for job in {job.task.name: job for job in jobs}.values():
        if job.test is None:
            continue
        try:
            decoding = Decoding(**job.test.decoding)
        except TypeError as error:
            raise AdapterError(f"{job.task.name}: test: decoding: {error}") from None
        require_metrics(list(job.task.metrics))
        tokenizer = load_tokenizer(job.recipe.model)
        most = longest(configuration(job.recipe.model), tokenizer)
        around = special_tokens_around(job.recipe)
        rendering = _rendering(job, tokenizer)
        require_room(
            tokenizer,
            list(asked(job, job.test, rendering)),
            decoding,
            most,
            special_tokens=rendering.special_tokens,
            around=around,
        )


def _score_texts(job: Job, test: Test, progress: Progress | None) -> dict[str, float]:
    """Write a text for every prompt of the test data, and score them against all texts that it has there."""
    loaded = load_result(job.recipe, job.folder)
    rendering = _rendering(job, loaded.base.tokenizer)
    questions = asked(job, test, rendering)
    prompts = list(questions)
    texts = _written(loaded, job, test, prompts, rendering.special_tokens, progress)
    lines = [
        {"prompt": prompt, "output": text, **{key: questions[prompt][key] for key in ("references", "group")}}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    kept = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically({job.folder / OUTPUTS: kept.encode()})
    groups = sorted({line["group"] for line in lines}) if test.groups else []
    found: dict[str, float] = {}
    for group in [*groups, "all"] if test.groups else [""]:
        chosen = [line for line in lines if group in ("", "all", line["group"])]
        outputs, references = ([line[key] for line in chosen] for key in ("output", "references"))
        scores = text_scores(outputs, references, list(job.task.metrics))
        found |= {f"{metric} {group}".strip(): printed(metric, value) for metric, value in scores.items()}
    return found


def _rendering(job: Job, tokenizer: Any) -> Rendering:
    return rendering_of(dataclasses.asdict(job.recipe), tokenizer)


def asked(job: Job, test: Test, rendering: Rendering) -> dict[str, dict[str, Any]]:
    """Return the references, and the group, of each prompt of the test data."""
    recipe = job.recipe
    records = open_source(test.data, test.split, test.limit, recipe.reader)
    if test.groups is not None and test.groups not in records.column_names:
        raise AdapterError(f"{test.data} has no column '{test.groups}', by which {job.task.name} is scored in groups")
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        group = str(record[test.groups]) if test.groups else ""
        known = found.setdefault(rendering.prompt(record), {"references": [], "group": group})
        known["references"].append(rendering.reference(record).strip())
    return found


def _written(
    loaded: Loaded, job: Job, test: Test, prompts: Sequence[str], special_tokens: bool, progress: Progress | None
) -> list[str]:
    """Return what the job's model writes for each prompt."""
    model, tokenizer = loaded.model, loaded.base.tokenizer
    decoding = Decoding(**test.decoding)
    texts = [""] * len(prompts)
    with evaluating(model):
        written = complete(
            *(model, tokenizer, prompts, decoding), special_tokens=special_tokens, batch_size=job.recipe.batch_size
        )
        for count, (number, text) in enumerate(written, start=1):
            texts[number] = (text.partition(test.stop)[0] if test.stop else text).strip()
            if progress is not None:
                progress(count, len(prompts))
    return texts
