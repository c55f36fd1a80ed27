"""Writing with a prefix: its tokens stand around every prompt, and rules that look at the tokens so far know them."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import lorank
from lorank.baselines import PrefixEmbedding, PrefixLayer
from lorank.evaluation import Decoding, complete
from lorank.evaluation.generation import _generate

from .. import checkpoints, models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoints.causal(tmp_path_factory.mktemp("base") / "llama"))


@pytest.mark.parametrize("decoding", [{}, {"beams": 3, "length_penalty": 0.8}])
@pytest.mark.parametrize("spec", [PrefixEmbedding(3, 2), PrefixLayer(2, 1)])
def test_what_is_written_is_the_likeliest_behind_prefix_prompt_and_infix(
    spec: Any, decoding: dict[str, Any], tokenizer: Any
) -> None:
    torch.manual_seed(2)
    model = models.llama(vocab_size=len(tokenizer))
    lorank.adapt(model, spec)
    models.disturb(model, size=1.0)
    prompts = ["the quick brown fox", "film"]
    made = dict(complete(model, tokenizer, prompts, Decoding(max_new_tokens=4, **decoding)))
    tokens = lorank.special_tokens(model)
    assert tokens is not None
    if not decoding:
        for i, prompt in enumerate(prompts):
            ids = tokenizer(prompt)["input_ids"]
            row = [*range(tokens.first, tokens.first + tokens.prefix), *ids]
            row += range(tokens.first + tokens.prefix, tokens.first + len(tokens))
            for _ in range(4):
                with torch.no_grad():
                    row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
                if row[-1] == model.generation_config.eos_token_id:
                    break
            assert made[i] == tokenizer.decode(row[len(ids) + len(tokens) :], skip_special_tokens=True)
    assert len(made) == 2


def test_rules_on_the_tokens_so_far_take_a_prefix(tokenizer: Any) -> None:
    model = models.llama(vocab_size=len(tokenizer))
    lorank.adapt(model, PrefixEmbedding(2, 2))
    rules = Decoding(max_new_tokens=12, beams=2, no_repeat_ngram_size=2, repetition_penalty=1.3)
    for ids in _generate(model, tokenizer, [tokenizer("the fox")["input_ids"]], rules):
        pairs = list(pairwise(ids))
        assert len(ids) > 3 and len(set(pairs)) == len(pairs)
