"""METEOR, ROUGE-L and CIDEr as the E2E challenge computes them: those of the COCO caption scorer."""

from collections.abc import Sequence

from ...extras import require
from . import java
from .base import Metric, Predictions, References

_PURPOSE = "scoring texts by ROUGE-L and CIDEr"


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `meteor`, `rouge-l-coco` and `cider`, of texts that are tokenised once."""
    flat = java.ptb_tokenized([*predictions, *(text for ours in references for text in ours)])
    outputs, rest = flat[: len(predictions)], iter(flat[len(predictions) :])
    wanted = [[next(rest) for _ in ours] for ours in references]
    of_output = {i: [text] for i, text in enumerate(outputs)}  # pycocoevalcap's form
    of_reference = dict(enumerate(wanted))
    found: dict[str, float] = {}
    for name in names:
        if name == "meteor":
            found[name] = java.meteor(outputs, wanted)
        elif name == "rouge-l-coco":
            scorer = require("pycocoevalcap.rouge.rouge", _PURPOSE).Rouge()
            found[name] = float(scorer.compute_score(of_reference, of_output)[0])
        else:
            scorer = require("pycocoevalcap.cider.cider", _PURPOSE).Cider()
            found[name] = float(scorer.compute_score(of_reference, of_output)[0])
    return found


_NEEDS = ("pycocoevalcap",)
METRICS = {
    "meteor": Metric(scores, "METEOR 1.5 of the COCO caption scorer, 0 to 1", _NEEDS, java=True),
    "rouge-l-coco": Metric(
        scores, "ROUGE-L of the COCO caption scorer (F with beta 1.2, no stemming), 0 to 1", _NEEDS, java=True
    ),
    "cider": Metric(scores, "CIDEr-D of the COCO caption scorer, 0 to 10", _NEEDS, java=True),
}
