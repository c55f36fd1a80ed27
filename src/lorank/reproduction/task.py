"""Task: one task of a row, from what all rows share, what the row says of all its tasks, and what of this one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import did_you_mean
from ..runs.recipe import Recipe

PAPER, REPOSITORY = "paper", "repository"
HYPERPARAMETERS = (PAPER, REPOSITORY)
# What a task has beside the keys of a recipe.
_OWN = ("metrics", "labels", "test", "published", "start_from", "counted")
_PRINTED = re.compile(r"(-?\d*\.?\d+)(?:\s*±\s*(\d*\.?\d+))?")


@dataclass(frozen=True)
class Published:
    """A score as the paper prints it, with what stands behind its ±."""

    text: str
    value: float
    spread: float | None

    @staticmethod
    def of(printed: Any) -> "Published":
        """Return a number, or a text such as "87.5 ± .3"; raises ValueError for another."""
        text = str(printed).strip()
        found = _PRINTED.fullmatch(text)
        if found is None or isinstance(printed, bool):
            raise ValueError(f"{printed!r} is no number, or number ± number")
        return Published(text, float(found[1]), None if found[2] is None else float(found[2]))

    @property
    def digits(self) -> int:
        """How many digits are printed behind the point."""
        return len(self.text.partition("±")[0].strip().partition(".")[2])


@dataclass(frozen=True)
class Test:
    """Data on which texts are written and scored, for tasks whose score is not that of the held-out data."""

    data: str
    split: str = "test"
    limit: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)  # fields of `evaluation.Decoding`
    groups: str | None = None  # a column; its values are scored apart, and all together
    stop: str | None = None  # what a model writes ends in front of this


@dataclass(frozen=True)
class Task:
    """One task of a row."""

    name: str
    keys: dict[str, Any]  # of a recipe, with the paper's values
    repository: dict[str, Any]  # those that differ in the authors' code
    test: dict[str, Test | None]  # by whose hyperparameters
    metrics: tuple[str, ...]
    labels: int  # of a classifier
    published: dict[str, Published]  # by metric; with groups "metric group"
    start_from: str | None  # the task whose adapter it starts from
    counted: dict[str, int]  # trainable parameters by whose hyperparameters

    def settings(self, hyperparameters: str) -> dict[str, Any]:
        """Return the keys of its recipe."""
        return self.keys | (self.repository if hyperparameters == REPOSITORY else {})


def task_of(name: str, common: Mapping[str, Any], row: Mapping[str, Any], problems: list[str]) -> Task:
    """Return a task; what is wrong with it goes into `problems`.

    common: what all rows with this task share. row: the keys of the row's file.
    """
    theirs = _keys(row, "repository")
    in_code = [_keys(common, "repository"), _keys(theirs, "base"), _keys(_keys(theirs, "tasks"), name)]
    stated = _merged(
        {key: value for key, value in common.items() if key != "repository"}, row["base"], _keys(row["tasks"], name)
    )
    differs = _merged(*in_code)
    known = (*_OWN, *Recipe.names())
    unknown = [key for key in {**stated, **differs} if key not in known]
    found = [f"there is no key '{key}'; {did_you_mean(key, known)}" for key in unknown]
    counts = {PAPER: row["parameters"].get("counted"), REPOSITORY: row["parameters"].get("repository")}
    counts |= stated.get("counted") or {}
    made = Task(
        name=name,
        keys={key: value for key, value in stated.items() if key in Recipe.names()},
        repository={key: value for key, value in differs.items() if key in Recipe.names()},
        metrics=tuple(stated.get("metrics") or ()),
        test={
            PAPER: _test(stated.get("test"), found),
            REPOSITORY: _test(_merged(stated, differs).get("test"), found),
        },
        labels=int(stated.get("labels", 2)),
        published=_published(stated.get("published"), stated.get("metrics") or [], found),
        start_from=stated.get("start_from"),
        counted={whose: int(count) for whose, count in counts.items() if count is not None},
    )
    problems += [f"{name}: {problem}" for problem in dict.fromkeys(found)]
    return made


def _keys(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the mapping of that name; an empty one where there is none."""
    return values.get(name) or {}


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings on top of each other, and so what is in `test`."""
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = found.get(key)
            if key in ("test", "decoding") and isinstance(value, Mapping) and isinstance(before, Mapping):
                value = _merged(before, value)
            found[key] = value
    return found


def _test(values: Mapping[str, Any] | None, problems: list[str]) -> Test | None:
    if values is None:
        return None
    known = [one.name for one in fields(Test)]
    unknown = [key for key in values if key not in known]
    problems += [f"test: there is no key '{key}'; {did_you_mean(key, known)}" for key in unknown]
    return Test(**{key: value for key, value in {"data": "", **values}.items() if key in known})


def _published(printed: Any, metrics: list[str], problems: list[str]) -> dict[str, Published]:
    """Return what was published by metric, and by "metric group" where groups are scored apart."""
    if not isinstance(printed, Mapping):
        printed = dict.fromkeys(metrics[:1], printed)
    if list(printed) != metrics:
        problems.append(f"published has {', '.join(printed)}, and the task's metrics are {', '.join(metrics)}")
    flat = {
        f"{metric} {group}".strip(): value
        for metric, values in printed.items()
        for group, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }
    found = {}
    for name, value in flat.items():
        try:
            found[name] = Published.of(value)
        except ValueError as error:
            problems.append(f"published: {name}: {error}")
    return found
