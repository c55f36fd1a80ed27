"""lorank combine: one adapter for several, as a weighted sum, by TIES or by DARE."""

from typing import Annotated, Any

import typer

from .arithmetic import Force, Output, Pickle, content_of, free, show_written, wrong_usage
from .console import UsageError, err, result
from .options import Json, OtherBase


def combine(
    adapters: Annotated[list[str], typer.Argument(help="folders of adapters or of runs, PATH or NAME=PATH")],
    target: Output,
    weights: Annotated[
        str | None,
        typer.Option(help="one for each, 0.7,-0.3: a negative one takes away; default: 1 each", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="exact, svd, ties, dare or dare-ties")] = "exact",
    rank: Annotated[
        int | None,
        typer.Option(help="at most so many; default: the sum (exact), or the largest (the others)", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="the share of numbers that ties keeps, or the probability in dare", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="of what dare drops")] = 0,
    whole: Annotated[
        str | None,
        typer.Option(
            help="the adapter whose heads, biases and rows of tokens are taken where they differ", show_default=False
        ),
    ] = None,
    allow_other_base: OtherBase = False,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Combine adapters of one base into one. No base is needed.

    exact: the weighted sum of the updates; ranks add up, and nothing is lost. svd: the same sum in a lower rank.
    ties (Yadav et al. 2023): of each update the largest numbers, where they agree in sign. dare (Yu et al. 2023):
    each update with numbers dropped at random, the others enlarged. Both work on ΔW, and are brought to a rank
    afterwards; the error of every layer is reported.

    \b
    Examples:
      lorank combine adapters/sst2 adapters/polite --weights 0.7,0.3 --output adapters/both
      lorank combine a=runs/e2e b=runs/qa --method ties --density 0.2 --rank 16 --output adapters/ties
    """
    from ..arithmetic import combine as combine_contents, write
    from ..arithmetic.combine import require_options
    from ..runs.loading import named

    with wrong_usage():
        places = named(adapters)
        amounts = _amounts(weights, len(places))
        require_options(
            {name: (None, amount) for name, amount in zip(places, amounts, strict=True)}, method, rank, density, whole
        )
    folder = free(target, force)
    contents = {name: content_of(path, allow_pickle) for name, path in places.items()}
    options: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed, "whole": whole}
    with err.status("combining ..."):
        made, report = combine_contents(
            {name: (contents[name], amount) for name, amount in zip(places, amounts, strict=True)},
            **options,
            allow_other_base=allow_other_base,
        )
    write(made, folder)
    facts = {"output": target, "adapters": dict(zip(places, amounts, strict=True)), **options, **report.to_json()}
    result(facts, as_json, lambda: show_written(report, folder))


def _amounts(weights: str | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        amounts = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UsageError(f"weights are {weights!r}; give numbers, as in 0.7,0.3") from None
    if len(amounts) != count:
        raise UsageError(f"{len(amounts)} weights for {count} adapters; give one for each")
    return amounts
