"""BLEU, METEOR and TER as papers report them for WebNLG and DART: WebNLG's GenerationEval, on lower-case tokens.

The LoRA paper's code writes outputs and references in lower case, with a blank around every sign that is no letter,
digit or underscore (its `--tokenize --lower`), six references at most of each, and gives them to GenerationEval. This
takes BLEU of Moses' multi-bleu-detok, which is mteval's; METEOR 1.5 and TER after nltk's tokenizer; and as TER the mean
over the outputs of each one's lowest, by pyter. sacrebleu's `ter`, which is Tercom's, counts edits of all outputs
together, with the references' mean length, and gives other numbers.
"""

import re
from collections.abc import Sequence

from ...extras import require
from . import java, mteval
from .base import Metric, Predictions, References

_MOST_REFERENCES = 6


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `bleu-webnlg`, `meteor-webnlg` and `ter-webnlg`."""
    outputs = [separated(text) for text in predictions]
    wanted = [[separated(text) for text in ours[:_MOST_REFERENCES]] for ours in references]
    found: dict[str, float] = {}
    for name in names:
        if name == "bleu-webnlg":
            found[name] = mteval.bleu(outputs, wanted, lowercase=False)
        elif name == "meteor-webnlg":
            found[name] = java.meteor([_words(text) for text in outputs], [[*map(_words, ours)] for ours in wanted])
        else:
            lowest = [min(_ter(text, other) for other in ours) for text, ours in zip(outputs, wanted, strict=True)]
            found[name] = sum(lowest) / len(lowest)
    return found


def separated(text: str) -> str:
    """Return a text in lower case with a blank around each sign that is no letter, digit or underscore."""
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


def _words(text: str) -> str:
    tokenizer = require("nltk.tokenize.destructive", "scoring texts by METEOR and TER").NLTKWordTokenizer()
    return " ".join(tokenizer.tokenize(text))


def _ter(text: str, reference: str) -> float:
    words = _words(reference).split()
    return float(require("pyter", "scoring texts by TER").ter(_words(text).split(), words)) if words else 1.0


METRICS = {
    "bleu-webnlg": Metric(scores, "BLEU of GenerationEval on lower-case tokens, 0 to 1", ("sacrebleu",)),
    "meteor-webnlg": Metric(
        scores, "METEOR 1.5 of GenerationEval on lower-case tokens, 0 to 1", ("pycocoevalcap", "nltk"), java=True
    ),
    "ter-webnlg": Metric(
        scores, "TER of GenerationEval on lower-case tokens, from 0", ("pyter", "nltk"), more_is_better=False
    ),
}
