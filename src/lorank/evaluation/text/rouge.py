"""ROUGE-1, -2 and -L as papers report them for summaries: F1 of rouge-score, with Porter's stemmer."""

from collections.abc import Sequence

from ...extras import require
from .base import Metric, Predictions, References

_THEIRS = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return the mean F1 over the outputs; of several references, each output's best counts."""
    theirs = [_THEIRS[name] for name in names]
    scorer = require("rouge_score.rouge_scorer", "scoring texts by ROUGE").RougeScorer(theirs, use_stemmer=True)
    found = [scorer.score_multi(list(ours), text) for text, ours in zip(predictions, references, strict=True)]
    return {name: sum(one[_THEIRS[name]].fmeasure for one in found) / len(found) for name in names}


METRICS = {
    name: Metric(scores, f"{theirs} of rouge-score: F1, stemmed, 0 to 1", ("rouge_score",))
    for name, theirs in _THEIRS.items()
}
