"""Runs in folders: which are finished and how good they are; the others are begun, or taken up again."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from ..surgery import activate
from . import metrics
from .loading import Loaded, load_adapted
from .prepare import prepare
from .recipe import Recipe
from .run import FACTS, RECIPE, Run, stored_recipe
from .subject import WholeModel


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


def load_result(recipe: Recipe, run: Path) -> Loaded:
    """Return the model of a finished run with what it has trained in use: its adapter, or the model itself."""
    whole = (run / WholeModel.kept).is_dir()
    base, adapters = (str(run), []) if whole else (recipe.model, [f"it={run}"])
    dtype = "float32" if recipe.dtype == "mixed" else recipe.dtype  # of its weights
    loaded = load_adapted(base, adapters, dtype=dtype, device=recipe.device)
    activate(loaded.model, *([] if whole else ["it"]))
    return loaded


def release() -> None:
    """Free the memory of runs that nobody holds any more: models refer to themselves, and stay till looked for."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def begin(recipe: Recipe) -> Run:
    """Return the run of a recipe whose output is known: a new one, or what is left of one that was stopped."""
    assert recipe.output is not None, "chosen by the caller"
    if (Path(recipe.output) / RECIPE).is_file():
        return Run(prepare(stored_recipe(recipe.output)), resume=True)
    return Run(prepare(recipe))
