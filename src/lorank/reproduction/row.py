"""Row: one line of a table of the paper, from its file: recipes for each task, and the scores that were published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError, did_you_mean, raise_problems
from ..runs.recipe import Recipe, read_yaml
from .task import Task, task_of

_REQUIRED = ("table", "row", "source", "data", "parameters", "seeds", "base", "tasks")
_OPTIONAL = ("average", "weights", "repository", "unstated", "notes")


@dataclass(frozen=True)
class Row:
    """One line of a table. What the paper leaves open is in `unstated`, with where the value in the file is from."""

    path: Path
    table: int
    name: str
    source: str
    weights: str  # "public", or "not public"
    parameters: str  # trainable ones, as printed
    seeds: int
    report: str  # median or mean
    average: float | None
    tasks: dict[str, Task]
    unstated: dict[str, str]
    notes: list[str]

    @staticmethod
    def read(path: str | Path) -> "Row":
        """Return the row in a file; raises AdapterError that lists everything that is wrong with it."""
        path = Path(path)
        keys = read_yaml(path)
        if "tasks" not in keys and "model" in keys:
            raise AdapterError(f"{path} is a recipe of one run: lorank train {path}")
        missing = [f"{key} is missing" for key in _REQUIRED if key not in keys]
        known = (*_REQUIRED, *_OPTIONAL)
        missing += [f"there is no key '{key}'; {did_you_mean(key, known)}" for key in keys if key not in known]
        missing += [
            f"{key} holds no keys with values"
            for key in ("parameters", "seeds", "base", "tasks")
            if key in keys and not isinstance(keys[key], Mapping)
        ]
        raise_problems(f"{path} is no row of a table", missing)
        problems: list[str] = []
        shared = read_yaml(path.parent / str(keys["data"]))
        unknown = [name for name in keys["tasks"] if name not in shared]
        problems += [f"{keys['data']} says nothing of {name}; {did_you_mean(name, shared)}" for name in unknown]
        tasks = {name: task_of(name, shared[name], keys, problems) for name in keys["tasks"] if name in shared}
        count, report = keys["seeds"].get("count"), keys["seeds"].get("report")
        if not isinstance(count, int) or count < 1 or report not in ("median", "mean"):
            problems.append("seeds must say a count, and report: median or mean")
        weights = keys.get("weights", "public")
        if weights not in ("public", "not public"):
            problems.append(f"weights is {weights!r}; it must be public or not public")
        elsewhere = (keys.get("repository") or {}).get("tasks") or {}
        problems += [f"repository: there is no task '{name}'" for name in elsewhere if name not in keys["tasks"]]
        problems += [
            f"{task.name}: start_from: there is no task '{task.start_from}'"
            for task in tasks.values()
            if task.start_from is not None and task.start_from not in tasks
        ]
        raise_problems(f"{path} cannot be used", problems)
        return Row(
            path=path,
            table=int(keys["table"]),
            name=str(keys["row"]),
            source=str(keys["source"]),
            weights=weights,
            parameters=str(keys["parameters"]["published"]),
            seeds=count,
            report=str(report),
            average=keys.get("average"),
            tasks=tasks,
            unstated={str(key): str(remark) for key, remark in (keys.get("unstated") or {}).items()},
            notes=[str(note) for note in keys.get("notes") or []],
        )

    def chosen(self, names: Sequence[str]) -> list[Task]:
        """Return the tasks of these names, in the order in which they can be run; all of them without a name."""
        unknown = [name for name in names if name not in self.tasks]
        raise_problems("cannot reproduce", [f"there is no task '{n}'; {did_you_mean(n, self.tasks)}" for n in unknown])
        found = [task for name, task in self.tasks.items() if not names or name in names]
        return sorted(found, key=lambda task: task.start_from is not None)  # after those that they start from

    def recipe(self, task: Task, hyperparameters: str, *overrides: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a task's run under overrides; raises AdapterError that names the task."""
        keys = task.settings(hyperparameters)
        for given in overrides:
            keys = keys | dict(given)
        try:
            return Recipe.of(None, keys)
        except AdapterError as error:
            raise AdapterError(f"{self.path.name}, {task.name}: {error}") from None
