"""lorank eval: score a base and its adapters on held-out data."""

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import UsageError, err, number, result, say, table
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
    from ..data import open_source
    from ..runs.loading import load_adapted, require_trained_base

    if not adapter and model is None:
        raise UsageError("nothing to score: give an --adapter, or a --model")
    given = {"prompt": prompt, "completion": completion, "messages": messages, "text": text}
    given |= {"text_pair": text_pair, "label": label}
    records = open_source(data, split, limit)
    with err.status("loading the model ..."):
        loaded = load_adapted(
            model, adapter or [], task=task, dtype=dtype, device=device, allow_other_base=allow_other_base
        )
    names = [None] * (base or not loaded.adapters) + list(loaded.adapters)
    if None in names:
        require_trained_base(loaded)
    rows: list[dict[str, Any]] = []
    for name in names:  # each on the records as it was trained to read them; the base as the first adapter
        surgery.activate(loaded.model, *([name] if name else []))
        chosen = _task(loaded, loaded.abouts[name] if name else loaded.about, given, records, data, max_length)
        rows.append({"adapter": name, **_score(loaded, chosen, records, name, batch_size)})
    scores = [{key: value for key, value in row.items() if key != "examples"} for row in rows]
    found = {
        "model": loaded.name,
        "data": data,
        "examples": rows[0]["examples"],
        "task": loaded.about["task"],
        "scores": scores,
    }

    def show() -> None:
        shown = [{"adapter": row["adapter"] or "(base)"} | {k: number(row[k]) for k in list(row)[1:]} for row in scores]
        table(shown, f"{found['examples']:,} examples of {data}", numbers=list(shown[0])[1:])

    result(found, as_json, show)


def _score(loaded: Any, task: Any, records: Any, name: str | None, batch_size: int) -> dict[str, Any]:
    """Return the scores of what is active on the records, and how many examples they are."""
    from rich.progress import track

    from ..data import in_order
    from ..tasks.base import evaluating, to_device

    examples, remarks = task.cut(task.examples(records))
    for remark in remarks:
        say(f"note: {remark}")
    if not examples:
        raise AdapterError("there is nothing to score: no example has a token or label to predict")
    batches = in_order([len(example.ids) for example in examples], batch_size)
    shown = f"scoring {name or 'the base'}"
    with evaluating(loaded.model):
        steps = track(batches, shown, console=err, transient=True, disable=not err.is_terminal)
        collated = (to_device(task.collate([examples[i] for i in numbers]), loaded.model.device) for numbers in steps)
        return {**task.measure(loaded.model, collated), "examples": len(examples)}


def _task(
    loaded: Any, own: dict[str, Any], given: dict[str, str | None], records: Any, data: str, max_length: int | None
) -> Any:
    """Return the task to score: an adapter's own, under what was given."""
    from ..prefixes import special_tokens
    from ..runs.columns import choose_columns
    from ..runs.prepare import allowed_length, make_task
    from ..runs.recipe import Recipe, as_typed

    keys = {name: as_typed(name, value) for name, value in given.items() if value is not None}
    about: dict[str, Any] = {name: own[name] for name in Recipe.names() if own.get(name) is not None}
    about["task"] = loaded.about["task"]
    kinds = {"messages", "text", "prompt", "completion"}
    if keys.keys() & kinds:  # another kind of record replaces the adapter's
        kept = {"prompt", "completion"} if keys.keys() & {"prompt", "completion"} else set()
        about = {name: value for name, value in about.items() if name not in kinds - kept}
    recipe = choose_columns(Recipe(**{"model": loaded.name, "data": data, **about, **keys}), records)
    wanted = max_length or own.get("max_length")
    special = special_tokens(loaded.model)
    limit = allowed_length(wanted, loaded.model, loaded.base.tokenizer, special)
    recipe = dataclasses.replace(recipe, max_length=limit, label_smoothing=0.0)
    labels = own.get("labels") or (loaded.label_names() if recipe.task == "classification" else None)
    made = make_task(recipe, loaded.base.tokenizer, labels)
    made.surround(special, ())
    return made
