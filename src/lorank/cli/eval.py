"""lorank eval: score a base and its adapters on held-out data."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdapterError
from .console import UsageError, err, number, result, say, table
from .options import (
    Adapters,
    Beams,
    Device,
    Dtype,
    Json,
    LengthPenalty,
    MaxNewTokens,
    MinNewTokens,
    Model,
    NoRepeat,
    OtherBase,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopP,
    WithBase,
)

_WRITING = "What a language model writes"


def evaluate(
    data: Annotated[
        str, typer.Option("--data", help="a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set")
    ],
    adapter: Adapters = None,
    model: Model = None,
    base: WithBase = False,
    split: Annotated[str, typer.Option(help="split of a hub data set")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="use the first so many records", show_default=False)] = None,
    reader: Annotated[
        str | None,
        typer.Option(help="makes prompts and completions of published data: e2e, webnlg, ...", show_default=False),
    ] = None,
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
    metrics: Annotated[
        str | None,
        typer.Option(
            help="write an answer for each prompt and score it: e2e, webnlg, dart, samsum, wikisql, or names such as "
            "bleu,meteor",
            show_default=False,
            rich_help_panel=_WRITING,
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(help="write prompts, outputs and references here", show_default=False, rich_help_panel=_WRITING),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    no_repeat_ngram: NoRepeat = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Score adapters, and the base, on held-out data.

    Language models: loss and perplexity on the trained tokens, and how many of them are the likeliest. Classifiers:
    loss, accuracy, F1, Matthews' correlation. Regressions: squared error, Pearson's and Spearman's correlation.
    Columns and labels are those that the adapter was trained with.

    With --metrics a language model writes an answer for each different prompt, and is scored on it against the
    completions of all records with this prompt.

    \b
    Examples:
      lorank eval --adapter runs/sst2 --data dev.tsv
      lorank eval --adapter a=runs/one --adapter b=runs/two --base --data dev.jsonl --json
      lorank eval --adapter runs/e2e --data test.csv --metrics e2e --beams 10 --length-penalty 0.9 --no-repeat-ngram 4
      lorank eval --adapter runs/sum --data test.jsonl --metrics samsum,meteor --outputs sum.jsonl
      lorank eval --model HuggingFaceTB/SmolLM2-135M --data dev.jsonl --prompt question --completion answer
    """
    from .. import surgery
    from ..data import open_source
    from ..runs.loading import load_adapted, require_trained_base

    if not adapter and model is None:
        raise UsageError("nothing to score: give an --adapter, or a --model")
    chosen = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "temperature": temperature}
    chosen |= {"top_p": top_p, "beams": beams, "length_penalty": length_penalty}
    chosen |= {"no_repeat_ngram_size": no_repeat_ngram, "repetition_penalty": repetition_penalty}
    writing = _writing(metrics, outputs, chosen | {"seed": seed})
    given = {"prompt": prompt, "completion": completion, "messages": messages, "text": text}
    given |= {"text_pair": text_pair, "label": label}
    records = open_source(data, split, limit, reader)
    with err.status("loading the model ..."):
        loaded = load_adapted(
            model, adapter or [], task=task, dtype=dtype, device=device, allow_other_base=allow_other_base
        )
    names = [None] * (base or not loaded.adapters) + list(loaded.adapters)
    if None in names:
        require_trained_base(loaded)
    tasks = {  # each on the records as it was trained to read them; the base as the first adapter
        name: _task(loaded, name, given, records, data, max_length) for name in names
    }
    about = {"model": loaded.name, "data": data}
    if writing is not None:
        _evaluate_written(loaded, tasks, records, writing, outputs, batch_size, about, as_json)
        return
    rows: list[dict[str, Any]] = []
    for name, one in tasks.items():
        surgery.activate(loaded.model, *([name] if name else []))
        rows.append({"adapter": name, **_score(loaded, one, records, name, batch_size)})
    scores = [{key: value for key, value in row.items() if key != "examples"} for row in rows]
    found = about | {"examples": rows[0]["examples"], "task": loaded.about["task"], "scores": scores}

    def show() -> None:
        alone = "(base)" if loaded.adapters or base else "(the model)"
        shown = [{"adapter": row["adapter"] or alone} | {k: number(row[k]) for k in list(row)[1:]} for row in scores]
        table(shown, f"{found['examples']:,} examples of {data}", numbers=list(shown[0])[1:])

    result(found, as_json, show)


