"""Tied layers and trained tokens, in files between lorank and the real peft."""

import copy
from pathlib import Path

import peft
import pytest
import torch

import lorank
from lorank import LoRA

from .. import models
from .test_peft import output, peft_model, pytestmark, read_by_peft  # noqa: F401  # the marks hold here too


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_computes_what_a_tied_adapter_does(tmp_path: Path) -> None:
    base, x = models.llama(tie_word_embeddings=True), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=6), ["embed_tokens", "q_proj"], tie=True)
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*tie")
def test_trained_tokens_go_both_ways(tied: bool, tmp_path: Path) -> None:
    base, x = models.llama(tie_word_embeddings=tied), models.ids()
    x[0, 0], x[1, 3] = 50, 90
    indices = {"embed_tokens": [90, 50]} if tied else {"embed_tokens": [90, 50], "lm_head": [50, 90]}
    theirs = peft_model(
        copy.deepcopy(base), r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=indices
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))  # pyright: ignore[reportCallIssue]
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path / "theirs")
    assert plan.tokens["model.embed_tokens"] == (50, 90)
    torch.testing.assert_close(output(model, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    lorank.save(model, tmp_path / "ours")
    again = read_by_peft(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(output(again, x), output(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["attention", "out_proj", "linear1", "lstm", "transposed", "bilinear", "depthwise"])
def test_peft_refuses_what_only_lorank_reads(target: str, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Linear(8, 8),
            "attention": torch.nn.MultiheadAttention(8, 2),
            "encoder": torch.nn.TransformerEncoderLayer(8, 2, 16),
            "lstm": torch.nn.LSTM(8, 8),
            "transposed": torch.nn.ConvTranspose1d(8, 8, 3),
            "bilinear": torch.nn.Bilinear(8, 8, 8),
            "depthwise": torch.nn.Conv2d(2048, 2048, 3, groups=2048),
        }
    )
    lorank.adapt(model, LoRA(rank=2), ["plain", "attention[q,v]" if target == "attention" else target])
    lorank.save(model, tmp_path)
    with pytest.raises(ValueError, match="layers_pattern"):
        peft.PeftModel.from_pretrained(model, str(tmp_path))  # pyright: ignore[reportArgumentType]
    lorank.remove(model)
    lorank.load(model, tmp_path)
