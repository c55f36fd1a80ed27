"""lorank reproduce: a row of the paper's tables, trained, scored, and put beside what was published."""

import json
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import UsageError, err, out, result, say, table
from .options import Json


def reproduce(
    row: Annotated[str, typer.Argument(help="a row's file, as in recipes/paper", metavar="ROW")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys of the recipes that override it", metavar="[KEY=VALUE]...", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="a task of the row; may be given several times; default: all", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="so many seeds, from 0; default: as the paper", show_default=False)
    ] = None,
    hyperparameters: Annotated[
        str, typer.Option(help="paper, or repository: those of the authors' scripts where they differ")
    ] = "paper",
    model: Annotated[
        str | None, typer.Option(help="another base: a hub id or a folder", show_default=False, rich_help_panel="Data")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="training data of the task, in place of the row's", show_default=False, rich_help_panel="Data"
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="held-out data of the task", show_default=False, rich_help_panel="Data")
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(
            help="data that texts are written for; default with --eval-data: that",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="folder of all runs; default: runs/paper/<row>", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the recipes, count what they train, and train nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train and score a row of a table of the LoRA paper, and print ours beside the published.

    Every task is trained with every seed, one after the other, each in a folder of its own. The same command goes on
    with what was stopped, and trains nothing twice.

    \b
    Examples:
      lorank reproduce recipes/paper/table-2/roberta-base-lora.yaml
      lorank reproduce recipes/paper/table-2/roberta-base-lora.yaml --task mnli --task rte --seeds 1
      lorank reproduce recipes/paper/table-2/deberta-xxl-lora.yaml --hyperparameters repository --dry-run
      lorank reproduce recipes/paper/table-3/gpt2-medium-lora.yaml --model path/to/gpt2 batch_size=4 accumulate=2
      lorank reproduce recipes/paper/table-4/gpt3-lora-4.7m.yaml --task wikisql --model gpt2-medium
    """
    from ..reproduction.jobs import Wanted, jobs_of, output_of, remember, require_trainable
    from ..reproduction.row import Row
    from ..reproduction.scoring import require_scorers
    from ..reproduction.task import HYPERPARAMETERS
    from ..runs.finished import release
    from ..runs.recipe import parse_overrides

    if hyperparameters not in HYPERPARAMETERS:
        raise UsageError(f"hyperparameters is {hyperparameters!r}; it must be {' or '.join(HYPERPARAMETERS)}")
    wanted = Wanted(
        tasks=tuple(task or ()),
        seeds=seeds,
        hyperparameters=hyperparameters,
        model=model,
        data=data,
        eval_data=eval_data,
        test_data=test_data,
        output=output,
        overrides=parse_overrides(overrides or []),
    )
    chosen = Row.read(row)
    jobs = jobs_of(chosen, wanted)
    say(f"{chosen.name}, {chosen.source}")
    for note in chosen.notes:
        say(f"note: {note}", "dim")
    if dry_run:
        _dry_run(chosen, jobs, wanted, as_json)
        return
    require_trainable(chosen, wanted, jobs)
    require_scorers(jobs)
    remember(jobs, output_of(chosen, wanted))
    for number, job in enumerate(jobs, start=1):
        say(f"{job.name} ({number} of {len(jobs)}): {job.folder}", "bold")
        if job.best is None:
            _train(job)
            release()
        else:
            say("finished before")
    _report(chosen, jobs, wanted, as_json)


def _train(job: Any) -> None:
    """Train a job to its end; an interruption ends the command."""
    from ..reproduction.jobs import begin
    from .train import announce, run_to_its_end

    try:
        with err.status("reading data, loading the model ..."):
            run = begin(job)
    except AdapterError as error:
        raise AdapterError(f"{job.name}: {error}\n(KEY=VALUE changes a key of the row, such as warmup=2)") from error
    announce(run.prepared, preview=False)
    if not run_to_its_end(run).done:
        say(f"stopped {job.name}; the same command goes on with it", "yellow")
        raise typer.Exit(130)


def _report(row: Any, jobs: Any, wanted: Any, as_json: bool) -> None:
    """Score all jobs, write down the results, and print them."""
    from rich.progress import Progress

    from ..reproduction.jobs import output_of
    from ..reproduction.report import lines_of, write_results
    from ..reproduction.scoring import score

    scores: dict[str, list[dict[str, float]]] = {}
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        for job in jobs:
            bar = progress.add_task(f"scoring {job.name}", total=None)
            found = score(job, lambda done, of, bar=bar: progress.update(bar, completed=done, total=of))
            scores.setdefault(job.task.name, []).append(found)
            progress.remove_task(bar)
    lines = lines_of(row, [row.tasks[name] for name in scores], scores)
    folder = output_of(row, wanted)
    facts = write_results(row, jobs, wanted.hyperparameters, lines, folder)

    def show() -> None:
        shown = [line.shown() for line in lines]
        numbers = [name for name in shown[0] if name not in ("task", "metric")]
        table(shown, f"{row.name}, Table {row.table}, hyperparameters: {wanted.hyperparameters}", numbers=numbers)
        for line in facts["about"]:
            out.print(line)
        out.print(f"results: {folder / 'results.json'}, {folder / 'results.md'}")

    result(facts, as_json, show)


def _dry_run(row: Any, jobs: Any, wanted: Any, as_json: bool) -> None:
    """Show each task's recipe, count what it trains on the meta device, and train nothing."""
    from ..reproduction.report import plan_of

    plans = [plan_of(row, job, wanted.hyperparameters) for job in jobs if job.seed == 0]

    def show() -> None:
        for plan in plans:
            out.print(f"# {plan['task']}")
            out.print(plan["yaml"].rstrip())
            for key, remark in row.unstated.items():
                out.print(f"# unstated: {key}: {remark}")
            if plan["start_from"]:
                out.print(f"# starts from the best run of {plan['start_from']}")
            if plan["test"]:
                test = [f"{key} {json.dumps(value)}" for key, value in plan["test"].items() if value not in (None, {})]
                out.print(f"# then scored by what it writes: {', '.join(test)}")
            head = "" if plan["recipe"]["task"] == "causal-lm" else ", without a classifier's head"
            counted = f"{plan['trainable_parameters']:,} parameters to train{head}"
            out.print(f"# {counted}; published: {row.parameters}")
            scores = ", ".join(f"{name} {text}" for name, text in plan["published"].items())
            out.print(f"# published: {scores}; {plan['seeds']} seed{'s' if plan['seeds'] > 1 else ''}, {row.report}")
            out.print()
        out.print("dry run: nothing was trained or written")

    for plan in plans:
        plan["seeds"] = sum(job.task.name == plan["task"] for job in jobs)
    shared = {"row": row.name, "table": row.table, "source": row.source, "hyperparameters": wanted.hyperparameters}
    shared |= {"unstated": row.unstated, "notes": row.notes}
    tasks = [{key: value for key, value in plan.items() if key != "yaml"} for plan in plans]
    result(shared | {"tasks": tasks}, as_json, show)
