"""Small runs: data, recipes, and what is asked of a run's folder again and again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorank
from lorank.runs.prepare import ADAPTER, prepare
from lorank.runs.recipe import Recipe
from lorank.runs.run import Event, Run, Stopped, Trained, stored_recipe

CLOCKS = ("seconds", "tokens_per_second", "memory")  # what no two runs have in common


def completions(path: Path, count: int = 26, offset: int = 0) -> Path:
    """Write prompts and completions of unequal length."""
    words = ["fox", "lazy dog", "quick brown fox", "two and two", "film"]
    pairs = [
        {"prompt": f"{i + offset} {words[i % 5]}?", "completion": f" {words[(i + 2) % 5]} {i % 3}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def sentiments(path: Path, count: int = 26) -> Path:
    """Write short texts with the labels good and bad."""
    words = ["bad" if i % 2 else "good" for i in range(count)]
    lines = [f"a {word} film{' the fox' * (i // 2 % 4)}\t{word}" for i, word in enumerate(words)]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return path


def recipe(model: Path, data: Path, output: Path, **changes: Any) -> Recipe:
    """Return a recipe of few steps; a pass over its batches ends within a step."""
    settings: dict[str, Any] = {
        "steps": 9,
        "batch_size": 4,
        "accumulate": 2,
        "rank": 2,
        "alpha": 4,
        "dropout": 0.1,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "eval_share": 0.2,
        "eval_every": 3,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return Recipe(model=str(model), data=str(data), output=str(output), **(settings | changes))


def begin(wanted: Recipe) -> Run:
    return Run(prepare(wanted))


def resume(folder: Path) -> Run:
    """Return the run in a folder, made anew from its files."""
    return Run(prepare(stored_recipe(str(folder))), resume=True)


def finish(run: Run) -> Stopped:
    """Run to the end."""
    last = list(run.events())[-1]
    assert isinstance(last, Stopped) and last.done
    return last


def stop_at(run: Run, step: int) -> Stopped:
    """Run until a step is done, and have it stop there."""
    events: list[Event] = []
    for event in run.events():
        events.append(event)
        if isinstance(event, Trained) and event.step == step:
            run.stop()
    last = events[-1]
    assert isinstance(last, Stopped) and last.step == step and not last.done
    return last


def leave_after(run: Run, count: int) -> None:
    """Take so many events of a run and never look at it again: nothing more is written, as in a crash."""
    events: Iterator[Event] = run.events()
    for _ in range(count):
        next(events)
    events.close()  # type: ignore[attr-defined]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def adapter(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's adapter."""
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def values(run: Run) -> dict[str, Tensor]:
    """Return a copy of the adapter's parameters."""
    return {key: p.detach().clone() for key, p in lorank.adapter_parameters(run.prepared.model, ADAPTER).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
