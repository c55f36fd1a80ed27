"""Jobs: the runs of a row, a task and a seed each, in folders of their own; which are done, and where one starts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterError, enumerate_names, raise_problems
from ..formats.safetensors_file import write_atomically
from ..runs.finished import best_scores
from ..runs.prepare import prepare
from ..runs.recipe import Recipe
from ..runs.run import RECIPE, Run, stored_recipe
from .row import Row
from .task import PAPER, Task, Test

SETTINGS = "settings.json"  # the recipes with which the runs of a folder were begun


@dataclass(frozen=True)
class Wanted:
    """What of a row is to be done, and how it differs from the row's file."""

    tasks: tuple[str, ...] = ()  # all of them without a name
    seeds: int | None = None  # how many; as many as the row says
    hyperparameters: str = PAPER
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    test_data: str | None = None
    output: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run."""

    task: Task
    seed: int
    recipe: Recipe  # but for the adapter that it starts from, where that is another job's
    test: Test | None
    start_from: str | None  # the task whose best run it starts from
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.task.name}, seed {self.seed}"

    @property
    def begun(self) -> bool:
        return (self.folder / RECIPE).is_file()

    @property
    def best(self) -> dict[str, float] | None:
        """The scores of the adapter that its run has kept; None before the run is finished."""
        return best_scores(self.folder)


def jobs_of(row: Row, wanted: Wanted) -> list[Job]:
    """Return the jobs, those from which others start first. Raises AdapterError for what cannot be meant."""
    tasks = row.chosen(wanted.tasks)
    paths = {"--data": wanted.data, "--eval-data": wanted.eval_data, "--test-data": wanted.test_data}
    given = [name for name, path in paths.items() if path is not None]
    if given and len(tasks) > 1:
        names = ", ".join(task.name for task in tasks)
        raise AdapterError(f"{given[0]} is the data of one task, and there are {names}; choose one with --task")
    kept = [key for key in ("seed", "output") if key in wanted.overrides]
    if kept:
        raise AdapterError(f"{kept[0]} is different for every run; --seeds and --output say which")
    replaced = {"model": wanted.model, "data": wanted.data, "eval_data": wanted.eval_data}
    changes = {key: value for key, value in replaced.items() if value is not None}
    output, found = output_of(row, wanted), []
    for task in tasks:
        for seed in range(wanted.seeds or row.seeds):
            folder = output / task.name / f"seed-{seed}"
            own = {"seed": seed, "output": str(folder)}
            recipe = row.recipe(task, wanted.hyperparameters, changes, wanted.overrides, own)
            start = None if "init_adapter" in wanted.overrides else task.start_from
            found.append(Job(task, seed, recipe, _test_of(task, wanted), start, folder))
    return found


def output_of(row: Row, wanted: Wanted) -> Path:
    """Return the folder of a row's runs."""
    name = f"{row.path.parent.name}-{row.path.stem}"
    return Path(wanted.output or f"runs/paper/{name}-{wanted.hyperparameters}").expanduser()


def require_trainable(row: Row, wanted: Wanted, jobs: Sequence[Job]) -> None:
    """Raise AdapterError, with every problem, unless these jobs can be begun."""
    problems = []
    if row.weights != "public" and wanted.model is None:
        model = jobs[0].recipe.model
        problems.append(f"the weights of {model} are not public; --model names another base, --dry-run counts this one")
    chosen = {job.task.name for job in jobs}
    for init in dict.fromkeys(job.start_from for job in jobs if job.start_from is not None and job.best is None):
        if init not in chosen and best_run(jobs[0].folder.parents[1] / init) is None:
            starting = dict.fromkeys(job.task.name for job in jobs if job.start_from == init)
            problems.append(
                f"{enumerate_names(starting)} starts from the best run of {init}, of which there is none yet: add "
                f"--task {init}, or give init_adapter=FOLDER, or init_adapter=none to start from nothing"
            )
    raise_problems("cannot reproduce this row", problems)


def remember(jobs: Sequence[Job], output: Path) -> None:
    """Write down the recipes of the jobs; raises AdapterError where a folder has runs of other ones."""
    path = output / SETTINGS
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {
        f"{job.task.name}/seed-{job.seed}": dataclasses.asdict(job.recipe) | {"start_from": job.start_from}
        for job in jobs
    }
    problems = []
    for job, (name, recipe) in zip(jobs, now.items(), strict=True):
        other = before.get(name)
        if other is None or not job.begun:
            continue
        keys = [key for key in recipe if key != "output" and recipe[key] != other.get(key)]
        problems += [f"{name}: {key} was {other.get(key)!r}, and is {recipe[key]!r} now" for key in keys]
    raise_problems(f"{output} has runs that were begun otherwise; --output names another folder", problems)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically({path: (json.dumps(before | now, indent=2) + "\n").encode()})


def begin(job: Job) -> Run:
    """Return the run of a job that is not finished: a new one, or what is left of one that was stopped."""
    if job.begun:
        return Run(prepare(stored_recipe(str(job.folder))), resume=True)
    recipe = job.recipe
    if job.start_from is not None:
        start = best_run(job.folder.parents[1] / job.start_from)
        if start is None:
            raise AdapterError(f"{job.name} starts from a run of {job.start_from}, and there is none that is finished")
        recipe = dataclasses.replace(recipe, init_adapter=str(start))
    return Run(prepare(recipe))


def best_run(folder: Path) -> Path | None:
    """Return the finished run with the best score among those in a task's folder; None where there is none."""
    scored: list[tuple[float, Path]] = []
    for run in sorted(folder.glob("seed-*")):
        best, chosen_by = best_scores(run), stored_recipe(str(run)).best if (run / RECIPE).is_file() else None
        if best and chosen_by in best:
            score = best[chosen_by]
            scored.append((-score if chosen_by in ("loss", "perplexity") else score, run))
    return max(scored, key=lambda one: one[0])[1] if scored else None


def _test_of(task: Task, wanted: Wanted) -> Test | None:
    test = task.test[wanted.hyperparameters]
    path = wanted.test_data or wanted.eval_data
    return test if test is None or path is None else dataclasses.replace(test, data=path)
