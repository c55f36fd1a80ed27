"""Runs in folders: which are finished and how good they are; the others are begun, or taken up again."""

import json
from pathlib import Path
from typing import Any

from . import metrics
from .prepare import prepare
from .recipe import Recipe
from .run import FACTS, RECIPE, Run, stored_recipe


def facts_of(run: Path) -> dict[str, Any]:
    """Return what a run has written down of itself; {} where there is none."""
    return json.loads((run / FACTS).read_text(encoding="utf-8")) if (run / FACTS).is_file() else {}


def best_scores(run: Path) -> dict[str, float] | None:
    """Return the scores of what a run has kept; None for one that is not finished."""
    facts = facts_of(run)
    done = facts.get("steps_done")
    if done is None or not (run / RECIPE).is_file():
        return None
    return facts["best"] if done >= (stored_recipe(str(run)).steps or 0) else None


def last_scores(run: Path) -> dict[str, float]:
    """Return the scores of a run's last evaluation, by their names."""
    scored = [record for record in metrics.read(run) if "eval_loss" in record]
    return {key.removeprefix("eval_"): value for key, value in scored[-1].items() if key.startswith("eval_")}


def begin(recipe: Recipe) -> Run:
    """Return the run of a recipe whose output is known: a new one, or what is left of one that was stopped."""
    assert recipe.output is not None, "chosen by the caller"
    if (Path(recipe.output) / RECIPE).is_file():
        return Run(prepare(stored_recipe(recipe.output)), resume=True)
    return Run(prepare(recipe))
