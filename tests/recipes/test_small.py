"""Every row trains: two steps on a small model of the same architecture, with records as they are published."""

from pathlib import Path
from typing import Any

import pytest

import lorank
from lorank.reproduction.task import PAPER
from lorank.runs.prepare import ADAPTER, Prepared, prepare
from lorank.tasks.base import to_device

from . import cases


@pytest.mark.parametrize("path", cases.FILES, ids=cases.NAMES)
def test_a_row_trains(path: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    row = cases.row(path)
    first = next(iter(row.tasks.values()))
    if first.settings(PAPER)["method"] in cases.PENDING:
        pytest.skip(f"lorank train has no {first.settings(PAPER)['method']} yet")
    tasks = list(row.tasks.values()) if path.stem in ("deberta-xxl-lora", "gpt3-lora-37.7m") else [first]
    for task in tasks:  # in those two the tasks train other things
        settings = task.settings(PAPER)
        data = str(cases.records(tmp_path, task.name, settings, task.labels))
        changes: dict[str, Any] = {"model": str(bases[settings["model"].replace("-", "/").split("/")[0]]), "data": data}
        changes |= {"eval_data": data, "steps": 2, "warmup": 0, "batch_size": 3, "device": "cpu"}
        changes["max_length"] = 256 if settings["task"] == "causal-lm" else 64
        prepared = prepare(row.recipe(task, PAPER, changes, {"output": str(tmp_path / task.name)}))
        before = _values(prepared)
        for step in lorank.train(
            lorank.adapter_parameters(prepared.model, ADAPTER),
            lambda batch, prepared=prepared: prepared.task.loss(prepared.model, batch),
            _batches(prepared),
            prepared.config,
        ):
            assert step.index <= 2 and float(step.grad_norm) > 0
        after = _values(prepared)
        assert prepared.config.steps == 2 and any((after[name] != before[name]).any() for name in after)
        assert len(prepared.held_out) > 0 and prepared.recipe.best in prepared.task.scores


def _values(prepared: Prepared) -> dict[str, Any]:
    parameters = lorank.adapter_parameters(prepared.model, ADAPTER)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _batches(prepared: Prepared) -> Any:
    for numbers in prepared.order.from_batch(0):
        yield to_device(prepared.task.collate([prepared.train[i] for i in numbers]), prepared.device)
