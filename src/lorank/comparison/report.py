"""The table and the figure of a comparison: quality with its interval beside what each method costs."""

import io
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..accounting import readable
from ..errors import AdapterError
from ..extras import require
from ..formats.safetensors_file import write_atomically
from ..runs.finished import last_scores
from ..version import __version__
from .arms import Arm
from .probe import overhead
from .trials import Comparison

RESULTS, TABLE, FIGURE, COSTS = "results.json", "results.md", "quality.png", "costs.json"


@dataclass(frozen=True)
class Line:
    """One method."""

    method: str
    scores: dict[str, tuple[float, ...]]  # by name, and then by seed: of what each run has kept
    last: tuple[float, ...]  # of the last evaluation, of the score by which runs are compared
    learning_rate: float
    tuned: dict[str, float | None]  # the mean score in tuning, by learning rate; None where a run has none
    trainable_parameters: int
    bytes: int  # of the adapter, or of the whole checkpoint
    step: float  # seconds, the median
    memory: int  # bytes at the peak of a step
    latency: float  # seconds of a forward pass, the median
    overhead: float  # times that of the base: the median of ratios
    overhead_interval: tuple[float, float]  # at 95 %, of this median
    inference: str
    seeds: tuple[int, ...] = field(default=())

    @property
    def score(self) -> str:
        """The first of the scores, which the figure shows."""
        return next(iter(self.scores))

    def shown(self) -> dict[str, str]:
        """Return the cells of the table."""
        return {
            "method": self.method,
            **{name: _with_margin(values) for name, values in self.scores.items()},
            "seeds": str(len(self.seeds)),
            "rate": f"{self.learning_rate:.3g}",
            "trained": f"{self.trainable_parameters:,}",
            "file": readable(self.bytes),
            "step": f"{1000 * self.step:.0f} ms",
            "peak": readable(self.memory),
            "forward": f"{1000 * self.latency:.1f} ms",
            "of base": f"x {self.overhead:.2f} ({self.overhead_interval[0]:.2f} to {self.overhead_interval[1]:.2f})",
        }


def _with_margin(values: Sequence[float]) -> str:
    margin = margin_of(values)
    return f"{statistics.mean(values):.4f}" + ("" if margin is None else f" ± {margin:.4f}")


def margin_of(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of a mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    stats = require("scipy.stats", "intervals")
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def costs_of(comparison: Comparison, arm: Arm, steps: int, passes: int) -> dict[str, Any]:
    """Return what an arm costs, measured by `probe` in a process of its own unless it was before."""
    trial = comparison.final(arm)[0]
    path = trial.folder.parent / COSTS
    asked = {"steps": steps, "passes": passes}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["of"] == asked:
            return before["costs"]
    recipe = trial.folder.parent / "probe.yaml"
    write_atomically({recipe: trial.recipe.to_yaml().encode()})
    command = [sys.executable, "-W", "ignore", "-m", "lorank.comparison.probe", str(recipe), str(steps), str(passes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise AdapterError(f"cannot measure {arm.label}: {said[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    write_atomically({path: json.dumps({"of": asked, "costs": found}).encode()})
    return found


def lines_of(
    comparison: Comparison,
    costs: Mapping[str, Mapping[str, Any]],
    written: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[Line]:
    """Return a line for each arm; all its runs must be finished.

    costs: of each arm, as `costs_of` returns them. written: scores of texts by seed, of each arm; none without texts.
    """
    lines = []
    for arm in comparison.arms:
        trials = comparison.final(arm)
        scores = [trial.best for trial in trials]
        if any(best is None for best in scores):
            raise AdapterError(f"{arm.label}: not all runs are finished")
        cost, name = costs[arm.label], comparison.score
        times, low, high = overhead(cost["latency"])
        tuned: dict[str, list[float | None]] = {}
        for trial in comparison.tuning(arm):
            tuned.setdefault(f"{trial.recipe.learning_rate:.3g}", []).append((trial.best or {}).get(name))
        lines.append(
            Line(
                method=arm.label,
                scores=_joined(written.get(arm.label, ())) | {name: tuple((best or {})[name] for best in scores)},
                last=tuple(last_scores(trial.folder)[name] for trial in trials),
                learning_rate=trials[0].recipe.learning_rate or 0.0,
                tuned={rate: _mean(values) for rate, values in tuned.items()},
                trainable_parameters=cost["trainable_parameters"],
                bytes=_kept_bytes(trials[0].folder),
                step=statistics.median(cost["step"]),
                memory=cost["memory"],
                latency=statistics.median(pair[0] for pair in cost["latency"]),
                overhead=times,
                overhead_interval=(low, high),
                inference="; ".join(cost["inference"]),
                seeds=tuple(trial.seed for trial in trials),
            )
        )
    return lines


def write(comparison: Comparison, lines: Sequence[Line], command: str) -> dict[str, Any]:
    """Write table, figure and numbers into the comparison's folder; return the numbers."""
    shared = {key: value for key, value in asdict(comparison.shared).items() if key not in ("output", "seed")}
    facts = {
        "lorank": __version__,
        "command": command,
        "score": comparison.score,
        "shared": shared,
        "factors": list(comparison.factors),
        "methods": [asdict(line) | {"intervals": _intervals(line)} for line in lines],
    }
    rows = [line.shown() for line in lines]
    heads = list(rows[0])
    table = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *(r.values() for r in rows))]
    write_atomically(
        {
            comparison.output / RESULTS: (json.dumps(facts, indent=2) + "\n").encode(),
            comparison.output / TABLE: ("\n".join(table) + "\n").encode(),
            comparison.output / FIGURE: figure(lines),
        }
    )
    return facts


def _joined(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Return scores by name and then by seed."""
    return {name: tuple(one[name] for one in scores) for name in scores[0]} if scores else {}


def _intervals(line: Line) -> dict[str, dict[str, float | None]]:
    return {
        name: {"mean": statistics.mean(values), "margin": margin_of(values)} for name, values in line.scores.items()
    }


def figure(lines: Sequence[Line]) -> bytes:
    """Return a picture of the quality against the number of trained parameters, as Figure 2 of the paper."""
    require("matplotlib", "drawing the figure").use("Agg")
    pyplot = require("matplotlib.pyplot", "drawing the figure")
    picture, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for number, line in enumerate(lines):
        values = line.scores[line.score]
        place, colour = (line.trainable_parameters, statistics.mean(values)), colours(number % 10)
        axes.errorbar(*place, yerr=margin_of(values), fmt="o", color=colour, capsize=3, markersize=6)
        axes.annotate(line.method, place, xytext=(7, 5), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{lines[0].score} (mean, 95 % interval)")
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=150)
    pyplot.close(picture)
    return buffer.getvalue()


def _kept_bytes(run: Path) -> int:
    """Return the bytes of what a run has kept: the adapter's files, or those of a whole model."""
    for name in ("adapter", "model"):
        folder = run / name
        if folder.is_dir():
            return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
    raise AdapterError(f"the run {run} has kept nothing")
