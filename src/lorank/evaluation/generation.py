"""Generation through transformers: many prompts at once, or one as a stream."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import padding_id, prompt_ids
from ..errors import AdapterError
from ..extras import require
from ..prefixes import special_tokens


@dataclass(frozen=True)
class Decoding:
    """How to choose the next token.

    temperature: 0 takes the likeliest; above, tokens are drawn.
    top_p: draw from the likeliest tokens that have this probability together.
    beams: 1, or the width of a beam search.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1


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
    draws = decoding.temperature > 0
    config = require("transformers", "generating").GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=draws,
        eos_token_id=ends,
        pad_token_id=padding,
        # Without top_k=0 transformers would draw from the likeliest 50 alone.
        **({"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if draws else {}),
    )
    special = special_tokens(model)
    if special is not None:
        rows = [special.around(array("q", row), 0, len(row)).tolist() for row in rows]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return made[:, width:].tolist()
