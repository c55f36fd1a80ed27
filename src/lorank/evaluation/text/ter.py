"""Translation edit rate (Snover et al., 2006), as Tercom computes it and sacrebleu with its defaults."""

from collections.abc import Sequence

from ...extras import require
from .base import Metric, Predictions, References, in_streams, on_one_line


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `ter`: edits of all outputs, each to its nearest reference, by the references' mean length."""
    scorer = require("sacrebleu", "scoring texts by TER").TER()
    outputs = [on_one_line(text) for text in predictions]
    wanted = [[on_one_line(text) for text in ours] for ours in references]
    return {"ter": float(scorer.corpus_score(outputs, in_streams(wanted)).score) / 100}


METRICS = {"ter": Metric(scores, "TER of Tercom, any case, from 0", ("sacrebleu",), more_is_better=False)}
