"""lorank inspect: what is in an adapter file, and what looks wrong with it."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import number, out, result, table
from .options import Json


def inspect(
    adapter: Annotated[str, typer.Argument(help="folder of an adapter or of a run, or a file in any format")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="open a pickle, if you trust its origin")
    ] = False,
    alpha: Annotated[
        float | None, typer.Option(help="of a file that does not store it (loralib)", show_default=False)
    ] = None,
    parts: Annotated[
        str | None, typer.Option(help="of a fused projection that a loralib file adapts: q,v", show_default=False)
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all", help="every layer, not only one line for those that are alike")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show an adapter's layers, ranks, scales, norms and size, and values that look wrong. No base is needed.

    The exit code is 1 when something is wrong with it: NaN or Inf, tensors that are no pair, settings that cannot be
    honoured. What is merely odd, such as a factor of zeros, is a remark.

    \b
    Examples:
      lorank inspect runs/e2e
      lorank inspect adapters/sst2 --all --json
      lorank inspect mnli.bin --alpha 16 --allow-pickle
    """
    from ..accounting import readable
    from ..examining import examine
    from ..runs.loading import folder_of

    place = folder_of(adapter)
    named = tuple(part.strip() for part in parts.split(",")) if parts else ()
    found = examine(place, allow_pickle=allow_pickle, alpha=alpha, parts=named)
    facts = found.to_json()

    def show() -> None:
        rows = [_row([layer]) for layer in found.layers] if all_layers else [_row(g) for g in found.groups()]
        if all(layer.method == "lora" for layer in found.layers):
            rows = [{key: value for key, value in row.items() if key != "method"} for row in rows]
        if rows:
            table(rows, numbers=("layers", "rank", "alpha", "scale", "norm of ΔW", "parameters"))
        for one in found.beside:
            out.print(f"{one.settings}, with {one.modules} modules: {one.parameters:,} parameters")
            out.print(f"at inference: {one.inference}")
        for kind, names in (("trained whole", found.copies), ("bias", found.biases)):
            if names:
                out.print(f"{kind}: {', '.join(_grouped(names))}")
        for name, ids in found.tokens.items():
            out.print(f"rows of {len(ids)} tokens: {name}")
        for name, source in found.tied.items():
            out.print(f"tied: {name} has the update of {source}")
        in_layers = f" in {len(found.layers)} layers" if found.layers else ""
        out.print(f"{found.parameters:,} parameters{in_layers}, {readable(found.bytes)} in {Path(place)}")
        if found.base_model:
            out.print(f"base: {found.base_model}")
        for key, value in found.about.items():
            out.print(f"{key}: {value!r}" if isinstance(value, str) else f"{key}: {value}")
        for remark in found.remarks:
            out.print(f"remark: {remark}")
        for problem in found.problems:
            out.print(f"PROBLEM: {problem}", style="bold red")
        if not found.remarks and not found.problems:
            out.print("nothing looks wrong")

    result(facts, as_json, show)
    if found.problems:
        raise typer.Exit(1)


def _grouped(names: list[str]) -> list[str]:
    """Return names with those that differ in numbers alone as one."""
    from ..names import in_order
    from ..planned import joined

    groups: dict[str, list[str]] = {}
    for name in in_order(names):
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return [joined(group) for group in groups.values()]


def _row(layers: list[Any]) -> dict[str, Any]:
    """Return one line for layers that differ in nothing but their number."""
    from ..planned import joined

    norms = [layer.norm for layer in layers if layer.norm is not None]
    low, high = min(norms, default=0.0), max(norms, default=0.0)
    norm = number(low) if low == high else f"{number(low)} to {number(high)}"
    first = layers[0]
    return {
        "layer": joined([layer.name for layer in layers]),
        "layers": len(layers),
        "method": first.method,
        "rank": first.rank,
        "alpha": "" if first.alpha is None else f"{first.alpha:g}",
        "scale": f"{first.scale:g}",
        "out x in": " x ".join(map(str, first.shape or ("?",))),
        "dtype": first.dtype,
        "norm of ΔW": norm if norms else "depends on the base",
        "parameters": f"{sum(layer.parameters for layer in layers):,}",
    }
