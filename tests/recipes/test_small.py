"""Every row trains: two steps on a small model of the same architecture, with records as they are published."""

from pathlib import Path
from typing import Any

import pytest

from lorank.reproduction.task import PAPER
from lorank.runs.prepare import prepare
from lorank.runs.run import Evaluated, Run, Stopped, Trained

from ..runs.cases import metrics
from . import cases

VARIED = ("deberta-xxl-lora", "gpt3-lora-37.7m")  # rows in which the tasks train other things


@pytest.mark.parametrize("path", cases.FILES, ids=cases.NAMES)
def test_a_row_trains(path: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    row = cases.row(path)
    first = next(iter(row.tasks.values()))
    for task in row.tasks.values() if path.stem in VARIED else [first]:
        settings = task.settings(PAPER)
        data = str(cases.records(tmp_path, task.name, settings, task.labels))
        changes: dict[str, Any] = {"model": str(bases[settings["model"].replace("-", "/").split("/")[0]]), "data": data}
        changes |= {"eval_data": data, "steps": 2, "warmup": 0, "batch_size": 3, "device": "cpu"}
        changes["max_length"] = 400 if settings["task"] == "causal-lm" else 64
        run = Run(prepare(row.recipe(task, PAPER, changes, {"output": str(tmp_path / "run" / task.name)})))
        events = list(run.events())
        assert [event.step for event in events if isinstance(event, Trained)] == [1, 2]
        assert isinstance(events[-1], Stopped) and events[-1].done
        last = [event for event in events if isinstance(event, Evaluated)][-1]
        assert run.recipe.best in last.scores
        steps = [record for record in metrics(run.folder) if "loss" in record]
        assert len(steps) == 2 and all(record["grad_norm"] > 0 for record in steps)
