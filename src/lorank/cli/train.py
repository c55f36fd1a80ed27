"""lorank train: train an adapter from a recipe, from flags, or from both."""

import dataclasses
import inspect
import shlex
import signal
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape

from ..runs.recipe import Recipe, as_typed, parse_overrides
from .console import UsageError, err, number, out, result, say
from .progress import Display, clock


def train(
    recipe: str | None,
    overrides: list[str] | None,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an adapter, or a baseline such as all of the model, and keep the best by its score on held-out data.

    RECIPE is a YAML file with any of the keys below; KEY=VALUE words and flags override it. The run's folder gets the
    resolved recipe, the metrics, a plot of the loss, a checkpoint to resume from, and the adapter.

    \b
    Examples:
      lorank train --model HuggingFaceTB/SmolLM2-135M --data pairs.jsonl
      lorank train --model roberta-base --data sst2.tsv --text sentence --targets query,value
      lorank train recipe.yaml rank=16 learning_rate=1e-3
      lorank train recipe.yaml --method adapter-h method_options='{size: 16}'
      lorank train recipe.yaml --dry-run
      lorank train --resume runs/pairs-SmolLM2-135M
    """
    words = list(overrides or [])
    if recipe is not None and "=" in recipe and not recipe.endswith((".yaml", ".yml")):
        words, recipe = [recipe, *words], None
    flags = {name: as_typed(name, value) for name, value in given.items() if value is not None}
    if resume is not None and (recipe or words or flags or dry_run):
        raise UsageError("--resume goes on with a run as it was begun; it takes no recipe and no other options")
    if resume is None and not (recipe or words or flags):
        raise UsageError("nothing to train on: give a recipe, or at least --model and --data; see lorank train --help")

    from ..runs.prepare import prepare
    from ..runs.run import Run, stored_recipe

    wanted = stored_recipe(resume) if resume is not None else Recipe.of(recipe, parse_overrides(words), flags)
    with err.status("reading data, loading the model ..."):
        prepared = prepare(wanted)
    announce(prepared, preview=not dry_run)
    if dry_run:
        _dry_run(prepared, as_json)
        return
    run = Run(prepared, resume=resume is not None)
    finish = run_to_its_end(run)
    from ..runs.metrics import PLOT

    plan = prepared.plan
    kept = run.folder / prepared.subject.kept
    facts = {
        "run": str(run.folder),
        prepared.subject.kept: str(kept) if kept.exists() else None,
        "merges": all(baseline.merges for baseline in plan.baselines),
        "step": finish.step,
        "done": finish.done,
        "best": finish.best,
        "seconds": finish.seconds,
        "plot": str(run.folder / PLOT),
    }
    result(facts, as_json, lambda: _show_end(facts))
    if not finish.done:
        raise typer.Exit(130)


def run_to_its_end(run: Any) -> Any:
    """Run to the end, or to the first Ctrl-C or SIGTERM; a second Ctrl-C does not wait for the step."""
    from ..runs.run import Evaluated, Stopped, Trained

    def interrupted(*_: object) -> None:
        run.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)", "yellow")

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    told = 0
    display = Display(run.prepared.config.steps, run.state.step)
    finish = None
    try:
        with display.showing():
            for event in run.events():
                for remark in run.remarks[told:]:
                    say(f"note: {remark}")
                told = len(run.remarks)
                if isinstance(event, Trained):
                    display.trained(event)
                elif isinstance(event, Evaluated):
                    display.evaluated(event)
                elif isinstance(event, Stopped):
                    finish = event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return finish


def announce(prepared: Any, preview: bool) -> None:
    """Say what is about to happen, and show the first examples as the model will see them."""
    recipe, config = prepared.recipe, prepared.config
    say(str(prepared.plan))
    tokens = sum(len(example.ids) for example in prepared.train)
    say(
        f"{recipe.task}: {len(prepared.train):,} examples with {tokens:,} tokens, {len(prepared.held_out):,} held out; "
        f"{config.steps:,} steps of {recipe.batch_size * recipe.accumulate} on {prepared.device} in {recipe.dtype}"
    )
    for remark in prepared.remarks:
        say(f"note: {remark}")
    if preview:
        _preview(prepared, prepared.train[:2])


def _preview(prepared: Any, examples: Sequence[Any]) -> None:
    """Show examples as the model sees them, with the trained tokens marked."""
    from rich.text import Text

    from ..data import pieces

    coloured = err.is_terminal and not err.no_color
    for example in examples:
        line = Text("example: ", style="bold")
        for piece in pieces(prepared.task.tokenizer, example):
            if piece.trained and not coloured:
                line.append(f"⟦{piece.text}⟧")
            else:
                line.append(piece.text, style="bold green" if piece.trained else "dim")
        if not hasattr(example.labels, "__len__"):
            labels = getattr(prepared.task, "labels", None)
            line.append(f"  -> {labels[int(example.labels)] if labels else example.labels}", style="bold green")
        err.print(line)
    if prepared.recipe.task == "causal-lm":
        say(f"(trained tokens are {'green' if coloured else 'in ⟦⟧'})", "dim")
    if special := prepared.task.special:
        say(f"(with {special.prefix} special tokens in front of the prompt and {special.infix} behind it)", "dim")


def _dry_run(prepared: Any, as_json: bool) -> None:
    """Show what a step would take; nothing is trained, nothing is written."""
    from ..accounting import readable
    from ..runs.prepare import memory_of

    memory = memory_of(prepared)
    first = [prepared.train[i] for i in next(prepared.order.from_batch(0))]
    shape = list(prepared.task.collate(first)["input_ids"].shape)
    say(f"first batch, {shape[0]} examples padded to {shape[1]} tokens:")
    _preview(prepared, first[:8])
    facts = {
        "recipe": dataclasses.asdict(prepared.recipe),
        "trainable_parameters": prepared.plan.trainable_parameters,
        "base_parameters": prepared.plan.base_parameters,
        "examples": len(prepared.train),
        "held_out": len(prepared.held_out),
        "first_batch": shape,
        "memory": None if isinstance(memory, str) else dataclasses.asdict(memory) | {"total": memory.total},
        "remarks": prepared.remarks,
    }

    def show() -> None:
        if isinstance(memory, str):
            out.print(f"memory: not counted ({memory})")
        else:
            parts = ", ".join(f"{name} {readable(size)}" for name, size in dataclasses.asdict(memory).items())
            out.print(f"memory of a step on the longest examples, estimated: {readable(memory.total)} ({parts})")
        out.print("dry run: nothing was trained or written")

    result(facts, as_json, show)


def _show_end(facts: Mapping[str, Any]) -> None:
    if not facts["done"]:
        out.print(f"stopped at step {facts['step']}; go on with: lorank train --resume {shlex.quote(facts['run'])}")
        return
    best = facts["best"]
    scores = "  ".join(f"{name} {number(value)}" for name, value in best.items() if name != "step")
    out.print(f"done in {clock(facts['seconds'])} of training: {facts['plot']}")
    kept = "model" if "model" in facts else "adapter"
    out.print(f"{kept}: {facts[kept]}" + (f"  (step {best['step']}: {scores})" if best else ""))
    run = shlex.quote(facts["run"])
    merge = f", or lorank merge --adapter {run} --out merged" if kept == "adapter" and facts["merges"] else ""
    out.print(f"next: lorank generate --{kept} {run}{merge}")


def _option(field: dataclasses.Field, kind: Any) -> inspect.Parameter:
    """Return a recipe's key as a flag."""
    inner = next(option for option in (get_args(kind) or (kind,)) if option is not type(None))
    is_list = getattr(kind, "__origin__", None) is list or getattr(inner, "__origin__", None) is list
    flag = f"--{field.name.replace('_', '-')}"
    if kind is bool:
        flag = f"{flag}/--no-{field.name.replace('_', '-')}"
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    text = field.metadata["help"]
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    if shown not in (None, "", {}, False):
        text += escape(f" [default: {shown}]")
    annotation = str if is_list else kind if kind in (bool, str, int, float) else inner
    option = typer.Option(flag, help=text, rich_help_panel=field.metadata["panel"], show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


def _with_flags(command: Any) -> Any:  # so that a recipe's keys, their defaults and their help stand in one place
    """Give the command a flag for every key of a recipe that is no mapping; those are for YAML and KEY=VALUE."""
    kinds = get_type_hints(Recipe)
    flags = [
        _option(field, kinds[field.name])
        for field in dataclasses.fields(Recipe)
        if getattr(kinds[field.name], "__origin__", None) is not dict
    ]
    own = [
        ("recipe", str | None, typer.Argument(help="a YAML recipe", show_default=False, metavar="[RECIPE]")),
        (
            "overrides",
            list[str] | None,
            typer.Argument(help="keys that override it", metavar="[KEY=VALUE]...", show_default=False),
        ),
        ("resume", str | None, typer.Option(help="go on with the run in this folder, to the bit", metavar="RUN")),
        ("dry_run", bool, typer.Option("--dry-run", help="show plan, memory and first batch; train nothing")),
        ("as_json", bool, typer.Option("--json", help="print the result as JSON")),
    ]
    made = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[kind, option],
        )
        for name, kind, option in own
    ]
    command.__signature__ = inspect.Signature([*made, *flags])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*made, *flags]}
    return command


train = _with_flags(train)
