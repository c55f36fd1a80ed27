"""Decoding: what is chosen reaches transformers' generate, and what cannot be meant is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorank import AdapterError
from lorank.evaluation import Decoding, complete

from .. import checkpoints

PROMPTS = ["a good film", "what is two and", "0123456789 0123456789"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a model that does not repeat itself, with a tenth of all tokens as end tokens, so that texts end."""
    changes = {"tie_word_embeddings": False, "initializer_range": 0.15}
    folder = checkpoints.causal(tmp_path_factory.mktemp("base"), seed=3, **changes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(9, len(tokenizer), 10))
    return model, tokenizer


def completed(base: tuple[Any, Any], decoding: Decoding, **options: Any) -> list[str]:
    found = dict(complete(*base, PROMPTS, decoding, **options))
    return [found[i] for i in range(len(PROMPTS))]


def generated(base: tuple[Any, Any], **options: Any) -> list[str]:
    """Return what model.generate adds to each prompt alone."""
    model, tokenizer = base
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        made.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return made


@pytest.mark.parametrize(
    ("chosen", "theirs"),
    [
        ({"beams": 4}, {"num_beams": 4}),
        ({"beams": 4, "length_penalty": 0.9}, {"num_beams": 4, "length_penalty": 0.9}),
        ({"beams": 4, "length_penalty": -6.0}, {"num_beams": 4, "length_penalty": -6.0}),
        (
            {"beams": 3, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
            {"num_beams": 3, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
        ),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"min_new_tokens": 10}, {"min_new_tokens": 10}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_what_generate_does(
    chosen: dict[str, Any], theirs: dict[str, Any], batch_size: int, base: tuple[Any, Any]
) -> None:
    found = completed(base, Decoding(max_new_tokens=12, **chosen), batch_size=batch_size)
    assert found == generated(base, max_new_tokens=12, **theirs)


def test_a_length_penalty_prefers_longer_texts(base: tuple[Any, Any]) -> None:
    short, long = (
        sum(map(len, completed(base, Decoding(max_new_tokens=20, beams=4, length_penalty=penalty))))
        for penalty in (-3.0, 3.0)
    )
    assert short < long


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"length_penalty": 0.9}, "length_penalty is 0.9; it chooses among the texts of a beam search, and beams is 1"),
        ({"beams": 4, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"beams": 0}, "beams is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5; it must be from 0 to max_new_tokens, 4"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"beams": -1, "top_p": 2.0}, "top_p is 2.0(.|\n)*beams is -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        Decoding(**chosen)
