"""lorank diff: how two adapters differ, layer by layer."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .arithmetic import Pickle, content_of
from .console import number, out, result, table
from .options import Json


def diff(
    first: Annotated[str, typer.Argument(help="folder of an adapter or of a run, or a safetensors file")],
    second: Annotated[str, typer.Argument(help="the other one")],
    allow_pickle: Pickle = False,
    all_layers: Annotated[
        bool, typer.Option("--all", help="every layer, not only one line for those that are alike")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how large the updates of two adapters are, how far apart, and how much of their directions they share.

    cosine is that of the two ΔW as vectors. φ is the subspace similarity of the LoRA paper (section 7.2) at the
    smaller rank, from 0 for orthogonal directions to 1 for the same: of the factors A, and of the inputs and outputs
    of ΔW. One line stands for layers that differ in their numbers only, and has their means. No base is needed.

    \b
    Examples:
      lorank diff adapters/sst2 adapters/mnli
      lorank diff runs/seed1 runs/seed2 --all --json
    """
    from ..arithmetic import diff as diff_contents

    found = diff_contents(content_of(first, allow_pickle), content_of(second, allow_pickle))

    def show() -> None:
        groups: dict[str, list[Any]] = {}
        for row in found.rows:
            groups.setdefault(row.label if all_layers else re.sub(r"\b\d+\b", "*", row.label), []).append(row)
        rows = [_row(group) for group in groups.values()]
        if rows:
            table(rows, numbers=list(rows[0])[1:])
        cosine = "" if found.cosine is None else f", cosine {number(found.cosine)}"
        norms = f"{number(found.norms[0])} and {number(found.norms[1])}"
        out.print(f"all layers: norms {norms}, distance {number(found.distance)}{cosine}")
        for name, gap in found.whole.items():
            what = "in one of them alone, or of another shape" if gap is None else f"differs by up to {number(gap)}"
            out.print(f"trained whole: {name} {what}")
        for note in found.notes:
            out.print(f"note: {note}")

    result({"first": first, "second": second, **found.to_json()}, as_json, show)


def _row(rows: Sequence[Any]) -> dict[str, Any]:
    """Return one line for layers that differ in nothing but their number, with their means."""
    from ..planned import joined

    def mean(value: Callable[[Any], float | None]) -> str:
        values = [found for row in rows if (found := value(row)) is not None]
        return number(sum(values) / len(values)) if values else "-"

    ranks = [sorted({str(row.ranks[i] or "-") for row in rows}) for i in (0, 1)]
    return {
        "layer": joined([row.label for row in rows]),
        "layers": len(rows),
        "ranks": " and ".join("/".join(found) for found in ranks),
        "norm 1": mean(lambda row: row.norms[0]),
        "norm 2": mean(lambda row: row.norms[1]),
        "distance": mean(lambda row: row.distance),
        "cosine": mean(lambda row: row.cosine),
        "φ of A": mean(lambda row: row.of_A),
        "φ inputs": mean(lambda row: row.of_inputs),
        "φ outputs": mean(lambda row: row.of_outputs),
    }
