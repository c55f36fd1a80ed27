"""What a score of texts is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Predictions = Sequence[str]
References = Sequence[Sequence[str]]  # of each prediction, at least one
Compute = Callable[[Sequence[str], Predictions, References], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A score of a whole set of texts.

    compute: from (names of scores, predictions, references) to these scores; those of a family share its function, so
        that what they have in common is done once.
    packages: modules that it needs.
    java: whether it starts one.
    """

    compute: Compute
    about: str
    packages: tuple[str, ...] = ()
    java: bool = False
    more_is_better: bool = True


def on_one_line(text: str) -> str:
    """Return a text with each run of blanks and line breaks as one blank: scorers read a text a line."""
    return " ".join(text.split())


def in_streams(references: References) -> list[list[str | None]]:
    """Return references as sacrebleu takes them: the first of every text, the second of every text, and so on."""
    most = max(map(len, references))
    return [[ours[i] if i < len(ours) else None for ours in references] for i in range(most)]
