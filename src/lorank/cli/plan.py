"""lorank plan: what an adapter would consist of, before anything is loaded."""

from typing import Annotated, Any

import typer

from .console import UsageError, out, result
from .options import Json


def plan(
    model: Annotated[str, typer.Argument(help="a hub id, a folder, or a GGUF file; only its configuration is read")],
    targets: Annotated[
        str, typer.Option(help="layers: names, patterns, all-linear, attention, !exclusions")
    ] = "all-linear",
    method: Annotated[str, typer.Option(help="lora, dora, pissa, vera, ...")] = "lora",
    rank: Annotated[int | None, typer.Option(min=1, help="default: the method's, mostly 8", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="default: twice the rank", show_default=False)] = None,
    train_also: Annotated[str | None, typer.Option(help="modules to train whole", show_default=False)] = None,
    bias: Annotated[str, typer.Option(help="none, adapted or all")] = "none",
    task: Annotated[str, typer.Option(help="causal-lm, classification or regression")] = "causal-lm",
    labels: Annotated[int, typer.Option(min=2, help="labels of a classifier")] = 2,
    dtype: Annotated[str, typer.Option(help="of the base")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="for the memory of a step")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens of an example, for the memory of a step")] = 256,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="recompute activations")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which layers an adapter would change, its parameters and bytes, and the memory of a training step.

    No weights are loaded: the model is built from its configuration on PyTorch's meta device.

    \b
    Examples:
      lorank plan HuggingFaceTB/SmolLM2-135M
      lorank plan HuggingFaceTB/SmolLM2-135M --method vera
      lorank plan roberta-base --task classification --targets query,value --rank 8
      lorank plan path/to/model --targets 'c_attn\\[q,v]' --rank 4 --json
    """
    import torch

    from ..accounting import adapter_bytes, readable
    from ..data import PlainText, Text
    from ..models import empty_base
    from ..runs.prepare import adapt_base, step_memory
    from ..runs.recipe import Recipe
    from ..tasks import CausalLM, Classification, Regression, Task

    if task not in ("causal-lm", "classification", "regression"):
        raise UsageError(f"task is {task!r}; it must be causal-lm, classification or regression")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    keys: dict[str, Any] = {"targets": targets, "rank": rank, "alpha": alpha, "train_also": train_also, "bias": bias}
    keys["method"] = method
    recipe = Recipe(model=model, data="-", task=task, gradient_checkpointing=gradient_checkpointing, **keys)
    empty = empty_base(model, task, dtype=getattr(torch, dtype), labels=labels)
    made = adapt_base(recipe, empty)
    ids = torch.ones(batch_size, length, dtype=torch.long)
    text = Text("text")
    names = [str(i) for i in range(labels)]
    counted: dict[str, tuple[Task, torch.Tensor]] = {
        "causal-lm": (CausalLM(None, length, PlainText(text)), ids),
        "classification": (Classification(None, length, text, None, "label", labels=names), ids[:, 0]),
        "regression": (Regression(None, length, text, None, "label"), ids[:, 0].float()),
    }
    memory = step_memory(empty, counted[task][0], {"input_ids": ids, "labels": counted[task][1]})
    size = adapter_bytes(empty)
    facts: dict[str, Any] = {
        "model": model,
        "task": task,
        "base_parameters": made.base_parameters,
        "trainable_parameters": made.trainable_parameters,
        "adapter_bytes": size,
        "layers": [
            {"name": p.label, "out": p.shape[0], "in": p.shape[1], "rank": p.spec.rank, "parameters": p.parameters}
            for p in made.places
        ],
        "trained_whole": list(made.copies),
        "left_out": made.left_out,
        "memory": None if isinstance(memory, str) else {**vars(memory), "total": memory.total},
    }

    def show() -> None:
        out.print(str(made))
        out.print(f"adapter file: about {readable(size)}")
        if isinstance(memory, str):
            out.print(f"memory of a step: this model cannot be counted without its weights ({memory})")
            return
        parts = ", ".join(f"{name} {readable(amount)}" for name, amount in vars(memory).items())
        shape = f"{batch_size} examples of {length} tokens in {dtype}"
        out.print(f"memory of a step on {shape}, estimated: {readable(memory.total)} ({parts})")

    result(facts, as_json, show)
