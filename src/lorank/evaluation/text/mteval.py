"""BLEU and NIST as the E2E challenge computes them: those of NIST's mteval-v13a, without regard to case.

BLEU is sacrebleu's, whose default tokenizer is mteval's. NIST is Doddington's (2002), as mteval-v13a has it: the
information of an n-gram comes from all references of the set, an n-gram of the output counts as often as the one
reference that has most of it, and the length is compared with the references' mean length. nltk's `corpus_nist` takes
the best single reference instead, and gives other numbers wherever there are several.
"""

import math
from collections import Counter
from collections.abc import Sequence

from ...extras import require
from .base import Metric, Predictions, References, in_streams, on_one_line

_LONGEST = 5  # words of an n-gram
# The length penalty is a half where the output has two thirds of the references' length.
_BETA = math.log(0.5) / math.log(1.5) ** 2


def bleu(predictions: Predictions, references: References, lowercase: bool = True) -> float:
    """Return corpus BLEU from 0 to 1, of n-grams up to 4, with no smoothing: 0 where none of 4 words matches."""
    scorer = require("sacrebleu", "scoring texts by BLEU").BLEU(lowercase=lowercase, smooth_method="none", force=True)
    return float(scorer.corpus_score(list(predictions), in_streams(references)).score) / 100


def nist(predictions: Predictions, references: References) -> float:
    """Return NIST's score, of n-grams up to 5; it has no upper bound."""
    tokenizer = require("sacrebleu.tokenizers.tokenizer_13a", "scoring texts by NIST").Tokenizer13a()

    def words(text: str) -> list[str]:
        return tokenizer(text.lower()).split()

    outputs = [words(text) for text in predictions]
    wanted = [[words(text) for text in ours] for ours in references]
    seen: Counter[tuple[str, ...]] = Counter()  # how often all references have an n-gram; of none, their words
    for reference in (reference for ours in wanted for reference in ours):
        seen[()] += len(reference)
        for n in range(1, _LONGEST + 1):
            seen.update(_ngrams(reference, n))

    score = 0.0
    for n in range(1, _LONGEST + 1):
        information = total = 0.0
        for output, ours in zip(outputs, wanted, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in ours:
                most |= Counter(_ngrams(reference, n))
            matched = Counter(_ngrams(output, n)) & most
            information += sum(count * math.log2(seen[ngram[:-1]] / seen[ngram]) for ngram, count in matched.items())
            total += max(len(output) - n + 1, 0)
        score += information / max(total, 1.0)
    mean = sum(sum(map(len, ours)) / len(ours) for ours in wanted)
    return score * _length_penalty(sum(map(len, outputs)) / mean if mean else 0.0)


def _length_penalty(ratio: float) -> float:
    return 1.0 if ratio >= 1 else math.exp(_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `bleu` and `nist`."""
    outputs = [on_one_line(text) for text in predictions]
    wanted = [[on_one_line(text) for text in ours] for ours in references]
    return {name: {"bleu": bleu, "nist": nist}[name](outputs, wanted) for name in names}


METRICS = {
    "bleu": Metric(scores, "BLEU of mteval-v13a, any case, 0 to 1", ("sacrebleu",)),
    "nist": Metric(scores, "NIST of mteval-v13a, any case, from 0", ("sacrebleu",)),
}