@dataclasses.dataclass(frozen=True)
class _Writing:
    """What --metrics asks for."""

    names: list[str]
    decoding: Any
    seed: int


def _writing(metrics: str | None, outputs: str | None, chosen: dict[str, Any]) -> _Writing | None:
    """Return what is to be written and scored, checked before a model is loaded; None without --metrics."""
    if metrics is None:
        given = [name for name, value in {**chosen, "outputs": outputs}.items() if value is not None]
        if given:
            flags = ", ".join("--" + name.removesuffix("_size").replace("_", "-") for name in given)
            raise UsageError(f"{flags} goes with --metrics: nothing is written without it")
        return None
    from ..evaluation import chosen_metrics, require_metrics
    from .answering import decoding_of

    if outputs and Path(outputs).exists():
        raise AdapterError(f"{outputs} exists; choose another --outputs, or remove it first")
    names = chosen_metrics(metrics)
    require_metrics(names)
    decoding = decoding_of({name: value for name, value in chosen.items() if name != "seed"})
    return _Writing(names, decoding, chosen["seed"] or 0)


def _evaluate_written(
    loaded: Any,
    tasks: dict[str | None, Any],
    records: Any,
    writing: _Writing,
    outputs: str | None,
    batch_size: int,
    about: dict[str, Any],
    as_json: bool,
) -> None:
    import torch

    from .written import ask, counts, keep, scored, show

    torch.manual_seed(writing.seed)
    written = ask(loaded, tasks, records, writing.decoding, batch_size)
    if outputs:  # before they are scored: they took longer
        keep(written, outputs)
        say(f"outputs written to {outputs}")
    rows = scored(written, writing.names)
    found = about | counts(written) | {"task": "causal-lm", "decoding": dataclasses.asdict(writing.decoding)}
    title = f"{found['prompts']:,} prompts of {found['data']}, {found['references']:,} references"
    result(found | {"scores": rows}, as_json, lambda: show(rows, title))


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
    loaded: Any, name: str | None, given: dict[str, str | None], records: Any, data: str, max_length: int | None
) -> Any:
    """Return the task to score: an adapter's own, or the base's, under what was given."""
    from ..prefixes import special_tokens
    from ..runs.columns import choose_columns
    from ..runs.prepare import allowed_length, make_task
    from ..runs.recipe import Recipe, as_typed

    own = loaded.abouts[name] if name else loaded.about
    keys = {key: as_typed(key, value) for key, value in given.items() if value is not None}
    about: dict[str, Any] = {key: own[key] for key in Recipe.names() if own.get(key) is not None}
    about["task"] = loaded.about["task"]
    kinds = {"messages", "text", "prompt", "completion"}
    if keys.keys() & kinds:  # another kind of record replaces the adapter's
        kept = {"prompt", "completion"} if keys.keys() & {"prompt", "completion"} else set()
        about = {name: value for name, value in about.items() if name not in kinds - kept}
    recipe = choose_columns(Recipe(**{"model": loaded.name, "data": data, **about, **keys}), records)
    wanted = max_length or own.get("max_length")
    special = special_tokens(loaded.model, name) if name else None
    limit = allowed_length(wanted, loaded.model, loaded.base.tokenizer, special)
    recipe = dataclasses.replace(recipe, max_length=limit, label_smoothing=0.0)
    labels = own.get("labels") or (loaded.label_names() if recipe.task == "classification" else None)
    made = make_task(recipe, loaded.base.tokenizer, labels)
    made.surround(special, ())
    return made
