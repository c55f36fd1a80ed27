"""lorank resize: an adapter with another rank."""

from typing import Annotated

import typer

from .arithmetic import Energy, Force, Output, Pickle, Rank, content_of, free, show_written, wrong_usage
from .console import err, result
from .options import Json


def resize(
    adapter: Annotated[str, typer.Argument(help="folder of an adapter or of a run, or a safetensors file")],
    target: Output,
    rank: Rank = None,
    energy: Energy = None,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter with another rank, as near to it as that rank can be, with the error of every layer.

    A lower rank keeps the directions with the largest singular values. A higher one is exact. With --energy every
    layer gets the lowest rank that keeps this share: 0.95 is a relative error of at most 22 %. No base is needed.

    \b
    Examples:
      lorank resize adapters/sst2 --rank 4 --output adapters/small
      lorank resize runs/e2e --energy 0.99 --output adapters/small
    """
    from ..arithmetic import resize as resize_content, write
    from ..arithmetic.factors import require_rank_or_energy

    with wrong_usage():
        require_rank_or_energy(rank, energy)
    folder = free(target, force)
    content = content_of(adapter, allow_pickle)
    with err.status("resizing ..."):
        made, report = resize_content(content, rank, energy=energy)
    write(made, folder)
    facts = {"output": target, "adapter": adapter, "rank": rank, "energy": energy, **report.to_json()}
    result(facts, as_json, lambda: show_written(report, folder))
