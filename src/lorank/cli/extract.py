"""lorank extract: an adapter from a base and what it was fine-tuned to."""

import re
from typing import Annotated, Any

import typer

from .arithmetic import Energy, Force, Output, Rank, free, show_written, wrong_usage
from .console import UsageError, err, result
from .options import Json


def extract(
    base: Annotated[str, typer.Argument(help="the base: a folder, or a hub id")],
    tuned: Annotated[str, typer.Argument(help="what it was fine-tuned to: a folder, or a hub id")],
    target: Output,
    rank: Rank = None,
    energy: Energy = None,
    targets: Annotated[str, typer.Option(help="layers, as in `lorank train`: q_proj,v_proj")] = "all-linear",
    train_also: Annotated[
        str | None, typer.Option(help="modules to take whole: classifier", show_default=False)
    ] = None,
    bias: Annotated[str, typer.Option(help="biases to take: none, adapted or all")] = "none",
    task: Annotated[
        str | None,
        typer.Option(
            help="causal-lm, classification or regression; default: as the tuned model says", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="where differences are decomposed: cpu, cuda")] = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the adapter that is nearest to what fine-tuning changed, with the error of every layer.

    Both checkpoints are read one tensor at a time; neither model is loaded. What differs and is not in the adapter is
    named: norms, biases and layers that are not targeted.

    \b
    Examples:
      lorank extract path/to/base path/to/tuned --rank 16 --output adapters/tuned
      lorank extract roberta-base path/to/tuned --energy 0.9 --train-also classifier --output adapters/tuned
    """
    from ..arithmetic import extract as extract_adapter
    from ..arithmetic.factors import require_rank_or_energy
    from ..models import checkpoint_folder

    with wrong_usage():
        require_rank_or_energy(rank, energy)
    if bias not in ("none", "adapted", "all"):
        raise UsageError(f"bias is {bias!r}; it must be none, adapted or all")
    if task not in (None, "causal-lm", "classification", "regression"):
        raise UsageError(f"task is {task!r}; it must be causal-lm, classification or regression")
    folder = free(target, force)
    options: Any = {"rank": rank, "energy": energy, "bias": bias, "task": task, "device": device}
    with err.status("extracting ..."):
        found = extract_adapter(
            checkpoint_folder(base),
            checkpoint_folder(tuned),
            _listed(targets),
            train_also=_listed(train_also or ""),
            **options,
        )
    config: Any = getattr(found.model, "config", None)
    if config is not None:
        config._name_or_path = base  # the adapter's file names its base, where that is on the hub
    found.save(folder)
    facts = {"output": target, "base": base, "tuned": tuned, **found.report.to_json(), "left_out": found.left_out}
    result(facts, as_json, lambda: show_written(found.report, folder))


def _listed(text: str) -> list[str]:
    """Return the words of a list with commas; those in brackets belong to one word: c_attn[q,v]."""
    return [word.strip() for word in re.split(r",(?![^\[({]*[\])}])", text) if word.strip()]
