"""lorank compare: methods side by side on the same data."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import err, out, result, say, table
from .options import Json


def compare(
    recipe: Annotated[str, typer.Argument(help="a recipe, as of lorank train", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys that override it", metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    methods: Annotated[
        str, typer.Option(help="methods, each with its settings in braces: lora,adapter-h{size: 16}")
    ] = "lora,full,bitfit",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method, from seed 0")] = 3,
    rates: Annotated[
        str, typer.Option(help="learning rates to choose from, as factors of each method's own: 0.3,1,3")
    ] = "1",
    tune_seeds: Annotated[int, typer.Option(min=1, help="runs of each rate by which it is chosen")] = 1,
    tune_share: Annotated[float, typer.Option(help="share of the training data that rates are chosen on")] = 0.1,
    steps: Annotated[int, typer.Option(min=2, help="steps that are timed")] = 20,
    passes: Annotated[int, typer.Option(min=2, help="forward passes that are timed")] = 30,
    output: Annotated[
        str | None, typer.Option(help="folder of all runs; default: runs/compare-<recipe>", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train several methods on the same data with several seeds, and put their quality and costs into one table.

    With --rates every method is first tried at each rate on a part of the training data, and then trained at the best
    one with every seed: a comparison at one rate for all would compare rates. The held-out data of the recipe is looked
    at in the final runs alone. The same command goes on with what was stopped, and trains nothing twice.

    Quality is that of the best evaluation of each run, as in the paper, with the 95 % interval of the mean. Steps and
    forward passes are timed in a process of its own for each method; a method that merges is merged first, and timed
    in turn with the base.

    \b
    Examples:
      lorank compare sst2.yaml --methods lora,full,bitfit --seeds 5
      lorank compare sst2.yaml --methods 'lora{rank: 4},adapter-h{size: 16},prefix-layer' --rates 0.1,0.3,1,3
      lorank compare sst2.yaml steps=100 --methods lora,full --output runs/quick --json
    """
    from ..comparison.arms import arms_of
    from ..comparison.report import costs_of, lines_of, write
    from ..comparison.trials import Comparison, remember, settled
    from ..errors import AdapterError
    from ..runs.recipe import Recipe, parse_overrides

    try:
        factors = [float(word) for word in rates.split(",")]
    except ValueError:
        raise AdapterError(f"--rates is {rates!r}; give factors such as 0.3,1,3") from None
    if not all(0 < factor < 1e6 for factor in factors) or len(set(factors)) < len(factors):
        raise AdapterError(f"--rates is {rates!r}; factors are different numbers above 0")
    shared = Recipe.of(recipe, parse_overrides(overrides or []))
    folder = Path(output or f"runs/compare-{Path(recipe).stem}").expanduser()
    arms = arms_of(methods, shared)
    with err.status("looking at every method ..."):
        found = settled(Comparison(shared, arms, seeds, factors, folder, tune_seeds, tune_share))
    remember(found)
    for trial in found.trials():
        if trial.best is None:
            say(trial.name, "bold")
            _train(trial)
        trial.tidy()
    costs = {}
    for arm in found.arms:
        with err.status(f"timing {arm.label} ..."):
            costs[arm.label] = costs_of(found, arm, steps, passes)
    lines = lines_of(found, costs)
    facts = write(found, lines, shlex.join(["lorank", *sys.argv[1:]]))

    def show() -> None:
        shown = [line.shown() for line in lines]
        table(shown, f"{len(lines)} methods on {shared.data}", numbers=list(shown[0])[1:])
        for line in lines:
            out.print(f"at inference, {line.method}: {line.inference}")
        out.print(f"figure: {folder / 'quality.png'}; numbers: {folder / 'results.json'}")

    result(facts, as_json, show)


def _train(trial: Any) -> None:
    """Train to the end; an interruption ends the command."""
    from .train import run_to_its_end

    with err.status("reading data, loading the model ..."):
        run = trial.start()
    if not run_to_its_end(run).done:
        say("stopped; the same command goes on with it", "yellow")
        raise typer.Exit(130)
