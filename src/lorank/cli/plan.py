"""lorank plan: what methods would train and cost, before anything is loaded."""

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import enumerate_names
from .console import UsageError, out, result, say, table
from .options import Json

_STEP = "The step that is counted"


def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="a hub id, a folder or a GGUF file, of which only the configuration is read; gpt3-175b; or one of the "
            "paper's: paper/roberta-base, paper/roberta-large, paper/deberta-v2-xxlarge, paper/gpt2-medium, "
            "paper/gpt2-large",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="lora, dora, pissa, ..., full, bitfit, adapter-h, ..., lora+prefix-embedding; "
            "default: LoRA and each baseline side by side",
            show_default=False,
        ),
    ] = None,
    method_options: Annotated[
        str, typer.Option(help="what else the method has: '{size: 16}'", show_default=False)
    ] = "{}",
    targets: Annotated[
        str, typer.Option(help="layers: names, patterns, all-linear, attention, !exclusions")
    ] = "all-linear",
    rank: Annotated[int | None, typer.Option(min=1, help="default: the method's, mostly 8", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="default: twice the rank", show_default=False)] = None,
    train_also: Annotated[str | None, typer.Option(help="modules to train whole", show_default=False)] = None,
    bias: Annotated[str, typer.Option(help="none, adapted or all")] = "none",
    task: Annotated[str, typer.Option(help="causal-lm, classification or regression")] = "causal-lm",
    labels: Annotated[int, typer.Option(min=2, help="labels of a classifier")] = 2,
    dtype: Annotated[str, typer.Option(help="of the base", rich_help_panel=_STEP)] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="examples", rich_help_panel=_STEP)] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens of an example", rich_help_panel=_STEP)] = 256,
    accumulate: Annotated[int, typer.Option(min=1, help="batches that make a step", rich_help_panel=_STEP)] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="recompute activations", rich_help_panel=_STEP)
    ] = False,
    optimiser_states: Annotated[
        int,
        typer.Option(
            min=0, help="numbers kept for each trained one: 2 for AdamW, 1 for momentum", rich_help_panel=_STEP
        ),
    ] = 2,
    device: Annotated[str, typer.Option(help="whose kernels: cpu or cuda", rich_help_panel=_STEP)] = "cpu",
    paper: Annotated[
        bool, typer.Option("--paper", help="the paper's numbers of parameters and claims on memory, recounted")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what methods would train on a model, and what a step and the result take: parameters, bytes, operations.

    No weights are loaded: the model is built from its configuration on PyTorch's meta device, and a step of training is
    followed there.

    \b
    Examples:
      lorank plan gpt3-175b --targets 'c_attn\\[q,v]' --dtype float16 --batch-size 1 --length 2048
      lorank plan HuggingFaceTB/SmolLM2-135M
      lorank plan HuggingFaceTB/SmolLM2-135M --method vera
      lorank plan roberta-base --task classification --targets query,value --method lora --rank 8
      lorank plan path/to/model --targets 'c_attn\\[q,v]' --rank 4 --json
      lorank plan path/to/model --method adapter-h --method-options '{size: 16}'
      lorank plan --paper
    """
    if paper:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if others := [name for name in given if name not in ("paper", "as_json")]:
            named = enumerate_names([name if name == "model" else "--" + name.replace("_", "-") for name in others])
            raise UsageError(f"--paper counts the paper's own models and methods; it takes no {named}")
        _paper(as_json)
        return
    if model is None:
        raise typer.BadParameter("give a model, or --paper", param_hint="model")
    for name, value, known in (
        ("task", task, ("causal-lm", "classification", "regression")),
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in known:
            raise UsageError(f"{name} is {value!r}; it must be {', '.join(known[:-1])} or {known[-1]}")
    import torch

    from ..runs.costs import StepShape, method_costs
    from ..runs.recipe import Recipe, parse_overrides

    keys: dict[str, Any] = {"task": task, "accumulate": accumulate, "gradient_checkpointing": gradient_checkpointing}
    keys |= {"train_also": train_also, **parse_overrides([f"method_options={method_options}"])}
    of_updates: dict[str, Any] = {"targets": targets, "rank": rank, "alpha": alpha, "bias": bias}
    shape = StepShape(batch_size, length, getattr(torch, dtype), labels, device, optimiser_states)
    asked = f"{batch_size} x {length} tokens in {dtype}"
    if method is not None:
        recipe = Recipe(model=model, data="-", method=method, **keys, **of_updates)
        _one(model, recipe, method_costs(recipe, shape), asked, as_json)
        return
    if keys["method_options"]:
        raise UsageError("--method-options needs the --method that has them")
    _side_by_side(model, keys, of_updates, shape, asked, as_json)


def _one(model: str, recipe: Any, costs: Any, asked: str, as_json: bool) -> None:
    """Show one method with its layers."""
    from ..accounting import readable

    made = costs.plan
    facts: dict[str, Any] = {
        "model": model,
        "task": recipe.task,
        **_facts(recipe.method, costs),
        "layers": [
            {"name": p.label, "out": p.shape[0], "in": p.shape[1], "rank": p.spec.rank, "parameters": p.parameters}
            for p in made.places
        ],
        "trained_whole": list(made.copies),
        "left_out": made.left_out,
    }

    def show() -> None:
        out.print(str(made))
        out.print(f"{'checkpoint' if made.whole else 'adapter file'}: about {readable(costs.checkpoint_bytes)}")
        if not made.baselines:  # whose own lines say it
            out.print(f"at inference: {costs.inference}")
        if isinstance(costs.step, str):
            out.print(f"a step: this model cannot be counted without its weights ({costs.step})")
            return
        memory = costs.step.memory
        parts = ", ".join(f"{name} {readable(amount)}" for name, amount in vars(memory).items())
        out.print(f"memory of a step on {asked}, estimated: {readable(memory.total)} ({parts})")
        forward, step = (costs.per_token(flops) for flops in (costs.step.forward_flops, costs.step.step_flops))
        out.print(f"operations a token: {forward:,} forward, {step:,} in a step")

    result(facts, as_json, show)


def _facts(method: str, costs: Any) -> dict[str, Any]:
    """Return what both forms say of a method as JSON; all numbers are whole."""
    step = None if isinstance(costs.step, str) else costs.step
    return {
        "method": method,
        "base_parameters": costs.plan.base_parameters,
        "trainable_parameters": costs.trainable_parameters,
        "checkpoint_bytes": costs.checkpoint_bytes,
        "memory": step and {**vars(step.memory), "total": step.memory.total},
        "forward_flops_per_token": step and costs.per_token(step.forward_flops),
        "step_flops_per_token": step and costs.per_token(step.step_flops),
        "not_counted": costs.step if step is None else None,
        "inference": costs.inference,
    }


def _side_by_side(
    model: str, keys: dict[str, Any], of_updates: dict[str, Any], shape: Any, asked: str, as_json: bool
) -> None:
    """Show LoRA and each baseline, a row a method."""
    from ..accounting import readable
    from ..errors import AdapterError
    from ..runs.costs import method_costs
    from ..runs.recipe import BASELINES, Recipe

    facts: list[dict[str, Any]] = []
    rows: list[dict[str, str]] = []
    remarks: list[str] = []
    base = 0
    for method in ("lora", *BASELINES):
        own = of_updates if method == "lora" else {}
        options = keys if method != "full" else {**keys, "train_also": None}
        recipe = Recipe(model=model, data="-", method=method, **options, **own)
        try:
            costs = method_costs(recipe, shape)
        except AdapterError as error:
            if method == "lora":
                raise
            reason = str(error).replace("\n", " ")
            facts.append({"method": method, "does_not_apply": reason})
            rows.append(_row(method))
            remarks.append(f"{method} does not apply: {reason}")
            continue
        spec = str(costs.plan.baselines[0] if costs.plan.baselines else costs.plan.spec)
        if not costs.plan.baselines:
            spec = f"lora ({spec})"
        base = costs.plan.base_parameters
        facts.append({"spec": spec, **_facts(method, costs), "does_not_apply": None})
        row = _row(
            spec,
            parameters=f"{costs.trainable_parameters:,}",
            share=f"{costs.trainable_parameters / max(base, 1):.4%}",
            checkpoint=readable(costs.checkpoint_bytes),
        )
        if isinstance(costs.step, str):
            remarks.append(f"{method}: a step cannot be counted without the model's weights ({costs.step})")
        else:
            memory = costs.step.memory
            row |= {
                "weights": readable(memory.base + memory.adapter),
                **{name: readable(getattr(memory, name)) for name in ("gradients", "optimiser", "activations")},
                "peak": readable(memory.total),
                "forward": f"{costs.per_token(costs.step.forward_flops):.3e}",
                "step": f"{costs.per_token(costs.step.step_flops):.3e}",
            }
        rows.append(row)
        remarks.append(f"{method} at inference: {costs.inference}")

    def show() -> None:
        out.print(f"{model}: {base:,} parameters; a step on {asked}")
        table(rows, numbers=[name for name in rows[0] if name != "method"])
        out.print(
            "(activations: at the moment of the peak, which with many gradients is late, when most are freed again; "
            "forward, step: operations for each token of the text)"
        )
        for remark in remarks:
            out.print(remark)

    step = {name: str(value).removeprefix("torch.") for name, value in vars(shape).items() if name == "dtype"}
    step |= {name: value for name, value in vars(shape).items() if name != "dtype"}
    result({"model": model, "task": keys["task"], "step": step, "methods": facts}, as_json, show)


def _row(method: str, **known: str) -> dict[str, str]:
    columns = ("parameters", "share", "checkpoint", "weights", "gradients", "optimiser", "activations", "peak")
    return {"method": method, **dict.fromkeys((*columns, "forward", "step"), "-"), **known}


def _paper(as_json: bool) -> None:
    """Show the paper's numbers of parameters beside those of the modules, and what follows for memory and storage."""
    from ..accounting.claims import claims, holdings
    from ..accounting.paper import Verdict, verdicts
    from ..accounting.paper_rows import ERRATA

    def facts_of(found: Verdict) -> dict[str, Any]:
        row = found.row
        return {
            "table": row.table,
            "row": row.label,
            "printed": row.printed,
            "counted": found.counted,
            "verdict": found.verdict,
            "reason": found.reason,
            "setting": row.setting,
            "model": row.model,
            "method": [method.to_json() for method in row.method],
            "targets": list(row.targets),
        }

    def shown(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        return [
            {
                **{name: row[name] for name in ("table", "row", "printed")},
                "counted": f"{row['counted']:,}",
                "verdict": row["verdict"],
                "": "; ".join(filter(None, (row["reason"], row["setting"]))),
            }
            for row in rows
        ]

    rows, errata = [[facts_of(found) for found in verdicts(given)] for given in (None, ERRATA)]
    held = [{**dataclasses.asdict(holding), "times": round(holding.times, 2)} for holding in holdings()]
    claimed = [dataclasses.asdict(claim) for claim in claims()]

    def show() -> None:
        numbers = ("printed", "counted")
        table(shown(rows), "Trained parameters, Tables 1 to 5 and 15", numbers)
        out.print()
        table(shown(errata), "Where the paper contradicts itself", numbers)
        out.print()
        sizes = [{**row, **{name: f"{row[name] / 1e9:,.1f} GB" for name in ("full", "lora")}} for row in held]
        table(sizes, "Memory of training GPT-3 175B: Adam fine-tuning, and LoRA with r = 4 on Wq and Wv")
        out.print()
        table(claimed, "Claims")
        kinds = [sum(row["verdict"] == kind for row in rows) for kind in ("exact", "rounded", "differs")]
        say(f"{len(rows)} figures: {kinds[0]} exact, {kinds[1]} rounded in another way, {kinds[2]} differ")

    result({"rows": rows, "errata": errata, "holdings": held, "claims": claimed}, as_json, show)
