"""The share of outputs that are right to the letter."""

from collections.abc import Sequence

from .base import Metric, Predictions, References, on_one_line


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `exact-match`: outputs that equal one of their references but for blanks."""
    pairs = zip(predictions, references, strict=True)
    right = sum(on_one_line(text) in map(on_one_line, ours) for text, ours in pairs)
    return {"exact-match": right / len(predictions)}


METRICS = {"exact-match": Metric(scores, "share of outputs that are a reference but for blanks")}
