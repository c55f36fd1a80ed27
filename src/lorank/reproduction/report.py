"""Ours beside the published: the scores of all seeds as the paper reports them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..extras import require
from ..formats.safetensors_file import write_atomically
from ..runs.recipe import Recipe
from ..version import __version__
from .jobs import Job
from .row import Row
from .shapes import trainable_parameters
from .task import PAPER, Published, Task

RESULTS, TABLE = "results.json", "results.md"


@dataclass(frozen=True)
class Line:
    """One score of one task."""

    task: str
    metric: str
    published: Published
    values: tuple[float, ...]  # ours, by seed
    report: str  # median or mean

    @property
    def ours(self) -> float:
        return statistics.median(self.values) if self.report == "median" else statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def shown(self) -> dict[str, str]:
        """Return the cells of a table, with as many digits as the paper prints."""
        digits = self.published.digits
        ours = f"{self.ours:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")
        return {
            "task": self.task,
            "metric": self.metric,
            "published": self.published.text,
            f"ours ({self.report})": ours,
            "difference": f"{self.ours - self.published.value:+.{digits}f}",
            "seeds": str(len(self.values)),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain JSON values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "published": asdict(self.published),
            "ours": self.ours,
            "spread": self.spread,
            "values": list(self.values),
            "report": self.report,
        }


def lines_of(row: Row, tasks: Sequence[Task], scores: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Line]:
    """Return the lines of a table, and the average where the paper prints one and all its tasks are there.

    scores: by task, the scores of each seed.
    """
    lines = [
        Line(task.name, metric, published, tuple(seed[metric] for seed in scores[task.name]), row.report)
        for task in tasks
        for metric, published in task.published.items()
        if all(metric in seed for seed in scores[task.name])  # data of one's own may lack a group
    ]
    if row.average is not None and {task.name for task in tasks} == row.tasks.keys():
        average = Published.of(row.average)
        lines.append(Line("average", "", average, (statistics.mean(line.ours for line in lines),), row.report))
    return lines


def markdown(row: Row, lines: Sequence[Line], about: Sequence[str]) -> str:
    """Return the table as Markdown, under what was done."""
    cells = [line.shown() for line in lines]
    head = list(cells[0])
    rule = [":---" if name in ("task", "metric") else "---:" for name in head]
    rows = [f"| {' | '.join(cell)} |" for cell in (head, rule, *(list(line.values()) for line in cells))]
    return "\n".join([f"# {row.name}, Table {row.table}", "", *(f"- {line}" for line in about), "", *rows, ""])


def write_results(
    row: Row, jobs: Sequence[Job], hyperparameters: str, lines: Sequence[Line], folder: Path
) -> dict[str, Any]:
    """Write results.json and results.md into the folder of the runs, and return what stands in the former."""
    recipe = jobs[0].recipe
    changed = {job.task.name: changes_of(row, job, hyperparameters) for job in jobs}
    facts: dict[str, Any] = {
        "row": row.name,
        "table": row.table,
        "source": row.source,
        "file": str(row.path),
        "hyperparameters": hyperparameters,
        "model": recipe.model,
        "lorank": __version__,
        "parameters": {
            "published": row.parameters,
            "counted": {job.task.name: trainable_parameters(job.recipe, job.task.labels) for job in jobs},
        },
        "changed": changed,
        "runs": [str(job.folder) for job in jobs],
        "results": [line.to_json() for line in lines],
        "unstated": row.unstated,
        "notes": row.notes,
    }
    about = [
        f"base {recipe.model}, hyperparameters: {hyperparameters}, lorank {__version__}",
        f"± behind ours: standard deviation over seeds; {row.report} of {len({job.seed for job in jobs})} seeds",
        *(f"{task}: other than in the row: {_listed(keys)}" for task, keys in changed.items() if keys),
    ]
    facts["about"] = about
    known = [
        *(f"unstated in the paper: {key}: {remark}" for key, remark in row.unstated.items()),
        *row.notes,
    ]
    texts = {
        RESULTS: json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        TABLE: markdown(row, lines, [*about, *known]),
    }
    write_atomically({folder / name: text.encode() for name, text in texts.items()})
    return facts


def changes_of(row: Row, job: Job, hyperparameters: str) -> dict[str, Any]:
    """Return the keys of a job's recipe that were given on the command line and are not the row's."""
    given, own = asdict(job.recipe), asdict(row.recipe(job.task, hyperparameters))
    found = {key: value for key, value in given.items() if key not in ("seed", "output") and value != own[key]}
    test = job.task.test[hyperparameters]
    if job.start_from != job.task.start_from and job.recipe.init_adapter is None:
        found["start"] = f"from nothing, not from {job.task.start_from}"
    return found | ({"test data": job.test.data} if job.test is not None and job.test != test else {})


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in keys.items())


def plan_of(row: Row, job: Job, hyperparameters: str) -> dict[str, Any]:
    """Return what a job would do, without its data: the recipe and the parameters that it trains."""
    defaults = Recipe(model="-", data="-")
    # With lorank's own defaults where they are what the paper states.
    stated = ("task", "batch_size", "accumulate", "schedule", "warmup", "weight_decay", "dropout", "label_smoothing")
    recipe = {
        key: value
        for key, value in asdict(job.recipe).items()
        if (value != getattr(defaults, key) or key in stated) and key not in ("seed", "output")
    }
    yaml = require("yaml", "showing a recipe")
    return {
        "task": job.task.name,
        "recipe": recipe,
        "yaml": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100),
        "start_from": job.start_from,
        "trainable_parameters": trainable_parameters(job.recipe, job.task.labels),
        "published_parameters": row.parameters,
        "counted_in_file": job.task.counted.get(hyperparameters, job.task.counted.get(PAPER)),
        "published": {name: published.text for name, published in job.task.published.items()},
        "test": None if job.test is None else {"metrics": list(job.task.metrics), **asdict(job.test)},
    }
