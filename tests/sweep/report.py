"""The Markdown page of a sweep."""

import platform
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from .procedure import IN_FLOAT64, NEEDS_INPUT_GRADIENTS, ROUNDING_SHOWS, Result

_INTRODUCTION = """# Architectures

A tiny model of every family that can be built here, from a small configuration and with random weights, goes through
the same steps: `adapt` with "all-linear" and `tie=True`, two training steps with `check` after each, `merged` and
`merge` against the unmerged outputs, `save` and `load` into a model built anew, `remove`. *Works* means that every one
of them did what it promises: merged outputs within {tolerance:g} of the unmerged ones, loaded ones within 1e-5, an
adapter with an effect.
"""

_KEY = """
*Layers* counts what the adapter changes, by kind. A layer that the given input does not reach (its weight gets no
gradient without any adapter) is left out and counted as unreached.
"""


def page(results: Sequence[Result], tolerance: float, command: str) -> str:
    """Return the page: counts, the command, and a table for every library."""
    counts = Counter(result.outcome for result in results)
    lines = [_INTRODUCTION.format(tolerance=tolerance)]
    lines.append(
        f"{len(results)} families: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()) + "."
    )
    lines.append(
        f"\nMade by `{command}` with torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, in {sum(result.seconds for result in results):.0f} seconds on one thread."
    )
    lines.append(_KEY)
    for outcome, title in _TITLES.items():
        chosen = [result for result in results if result.outcome == outcome]
        if chosen:
            lines += [f"\n## {title}: {len(chosen)}\n", *_table(chosen)]
    return "\n".join(lines) + "\n"


_TITLES = {"works": "Works", "refused": "Refused, with the reason", "FAULT": "Faults", "not run": "Not run here"}


def _table(results: Sequence[Result]) -> list[str]:
    works = results[0].outcome == "works"
    rows = ["| family | model | kind | layers | remarks |", "|---|---|---|---|---|"]
    if not works:
        rows = ["| family | model | kind | reason |", "|---|---|---|---|"]
    for result in results:
        start = [result.family, result.model, result.kind]
        rest = [_layers(result), _remarks(result)] if works else [result.reason]
        rows.append("| " + " | ".join(_cell(text) for text in start + rest) + " |")
    return rows


def _layers(result: Result) -> str:
    return f"{result.layers}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(result.by_kind.items()))


def _remarks(result: Result) -> str:
    parts = [f"{len(result.unused)} unreached"] if result.unused else []
    reasons = {reason: layers for reason, layers in result.left_out.items() if reason != "output head"}
    parts += [f"{len(layers)} left out: {reason}" for reason, layers in reasons.items()]
    parts += [text for text in result.remarks if text.startswith((NEEDS_INPUT_GRADIENTS, IN_FLOAT64, ROUNDING_SHOWS))]
    return "; ".join(parts)


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= 300 else text[:297] + "..."
