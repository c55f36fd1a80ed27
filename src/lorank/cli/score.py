"""lorank score: score written outputs again, without a model."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import AdapterError
from .console import result
from .options import Json


def score(
    outputs: Annotated[str, typer.Argument(help="JSON lines with output and references", show_default=False)],
    metrics: Annotated[
        str, typer.Option(help="scores and presets, with commas between: e2e, webnlg, dart, samsum, wikisql, bleu, ...")
    ],
    as_json: Json = False,
) -> None:
    """Score outputs that lorank eval --outputs wrote, or another program.

    Each line is {"output": "...", "references": ["...", "..."]}, with "adapter" where the file has outputs of several.
    The same scores come out as from lorank eval.

    \b
    Examples:
      lorank score e2e.jsonl --metrics e2e
      lorank score e2e.jsonl --metrics bleu,nist,ter --json
    """
    from ..evaluation import chosen_metrics, require_metrics
    from .written import counts, kept, scored, show

    if not Path(outputs).is_file():
        raise AdapterError(f"there is no file {outputs}")
    names = chosen_metrics(metrics)
    require_metrics(names)
    found = kept(outputs)
    rows = scored(found, names)
    data = {"outputs": outputs, **counts(found), "scores": rows}
    count, references = data["prompts"], data["references"]
    result(data, as_json, lambda: show(rows, f"{count:,} outputs of {outputs}, {references:,} references"))
