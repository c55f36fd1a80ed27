"""From text to tokens, with a mark on each that is trained on."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rendering import Segment

IGNORED = -100  # the label of a token that is read and not trained on; PyTorch's and transformers' own number


@dataclass(frozen=True)
class Example:
    """One encoded record."""

    ids: array  # token ids
    labels: array | float  # of a language model: a label a token, or IGNORED; else the number of the label, or a value
    types: array | None = None  # token types, where the model has them


def padding_id(tokenizer: Any) -> int:
    """Return the token with which rows are filled up; a mask hides it, so that any will do where there is none."""
    own = getattr(tokenizer, "pad_token_id", None)
    return own if own is not None else getattr(tokenizer, "eos_token_id", None) or 0


def encode_segments(tokenizer: Any, rows: Sequence[Sequence[Segment]], special_tokens: bool) -> list[Example]:
    """Return each row's tokens; with `special_tokens`, between what the tokenizer puts in front and the end token.

    Where the tokens of a longer text begin with those of the shorter one, they are taken as they are. Where they do
    not, because a token would reach over the boundary, the next segment is encoded by itself: the model then sees
    in training the very tokens of the prompt that it is given later.
    """
    texts = ["".join(segment.text for segment in row[: i + 1]) for row in rows for i in range(len(row))]
    encoded = iter(_ids(tokenizer, texts, special_tokens)) if texts else iter(())
    end = getattr(tokenizer, "eos_token_id", None) if special_tokens else None
    examples = []
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        exact = True  # the tokens so far are those of the text so far
        for segment, longer in zip(row, encoded, strict=False):
            if exact and longer[: len(ids)] == ids:
                piece = longer[len(ids) :]
            else:
                exact = False
                piece = _continued(tokenizer, segment.text)
            ids += piece
            labels += piece if segment.trained else [IGNORED] * len(piece)
        if end is not None:
            ids.append(end)
            labels.append(end if row and row[-1].trained else IGNORED)
        examples.append(Example(array("i", ids), array("i", labels)))
    return examples


def _continued(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that goes on from another: without the blank that some put before a first word."""
    before, whole = _ids(tokenizer, ["\n", f"\n{text}"], False)
    return whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, [text], False)[0]


def prompt_ids(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Return the tokens of a prompt as training saw them."""
    return _ids(tokenizer, [text], special_tokens)[0]


def _ids(tokenizer: Any, texts: list[str], special_tokens: bool) -> list[list[int]]:
    """Return the tokens of texts, without what the tokenizer would put behind them."""
    found = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    behind = _closing(tokenizer) if special_tokens else 0
    return [ids[: len(ids) - behind] for ids in found] if behind else found


def _closing(tokenizer: Any) -> int:
    """Return how many special tokens the tokenizer puts behind a text."""
    inside, around = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    first = next((i for i in range(len(around)) if around[i : i + len(inside)] == inside), 0)
    return len(around) - first - len(inside)


def pieces(tokenizer: Any, example: Example) -> list[Segment]:
    """Return an encoded text again, cut where trained and untrained tokens meet: what a preview shows."""
    if not isinstance(example.labels, array):
        return [Segment(tokenizer.decode(example.ids), False)]
    found: list[Segment] = []
    begin, before = 0, ""
    marks = [label != IGNORED for label in example.labels]
    for i in range(1, len(marks) + 1):
        if i == len(marks) or marks[i] != marks[begin]:
            # Some tokenizers drop the space in front of what they decode: so each piece is the end of a longer text.
            through = tokenizer.decode(example.ids[:i])
            whole = through.startswith(before)
            piece = through[len(before) :] if whole else tokenizer.decode(example.ids[begin:i])
            found.append(Segment(piece, marks[begin]))
            begin, before = i, through
    return found
