"""Lay the tensors of a BERT checkpoint into transformers' RoBERTa class, which computes the same with them.

    python -m benchmarks.as_roberta BERT_FOLDER TARGET

RoBERTa counts positions from the padding's number on, and has one kind of token: the first kind's embedding is added to
the positions'. The result is no RoBERTa checkpoint: it tests the architecture with real knowledge.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast, RobertaConfig, RobertaModel


def convert(source: Path, target: Path) -> float:
    """Write the checkpoint; return the largest difference between the two models' outputs on a batch."""
    bert, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    assert isinstance(tokenizer, BertTokenizerFast), "its tokens are kept"
    own = bert.config
    padding = tokenizer.pad_token_id
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shared += ("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = RobertaConfig(
        **{name: getattr(own, name) for name in shared},
        max_position_embeddings=own.max_position_embeddings + padding + 1,
        type_vocab_size=own.type_vocab_size,
        pad_token_id=padding,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = RobertaModel(config).eval()
    tensors = dict(bert.state_dict())
    positions = tensors.pop("embeddings.position_embeddings.weight")
    tensors["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros(padding + 1, own.hidden_size), positions])
    wrong = model.load_state_dict(tensors, strict=False)
    assert not wrong.unexpected_keys and not wrong.missing_keys, wrong
    batch = tokenizer(["a film that moves", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        difference = float((bert(**batch)[0] - model(**batch)[0])[batch["attention_mask"].bool()].abs().max())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return difference


if __name__ == "__main__":
    print(f"largest difference of the outputs: {convert(Path(sys.argv[1]), Path(sys.argv[2])):.2g}")
