"""lorank compare: methods side by side on the same data."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import UsageError, err, out, result, say, table
from .options import Beams, Json, LengthPenalty, MaxNewTokens, NoRepeat

_WRITING = "What a language model writes"


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
    metrics: Annotated[
        str | None,
        typer.Option(
            help="of a language model: score what it writes, by e2e, samsum, ... or names such as bleu,rouge-l-coco",
            show_default=False,
            rich_help_panel=_WRITING,
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(
            help="data to write for; default: the recipe's eval_data", show_default=False, rich_help_panel=_WRITING
        ),
    ] = None,
    test_limit: Annotated[
        int | None,
        typer.Option(min=1, help="its first so many records", show_default=False, rich_help_panel=_WRITING),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    no_repeat_ngram: NoRepeat = None,
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
      lorank compare e2e.yaml --methods lora,full,prefix-layer --metrics e2e --test-data test.csv --beams 10
    """
    from ..comparison.arms import arms_of
    from ..comparison.report import costs_of, lines_of, write
    from ..comparison.texts import require_questions
    from ..comparison.trials import Comparison, remember, settled
    from ..errors import AdapterError
    from ..runs.finished import release
    from ..runs.recipe import Recipe, parse_overrides

    try:
        factors = [float(word) for word in rates.split(",")]
    except ValueError:
        raise AdapterError(f"--rates is {rates!r}; give factors such as 0.3,1,3") from None
    if not all(0 < factor < 1e6 for factor in factors) or len(set(factors)) < len(factors):
        raise AdapterError(f"--rates is {rates!r}; factors are different numbers above 0")
    shared = Recipe.of(recipe, parse_overrides(overrides or []))
    chosen = {"max_new_tokens": max_new_tokens, "beams": beams, "length_penalty": length_penalty}
    chosen |= {"no_repeat_ngram_size": no_repeat_ngram}
    texts = _texts(metrics, test_data, test_limit, chosen, shared)
    folder = Path(output or f"runs/compare-{Path(recipe).stem}").expanduser()
    arms = arms_of(methods, shared)
    with err.status("looking at every method ..."):
        found = settled(Comparison(shared, arms, seeds, factors, folder, tune_seeds, tune_share))
        if texts:
            require_questions(texts, [arm.recipe(found.shared) for arm in found.arms])
    remember(found)
    for trial in found.trials():
        if trial.best is None and not trial.diverged:
            say(trial.name, "bold")
            _train(trial)
            release()
        trial.tidy()
    written = {}
    for arm in found.arms if texts else ():
        written[arm.label] = [_score(trial, texts) for trial in found.final(arm)]
    costs = {}
    for arm in found.arms:
        with err.status(f"timing {arm.label} ..."):
            costs[arm.label] = costs_of(found, arm, steps, passes)
    lines = lines_of(found, costs, written)
    facts = write(found, lines, shlex.join(["lorank", *sys.argv[1:]]))

    def show() -> None:
        shown = [line.shown() for line in lines]
        table(shown, f"{len(lines)} methods on {shared.data}", numbers=list(shown[0])[1:])
        for line in lines:
            out.print(f"at inference, {line.method}: {line.inference}")
        out.print(f"figure: {folder / 'quality.png'}; numbers: {folder / 'results.json'}")

    result(facts, as_json, show)


def _texts(metrics: str | None, data: str | None, limit: int | None, chosen: dict[str, Any], shared: Any) -> Any:
    """Return what is to be written and scored, checked before anything is trained; None without --metrics."""
    if metrics is None:
        given = [name for name, value in {**chosen, "test_limit": limit}.items() if value is not None]
        if given:
            flag = "--" + given[0].removesuffix("_size").replace("_", "-")
            raise UsageError(f"{flag} goes with --metrics: nothing is written without it")
        return None
    from ..comparison.texts import Texts
    from ..evaluation import chosen_metrics, require_metrics
    from .answering import decoding_of

    split = "test"
    if data is None:
        data, split, limit = shared.eval_data, shared.eval_split, limit or shared.eval_limit
    if data is None:
        raise UsageError("--metrics needs --test-data, or eval_data in the recipe: prompts with their references")
    names = chosen_metrics(metrics)
    require_metrics(names)
    return Texts(data, limit, tuple(names), decoding_of(chosen), split)


def _score(trial: Any, texts: Any) -> dict[str, float]:
    """Have a trial's model write, with a bar, and score that."""
    from rich.progress import Progress

    from ..comparison.texts import scores_of
    from ..runs.finished import release

    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(f"writing: {trial.name}", total=None)
        found = scores_of(trial, texts, lambda done, of: progress.update(bar, completed=done, total=of))
    release()
    return found


def _train(trial: Any) -> None:
    """Train to the end; an interruption ends the command."""
    from ..errors import DivergedError
    from .train import run_to_its_end

    with err.status("reading data, loading the model ..."):
        run = trial.start()
    try:
        end = run_to_its_end(run)
    except DivergedError as error:
        trial.give_up(error)
        say(f"this rate is too high: {error}", "yellow")
        return
    if not end.done:
        say("stopped; the same command goes on with it", "yellow")
        raise typer.Exit(130)
