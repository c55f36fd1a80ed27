"""Generation through transformers: many prompts at once, or one as a stream."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import padding_id, prompt_ids
from ..errors import AdapterError, raise_problems
from ..extras import require
from ..prefixes import special_tokens


@dataclass(frozen=True)
class Decoding:
    """How to choose the next token.

    temperature: 0 takes the likeliest; above, tokens are drawn.
    top_p: draw from the likeliest tokens that have this probability together.
    beams: 1, or the width of a beam search.
    length_penalty: a beam search ends with the text of the highest log-probability, divided by its length in tokens to
        this power; more prefers longer texts, and 0 takes the sum.
    no_repeat_ngram_size: no sequence of so many tokens comes twice in prompt and answer; 0 lets it.
    min_new_tokens: the end token is ruled out before so many.
    repetition_penalty: more than 1 makes tokens less likely that were there before, in prompt or answer.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            f"max_new_tokens is {self.max_new_tokens}; it must be at least 1": self.max_new_tokens >= 1,
            f"temperature is {self.temperature}; it must be 0 or more": 0 <= self.temperature < math.inf,
            f"top_p is {self.top_p}; it must be above 0 and at most 1": 0 < self.top_p <= 1,
            f"beams is {self.beams}; it must be at least 1": self.beams >= 1,
            f"length_penalty is {self.length_penalty}; it must be a number": math.isfinite(self.length_penalty),
            f"length_penalty is {self.length_penalty}; it chooses among the texts of a beam search, and beams is 1": (
                self.length_penalty == 1 or self.beams != 1
            ),
            f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; it must be 0 or more": (
                self.no_repeat_ngram_size >= 0
            ),
            f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens, {self.max_new_tokens}": (
                0 <= self.min_new_tokens <= self.max_new_tokens
            ),
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0": (
                0 < self.repetition_penalty < math.inf
            ),
        }
        raise_problems("cannot generate", [problem for problem, holds in rules.items() if not holds])

    def options(self) -> dict[str, Any]:
        """Return what was chosen, as transformers' GenerationConfig calls it."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.beams,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            # Without top_k=0 transformers would draw from the likeliest 50 alone.
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.beams > 1:
            chosen["length_penalty"] = self.length_penalty
        for name in ("no_repeat_ngram_size", "min_new_tokens", "repetition_penalty"):
            if getattr(self, name) != getattr(Decoding, name):
                chosen[name] = getattr(self, name)
        return chosen


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    special_tokens: bool = True,
    batch_size: int = 8,
) -> Iterator[tuple[int, str]]:
    """Yield (number of the prompt, what the model adds to it), a batch at a time, the longest prompts first."""
    encoded = [prompt_ids(tokenizer, prompt, special_tokens) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)
    for begin in range(0, len(order), batch_size):
        numbers = order[begin : begin + batch_size]
        rows = [encoded[i] for i in numbers]
        made = _generate(model, tokenizer, rows, decoding)
        for i, ids in zip(numbers, made, strict=True):
            yield i, tokenizer.decode(ids, skip_special_tokens=True)


def require_room(
    tokenizer: Any,
    prompts: Sequence[str],
    decoding: Decoding,
    most: int,
    *,
    special_tokens: bool = True,
    around: int = 0,
) -> None:
    """Raise AdapterError where a prompt and what may be added to it are longer than what a model reads.

    most: how many tokens it reads. around: how many special tokens an adapter puts around each prompt.
    """
    lengths = [len(prompt_ids(tokenizer, prompt, special_tokens)) for prompt in prompts]
    length = max(lengths)
    if length + around + decoding.max_new_tokens > most:
        special = f" and {around:,} special ones of the adapter" if around else ""
        raise AdapterError(
            f"the longest prompt has {length:,} tokens; with {decoding.max_new_tokens:,} new ones{special} that is "
            f"more than the {most:,} that this model reads. It begins {prompts[lengths.index(length)][:60]!r}"
        )


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    decoding: Decoding,
    show: Callable[[str], None],
    *,
    special_tokens: bool = True,
) -> str:
    """Generate for one prompt, calling `show` with each new stretch of text, and return all of it."""
    streamer = require("transformers", "generating").TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: show(text)
    rows = [prompt_ids(tokenizer, prompt, special_tokens)]
    (ids,) = _generate(model, tokenizer, rows, decoding, streamer=streamer if decoding.beams == 1 else None)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if decoding.beams > 1:
        show(text)
    return text


def _generate(model: Any, tokenizer: Any, rows: list[list[int]], decoding: Decoding, **options: Any) -> list[list[int]]:
    """Return the new tokens of each row; rows are padded on the left, so that all end where generation begins."""
    if not all(rows):
        raise AdapterError("a prompt has no tokens, so that there is nothing to go on from")
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else tokenizer.eos_token_id
    padding = padding_id(tokenizer)
    chosen = decoding.options()
    special = special_tokens(model)
    if special is not None:
        rows = [special.around(array("q", row), 0, len(row)).tolist() for row in rows]
        options["logits_processor"] = _beyond_the_vocabulary(chosen, len(special))
    config = require("transformers", "generating").GenerationConfig(eos_token_id=ends, pad_token_id=padding, **chosen)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return made[:, width:].tolist()


def _beyond_the_vocabulary(chosen: dict[str, Any], special: int) -> list[Any]:
    """Take the rules that look at the tokens so far out of `chosen`; return them for inputs with special tokens.

    These have numbers behind the vocabulary's last, for which there are no scores: the rules see made-up ones.
    """
    transformers = require("transformers", "generating")
    rules = [
        (chosen.pop("repetition_penalty", 1.0), 1.0, transformers.RepetitionPenaltyLogitsProcessor),
        (chosen.pop("no_repeat_ngram_size", 0), 0, transformers.NoRepeatNGramLogitsProcessor),
    ]
    found = [rule(value) for value, off, rule in rules if value != off]

    class Widened(transformers.LogitsProcessor):  # type: ignore[name-defined]
        """A rule that is given scores of the special tokens too."""

        def __init__(self, rule: Any) -> None:
            self.rule = rule

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wide = torch.cat([scores, scores.new_zeros(len(scores), special)], dim=-1)
            return self.rule(input_ids, wide)[:, : scores.shape[-1]]

    return [Widened(rule) for rule in found]
