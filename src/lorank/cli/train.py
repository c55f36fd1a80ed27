"""lorank train: train an adapter from a recipe, from flags, or from both."""

import dataclasses
import inspect
import signal
import sys
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..errors import AdapterError
from ..runs.recipe import Recipe, parse_overrides
from .console import err, number, out, result, say
from .progress import Display, clock


def train(
    recipe: str | None,
    overrides: list[str] | None,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an adapter, and keep the best one by its score on held-out data.

    RECIPE is a YAML file with any of the keys below; KEY=VALUE words and flags override it. The run's folder gets the
    resolved recipe, the metrics, a plot of the loss, a checkpoint to resume from, and the adapter.

    \b
    Examples:
      lorank train --model HuggingFaceTB/SmolLM2-135M --data pairs.jsonl
      lorank train --model roberta-base --data sst2.tsv --text sentence --targets query,value
      lorank train recipe.yaml rank=16 learning_rate=1e-3
      lorank train recipe.yaml --dry-run
      lorank train --resume runs/pairs-SmolLM2-135M
    """
    words = list(overrides or [])
    if recipe is not None and "=" in recipe and not recipe.endswith((".yaml", ".yml")):
        words, recipe = [recipe, *words], None
    flags = {
        name: value.replace("\\n", "\n") if isinstance(value, str) else value  # a shell passes on \n as two signs
        for name, value in given.items()
        if value is not None
    }
    if resume is not None and (recipe or words or flags or dry_run):
        raise AdapterError("--resume goes on with a run as it was begun; it takes no recipe and no other options")
    if resume is None and not (recipe or words or flags):
        raise AdapterError(
            "nothing to train on: give a recipe, or at least --model and --data; see lorank train --help"
        )

    from ..runs.prepare import prepare
    from ..runs.run import Run, stored_recipe

    wanted = stored_recipe(resume) if resume is not None else Recipe.of(recipe, parse_overrides(words), flags)
    with err.status("reading data, loading the model ..."):
        prepared = prepare(wanted)
    out_of_json = not as_json
    if out_of_json:
        _announce(prepared)
    if dry_run:
        _dry_run(prepared, as_json)
        return
    run = Run(prepared, resume=resume is not None)
    finish = _train(run)
    from ..runs.metrics import PLOT

    adapter = run.folder / "adapter"
    facts = {
        "run": str(run.folder),
        "adapter": str(adapter) if adapter.exists() else None,
        "step": finish.step,
        "done": finish.done,
        "best": finish.best,
        "seconds": finish.seconds,
        "plot": str(run.folder / PLOT),
    }
    result(facts, as_json, lambda: _show_end(facts, wanted.model))
    if not finish.done:
        raise typer.Exit(130)


def _train(run: Any) -> Any:
    """Run to the end, or to the first Ctrl-C; a second one does not wait for the step."""
    from ..runs.run import Evaluated, Stopped, Trained

    def interrupted(*_: object) -> None:
        run.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)", "yellow")

    before = signal.signal(signal.SIGINT, interrupted)
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
        signal.signal(signal.SIGINT, before)
    return finish


def _announce(prepared: Any) -> None:
    """Say what is about to happen, and show the first examples as the model will see them."""
    from ..data import pieces

    recipe, config = prepared.recipe, prepared.config
    say(str(prepared.plan))
    tokens = sum(len(example.ids) for example in prepared.train)
    say(
        f"{recipe.task}: {len(prepared.train):,} examples with {tokens:,} tokens, {len(prepared.held_out):,} held out; "
        f"{config.steps:,} steps of {recipe.batch_size * recipe.accumulate} on {prepared.device} in {recipe.dtype}"
    )
    for remark in prepared.remarks:
        say(f"note: {remark}")
    from rich.text import Text

    for example in prepared.train[:2]:
        line = Text("example: ", style="bold")
        for piece in pieces(prepared.task.tokenizer, example):
            if piece.trained and not (err.is_terminal and not err.no_color):
                line.append(f"⟦{piece.text}⟧")
            else:
                line.append(piece.text, style="bold green" if piece.trained else "dim")
        if not hasattr(example.labels, "__len__"):
            labels = getattr(prepared.task, "labels", None)
            line.append(f"  -> {labels[int(example.labels)] if labels else example.labels}", style="bold green")
        err.print(line)
    if recipe.task == "causal-lm":
        how = "green" if err.is_terminal and not err.no_color else "in ⟦⟧"
        say(f"(trained tokens are {how})", "dim")


def _dry_run(prepared: Any, as_json: bool) -> None:
    """Show what a step would take; nothing is trained, nothing is written."""
    from ..accounting import readable
    from ..runs.prepare import memory_of

    memory = memory_of(prepared)
    batch = prepared.task.collate([prepared.train[i] for i in next(prepared.order.from_batch(0))])
    shape = list(batch["input_ids"].shape)
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
        out.print(f"first batch: {shape[0]} examples, padded to {shape[1]} tokens")
        if isinstance(memory, str):
            out.print(f"memory: this model cannot be counted without its weights ({memory})", markup=False)
        else:
            parts = ", ".join(f"{name} {readable(size)}" for name, size in dataclasses.asdict(memory).items())
            out.print(f"memory of a step on the longest examples, estimated: {readable(memory.total)} ({parts})")
        out.print("dry run: nothing was trained or written")

    result(facts, as_json, show)


def _show_end(facts: Mapping[str, Any], model: str) -> None:
    if not facts["done"]:
        out.print(f"stopped at step {facts['step']}; go on with: lorank train --resume {facts['run']}")
        return
    best = facts["best"]
    scores = "  ".join(f"{name} {number(value)}" for name, value in best.items() if name != "step")
    out.print(f"done in {clock(facts['seconds'])} of training: {facts['plot']}")
    out.print(f"adapter: {facts['adapter']}" + (f"  (step {best['step']}: {scores})" if best else ""))
    verb = "eval" if "accuracy" in best or "pearson" in best else "generate"
    out.print(
        f"next: lorank {verb} --adapter {facts['adapter']}  |  lorank merge --adapter {facts['adapter']} --out merged"
    )


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
        text += f" [default: {shown}]"
    annotation = str if is_list else kind if kind in (bool, str, int, float) else inner
    option = typer.Option(flag, help=text, rich_help_panel=field.metadata["panel"], show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


def _with_flags(command: Any) -> Any:
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
assert sys.version_info >= (3, 10)
