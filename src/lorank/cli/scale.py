"""lorank scale: an adapter times a number; times -1 it is negated."""

from typing import Annotated, Any

import typer

from .arithmetic import Force, Output, Pickle, content_of, free
from .console import UsageError, out, result
from .options import Json


def scale(
    adapter: Annotated[str, typer.Argument(help="folder of an adapter or of a run, or a safetensors file")],
    factor: Annotated[float, typer.Argument(help="what every ΔW is multiplied by; -1 negates the adapter")],
    target: Output,
    whole: Annotated[
        str | None,
        typer.Option(help="keep or drop what was trained whole (heads, biases, rows of tokens)", show_default=False),
    ] = None,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter with every update multiplied by a number. A factor of -1 negates it.

    Exact: the size goes into alpha, the sign into B. What was trained whole is no update, and cannot be scaled without
    its base: keep it as it is, or drop it. No base is needed.

    \b
    Examples:
      lorank scale adapters/toxic -1 --output adapters/less-toxic
      lorank scale runs/e2e 0.5 --output adapters/half
    """
    if not factor or factor != factor or abs(factor) == float("inf"):
        raise UsageError(f"the factor is {factor}; it must be a finite number other than 0")
    if whole not in (None, "keep", "drop"):
        raise UsageError(f"whole is {whole!r}; it must be keep or drop")
    from ..arithmetic import scaled, write

    folder = free(target, force)
    chosen: Any = whole
    made = scaled(content_of(adapter, allow_pickle), factor, whole=chosen)
    write(made, folder)
    facts = {"output": target, "adapter": adapter, "factor": factor, "layers": list(made.updates)}

    def show() -> None:
        out.print(f"multiplied {len(made.updates)} layers by {factor:g}")
        out.print(f"written to {folder}")

    result(facts, as_json, show)
