"""The runs of a comparison: each arm at several learning rates on data of its own, then at the best with every seed."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError, DivergedError
from ..formats.safetensors_file import write_atomically
from ..runs.checkpoint import FILE as CHECKPOINT
from ..runs.finished import begin, best_scores
from ..runs.prepare import prepare
from ..runs.recipe import Recipe
from ..runs.run import Run
from .arms import Arm

SETTINGS, DIVERGED = "comparison.json", "diverged.txt"


@dataclass(frozen=True)
class Trial:
    """One run."""

    arm: Arm
    factor: float  # times the arm's own learning rate
    seed: int
    tuning: bool  # to choose a rate by, on a part of the training data
    recipe: Recipe

    @property
    def folder(self) -> Path:
        assert self.recipe.output is not None, "every trial has its own"
        return Path(self.recipe.output)

    @property
    def name(self) -> str:
        return f"{self.arm.label}, learning rate {self.recipe.learning_rate:g}, seed {self.seed}" + (
            " (to choose the rate)" if self.tuning else ""
        )

    @property
    def best(self) -> dict[str, float] | None:
        """The scores of what its run has kept; None before it is finished."""
        return best_scores(self.folder)

    @property
    def diverged(self) -> bool:
        """Whether its training ended in numbers that are none."""
        return (self.folder / DIVERGED).is_file()

    def give_up(self, reason: DivergedError) -> None:
        """Remember that its learning rate is too high; raises the reason where the rate is the chosen one."""
        if not self.tuning:
            raise AdapterError(f"{self.name}: {reason}") from reason
        write_atomically({self.folder / DIVERGED: f"{reason}\n".encode()})

    def start(self) -> Run:
        """Return its run, new or taken up again."""
        return begin(self.recipe)

    def tidy(self) -> None:
        """Remove the checkpoint of a finished run, which is several times as large as its result."""
        if self.best is not None:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where its runs are.

    factors: learning rates to try, as factors of each arm's own; one alone is taken as it is.
    tune_seeds: seeds of each rate; the mean score decides.
    """

    shared: Recipe
    arms: Sequence[Arm]
    seeds: int
    factors: Sequence[float]
    output: Path
    tune_seeds: int = 1
    tune_share: float = 0.1

    def tuning(self, arm: Arm) -> list[Trial]:
        """Return the runs by which an arm's rate is chosen; none where there is no choice."""
        if len(self.factors) < 2:
            return []
        return [self._trial(arm, factor, seed, True) for factor in self.factors for seed in range(self.tune_seeds)]

    def final(self, arm: Arm) -> list[Trial]:
        """Return an arm's runs at its best rate; raises AdapterError before that is known."""
        factor = self.chosen(arm)
        if factor is None:
            raise AdapterError(f"{arm.label}: its learning rate is not chosen yet")
        return [self._trial(arm, factor, seed, False) for seed in range(self.seeds)]

    def chosen(self, arm: Arm) -> float | None:
        """Return the factor with the best mean score in tuning; None before all its runs are finished."""
        if len(self.factors) < 2:
            return self.factors[0]
        found: dict[float, list[float]] = {}
        for trial in self.tuning(arm):
            if trial.best is None and not trial.diverged:
                return None
            found.setdefault(trial.factor, []).append(self.goodness(trial))
        means = {factor: sum(values) / len(values) for factor, values in found.items()}
        chosen = max(means, key=lambda factor: means[factor])
        if means[chosen] == -math.inf:
            raise AdapterError(f"{arm.label}: at no rate has a run a number for '{self.score}'; lower --rates")
        return chosen

    def goodness(self, trial: Trial) -> float:
        """Return the score of a finished run as a number by which more is better; -inf where it has none."""
        value = (trial.best or {}).get(self.score)
        if value is None:  # also what JSON has for NaN and infinity
            return -math.inf
        return -value if self.score in ("loss", "perplexity") else value

    @property
    def score(self) -> str:
        """The score that is compared."""
        assert self.shared.best is not None, "resolved by `settled`"
        return self.shared.best

    def trials(self) -> Iterator[Trial]:
        """Yield all runs in turn; an arm's final ones come once its rate is chosen, so take one after the other."""
        for arm in self.arms:
            yield from self.tuning(arm)
        for arm in self.arms:
            yield from self.final(arm)

    def _trial(self, arm: Arm, factor: float, seed: int, tuning: bool) -> Trial:
        own = arm.recipe(self.shared)
        assert own.learning_rate is not None, "resolved by `settled`"
        rate = own.learning_rate * factor
        folder = self.output / arm.folder / ("tuning" if tuning else "final") / f"rate-{rate:.3g}-seed-{seed}"
        changes = {"learning_rate": rate, "seed": seed, "output": str(folder)}
        if tuning:  # the held-out data is not looked at for this
            changes |= {"eval_data": None, "eval_share": self.tune_share, "eval_limit": None}
        return Trial(arm, factor, seed, tuning, arm.recipe(self.shared, **changes))


def settled(comparison: Comparison) -> Comparison:
    """Return a comparison with every arm's own learning rate and the score filled in; nothing is trained.

    Raises AdapterError for an arm that cannot be trained, before any is.
    """
    arms, shared = [], comparison.shared
    if len(comparison.factors) > 1 and shared.eval_data is None:
        raise AdapterError(
            "to choose a rate the recipe needs eval_data: rates are chosen on a part of the training data, and what is "
            "held out of that would be another part for every seed"
        )
    if len(comparison.factors) > 1 and not 0 < comparison.tune_share < 1:
        raise AdapterError(f"tune_share is {comparison.tune_share}; it must be above 0 and below 1")
    for arm in comparison.arms:
        prepared = prepare(arm.recipe(shared, output=str(comparison.output / "none")))
        if not prepared.held_out:
            raise AdapterError(
                "nothing is held out, so that there is nothing to compare by: give eval_data or eval_share"
            )
        arms.append(dataclasses.replace(arm, keys=arm.keys | {"learning_rate": prepared.recipe.learning_rate}))
        best, columns = prepared.recipe.best, ("task", "prompt", "completion", "messages", "text", "text_pair", "label")
        shared = dataclasses.replace(shared, best=best, **{name: getattr(prepared.recipe, name) for name in columns})
    return dataclasses.replace(comparison, shared=shared, arms=arms)


def remember(comparison: Comparison) -> None:
    """Write down what is compared; raises AdapterError where the folder has a comparison of something else.

    Methods, seeds and rates may be added: a run is known by its method's folder, its rate and its seed.
    """
    path = comparison.output / SETTINGS
    shared = {key: value for key, value in dataclasses.asdict(comparison.shared).items() if key != "output"}
    # The rate that a method has by itself follows from the rest, and is in the name of each run.
    arms = {arm.folder: {k: v for k, v in arm.keys.items() if k != "learning_rate"} for arm in comparison.arms}
    now: dict[str, Any] = {"shared": shared, "tune_share": comparison.tune_share, "methods": arms}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in shared if before["shared"].get(key) != shared[key]]
        other += ["tune_share"] if before["tune_share"] != now["tune_share"] else []
        known = before.get("methods", {})
        other += [f"method in {folder}" for folder in arms if known.get(folder, arms[folder]) != arms[folder]]
        if other:
            raise AdapterError(
                f"{comparison.output} has a comparison with another {other[0]}; --output names another folder"
            )
        now["methods"] = known | arms
    comparison.output.mkdir(parents=True, exist_ok=True)
    write_atomically({path: (json.dumps(now, indent=2) + "\n").encode()})
