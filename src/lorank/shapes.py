"""Shapes of models that are named without a hub: those of the paper, to be counted on the meta device."""

from collections.abc import Callable
from typing import Any

from .extras import require

_GPT2: dict[str, Any] = {"model": "GPT2Config", "vocab_size": 50257, "n_positions": 1024}
_ROBERTA: dict[str, Any] = {
    "model": "RobertaConfig",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# As their authors' configuration files have them. GPT-3 is OpenAI's description (Brown et al., 2020, table 2.1) in the
# class of GPT-2: its alternating sparse attention has the same weights. It names no dropout; there is none here.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt3-175b": {
        **_GPT2,
        "n_positions": 2048,
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "paper/gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "paper/gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "paper/roberta-base": {
        **_ROBERTA,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "paper/roberta-large": {
        **_ROBERTA,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "paper/deberta-v2-xxlarge": {
        "model": "DebertaV2Config",
        "vocab_size": 128100,
        "hidden_size": 1536,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "pad_token_id": 0,
    },
}


def configuration_of(name: str) -> Any:
    """Return the configuration of a shape, of transformers' class for it."""
    values = dict(SHAPES[name])
    make: Callable[..., Any] = getattr(require("transformers", "building a model"), values.pop("model"))
    return make(**values)
