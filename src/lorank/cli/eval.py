"""lorank eval: score a base and its adapters on held-out data."""

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import err, number, result, say, table
from .options import Adapters, Device, Dtype, Json, Model, OtherBase, WithBase


def evaluate(
    data: Annotated[
        str, typer.Option("--data", help="a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set")
    ],
    adapter: Adapters = None,
    model: Model = None,
    base: WithBase = False,
    split: Annotated[str, typer.Option(help="split of a hub data set")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="use the first so many records", show_default=False)] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, classification or regression", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="column or template, as in lorank train", show_default=False)
    ] = None,
    completion: Annotated[str | None, typer.Option(help="column or template", show_default=False)] = None,
    messages: Annotated[str | None, typer.Option(help="column of messages", show_default=False)] = None,
    text: Annotated[str | None, typer.Option(help="column or template", show_default=False)] = None,
    text_pair: Annotated[str | None, typer.Option(help="column of the second text", show_default=False)] = None,
    label: Annotated[str | None, typer.Option(help="column of the label", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="cut to so many tokens", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Score adapters, and the base, on held-out data.

    Language models: loss and perplexity on the trained tokens, and how many of them are the likeliest. Classifiers:
    loss, accuracy, F1, Matthews' correlation. Regressions: squared error, Pearson's and Spearman's correlation.
    Columns and labels are those that the adapter was trained with.

    \b
    Examples:
      lorank eval --adapter runs/sst2 --data dev.tsv
      lorank eval --adapter a=runs/one --adapter b=runs/two --base --data dev.jsonl --json
      lorank eval --model HuggingFaceTB/SmolLM2-135M --data dev.jsonl --prompt question --completion answer
    """
    from .. import surgery
    from ..data import in_order, open_source
    from ..runs.loading import load_adapted, require_trained_base
    from ..tasks.base import evaluating, to_device

    if not adapter and model is None:
        raise AdapterError("nothing to score: give an --adapter, or a --model")
    given = {"prompt": prompt, "completion": completion, "messages": messages, "text": text}
    given |= {"text_pair": text_pair, "label": label}
    records = open_source(data, split, limit)
    with err.status("loading the model ..."):
        loaded = load_adapted(
            model, adapter or [], task=task, dtype=dtype, device=device, allow_other_base=allow_other_base
        )
    chosen = _task(loaded, given, records, data, max_length)
    examples, remarks = chosen.cut(chosen.examples(records))
    for remark in remarks:
        say(f"note: {remark}")
    if not examples:
        raise AdapterError("there is nothing to score: no example has a token or label to predict")
    batches = in_order([len(example.ids) for example in examples], batch_size)
    rows: list[dict[str, Any]] = []
    names = [None] * (base or not loaded.adapters) + list(loaded.adapters)
    if None in names:
        require_trained_base(loaded)
    for name in names:
        surgery.activate(loaded.model, *([name] if name else []))
        from rich.progress import track

        shown = f"scoring {name or 'the base'}"
        with evaluating(loaded.model):
            steps = track(batches, shown, console=err, transient=True, disable=not err.is_terminal)
            collated = (
                to_device(chosen.collate([examples[i] for i in numbers]), loaded.model.device) for numbers in steps
            )
            rows.append({"adapter": name, **chosen.measure(loaded.model, collated)})
    found = {"model": loaded.name, "data": data, "examples": len(examples), "task": chosen.kind, "scores": rows}

    def show() -> None:
        shown = [
            {"adapter": row["adapter"] or "(base)", **{k: number(v) for k, v in row.items() if k != "adapter"}}
            for row in rows
        ]
        table(shown, f"{len(examples):,} examples of {data}", numbers=chosen.scores)

    result(found, as_json, show)


def _task(loaded: Any, given: dict[str, str | None], records: Any, data: str, max_length: int | None) -> Any:
    """Return the task to score: the adapters' own, under what was given."""
    from ..models import longest
    from ..runs.columns import choose_columns
    from ..runs.prepare import make_task
    from ..runs.recipe import Recipe, as_typed

    keys = {name: as_typed(name, value) for name, value in given.items() if value is not None}
    known = {name for name in Recipe.names() if name in loaded.about and loaded.about[name] is not None}
    about = {name: loaded.about[name] for name in known}
    if keys.keys() & {"prompt", "completion", "messages", "text"}:  # another kind of record replaces the adapter's
        about = {
            name: value for name, value in about.items() if name not in ("messages", "text", "prompt", "completion")
        } | {
            name: about[name]
            for name in ("prompt", "completion")
            if name in about and keys.keys() & {"prompt", "completion"}
        }
    recipe = Recipe(**{"model": loaded.name, "data": data, **about, **keys})
    recipe = choose_columns(recipe, records)
    limit = max_length or loaded.about.get("max_length") or min(longest(loaded.model, loaded.base.tokenizer), 1024)
    recipe = dataclasses.replace(recipe, max_length=limit, label_smoothing=0.0)
    labels = loaded.about.get("labels")
    if recipe.task == "classification" and labels is None:
        names = loaded.model.config.id2label
        labels = [names[i].removeprefix("LABEL_") for i in range(len(names))]  # nobody named them: they are numbers
    return make_task(recipe, loaded.base.tokenizer, labels)
