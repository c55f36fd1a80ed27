"""The architectures of the paper's models, so that their parameters can be counted without a checkpoint."""

from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from ..extras import require
from ..models import empty_base, heads_of
from ..runs.prepare import adapt_base
from ..runs.recipe import Recipe

# {model: (class of its configuration, what decides on its parameters)}.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": (
        "RobertaConfig",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "roberta-large": (
        "RobertaConfig",
        {
            **{"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
            **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        },
    ),
    "microsoft/deberta-v2-xxlarge": (
        "DebertaV2Config",
        {
            **{"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144},
            **{"vocab_size": 128100, "type_vocab_size": 0, "position_biased_input": False, "relative_attention": True},
            **{"pos_att_type": "p2c|c2p", "position_buckets": 256, "norm_rel_ebd": "layer_norm"},
            **{"share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu"},
        },
    ),
    "gpt2-medium": ("GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    # Brown et al., 2020: 96 layers of width 12,288 over 2,048 tokens. The weights are not public.
    "gpt3-175b": ("GPT2Config", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
}

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}


def empty_model(name: str, task: str, labels: int = 2) -> Any:
    """Return a model on the meta device: of the table's shape, or for any other name of its own configuration."""
    if name not in SHAPES:
        return empty_base(name, task, labels=labels)
    transformers = require("transformers", "building a model")
    kind, values = SHAPES[name]
    config = getattr(transformers, kind)(**values, num_labels=1 if task == "regression" else labels)
    with torch.device("meta"):
        return getattr(transformers, _CLASSES[task]).from_config(config, dtype=torch.float32).eval()


def trainable_parameters(recipe: Recipe, labels: int = 2) -> int:
    """Return how many numbers a recipe trains beside a classifier's head, which the paper does not count."""
    if recipe.task == "auto":
        raise AdapterError(
            "to count what a recipe trains its task must be known: causal-lm, classification, regression"
        )
    model = empty_model(recipe.model, recipe.task, labels)
    heads = [module for name in heads_of(model, ()) for module in [model.get_submodule(name)]]
    head = 0 if recipe.task == "causal-lm" else sum(map(_count, heads))
    if recipe.method == "full":
        return _count(model) - head
    return adapt_base(recipe, model).trainable_parameters - head


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
