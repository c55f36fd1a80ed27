"""What llama.cpp calls the layers of transformers' models, and which of their rows it stores in another order.

An architecture is here when its matrices in llama.cpp are the model's own but for the order of rows: then an adapter's
factors are too. `tests/interop/test_llama_cpp.py` compares each with what llama.cpp computes, and its converter writes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import AdapterError, did_you_mean, enumerate_names
from ..names import Names
from .rotation import Heads

EMBEDDING, HEAD = "token_embd", "output"
_ROTATED = re.compile(r"blk\.[0-9]+\.attn_(q|k)")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # of a block, a component of a dotted name


def _decoder(
    block: Mapping[str, str], blocks: str = "model.layers", embedding: str = "model.embed_tokens"
) -> dict[str, str]:
    """Return {layer: tensor} of a model with these layers in a block; "#" is the number of the block."""
    named = {f"{blocks}.#.{layer}": f"blk.#.{tensor}" for layer, tensor in block.items()}
    return named | {embedding: EMBEDDING, "lm_head": HEAD}


_QKV = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_ATTENTION = {**_QKV, "self_attn.o_proj": "attn_output"}
_UP_DOWN = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_BLOCK = {**_ATTENTION, **_UP_DOWN, "mlp.gate_proj": "ffn_gate"}
_GATED_BLOCK = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = _decoder(_BLOCK)
_TIED = {layer: tensor for layer, tensor in _LLAMA.items() if tensor != HEAD}  # llama.cpp knows no head of its own
# Without a head llama.cpp takes the embedding for one: both ends have one tensor then.
_LLAMA_BARE = {f"layers.#.{layer}": f"blk.#.{tensor}" for layer, tensor in _BLOCK.items()}
_NO_GATE = _decoder({**_ATTENTION, **_UP_DOWN})
_GLM4 = _decoder({**_ATTENTION, **_GATED_BLOCK})
_PHI3 = _decoder({"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", **_GATED_BLOCK})
_PHI = _decoder({**_QKV, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"})
_STARCODER2 = _decoder({**_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"})
_GPT2 = _decoder(
    {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    blocks="transformer.h",
    embedding="transformer.wte",
)


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as one of transformers' classes fills it."""

    name: str  # general.architecture
    tensors: Mapping[str, str]  # by layer, with "#" for the number of the block and without .weight
    rotated: bool = False  # the rows of q and k of each head lie in the order of Meta's rotation

    def tensor_of(self, layer: str) -> str | None:
        """Return the name of a layer's tensor without .weight; None where llama.cpp takes no update of it."""
        return _translated(layer, self.tensors)

    def layer_of(self, tensor: str) -> str | None:
        """Return the name of the layer whose weight a tensor is, given without .weight."""
        return _translated(tensor, {value: key for key, value in self.tensors.items()})

    def heads_of(self, tensor: str, config: Heads | None) -> int | None:
        """Return of how many heads the rows of a tensor are rotated, 0 where none are; None where that is unknown."""
        found = _ROTATED.fullmatch(tensor) if self.rotated else None
        if found is None:
            return 0
        return None if config is None else config.queries if found[1] == "q" else config.keys


# By the name of transformers' class. Those of one name have the same layers, and the first of them is how a file that
# is read without a model calls its layers.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", _LLAMA, rotated=True),
    "LlamaModel": Architecture("llama", _LLAMA_BARE, rotated=True),
    "MistralForCausalLM": Architecture("llama", _LLAMA, rotated=True),
    "MixtralForCausalLM": Architecture("llama", _decoder(_ATTENTION), rotated=True),
    "ApertusForCausalLM": Architecture("apertus", _NO_GATE),
    "ArceeForCausalLM": Architecture("arcee", _NO_GATE, rotated=True),
    "CohereForCausalLM": Architecture("command-r", _TIED),
    "Cohere2ForCausalLM": Architecture("cohere2", _TIED),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5", _LLAMA),
    "Exaone4ForCausalLM": Architecture("exaone4", _LLAMA),
    "GemmaForCausalLM": Architecture("gemma", _TIED),
    "Gemma2ForCausalLM": Architecture("gemma2", _TIED),
    "Gemma3ForCausalLM": Architecture("gemma3", _LLAMA),
    "Glm4ForCausalLM": Architecture("glm4", _GLM4),
    "GPT2LMHeadModel": Architecture("gpt2", _GPT2),
    "GraniteForCausalLM": Architecture("granite", _LLAMA, rotated=True),
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan-dense", _LLAMA),
    "NemotronForCausalLM": Architecture("nemotron", _NO_GATE),
    "OlmoForCausalLM": Architecture("olmo", _LLAMA, rotated=True),
    "Olmo2ForCausalLM": Architecture("olmo2", _LLAMA),
    "Olmo3ForCausalLM": Architecture("olmo2", _LLAMA),
    "OlmoeForCausalLM": Architecture("olmoe", _decoder(_ATTENTION)),
    "PhiForCausalLM": Architecture("phi2", _PHI),
    "Phi3ForCausalLM": Architecture("phi3", _PHI3),
    "Qwen2ForCausalLM": Architecture("qwen2", _LLAMA),
    "Qwen2Model": Architecture("qwen2", _LLAMA_BARE),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe", _decoder(_ATTENTION)),
    "Qwen3ForCausalLM": Architecture("qwen3", _LLAMA),
    "Qwen3Model": Architecture("qwen3", _LLAMA_BARE),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", _decoder(_ATTENTION)),
    "SeedOssForCausalLM": Architecture("seed_oss", _LLAMA),
    "SmolLM3ForCausalLM": Architecture("smollm3", _LLAMA, rotated=True),
    "StableLmForCausalLM": Architecture("stablelm", _LLAMA),
    "Starcoder2ForCausalLM": Architecture("starcoder2", _STARCODER2),
}


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a model; raises AdapterError for a class that is none of `ARCHITECTURES`."""
    for cls in type(model).__mro__:
        if cls.__name__ in ARCHITECTURES:
            return ARCHITECTURES[cls.__name__]
    known = did_you_mean(type(model).__name__, ARCHITECTURES)
    raise AdapterError(f"lorank does not know how llama.cpp stores the weights of a {type(model).__name__}; {known}")


def architecture_called(name: Any) -> Architecture:
    """Return the architecture of a file; raises AdapterError for one that none of `ARCHITECTURES` has."""
    found = next((known for known in ARCHITECTURES.values() if known.name == name), None)
    if found is None:
        known = enumerate_names(sorted({known.name for known in ARCHITECTURES.values()}), 40)
        raise AdapterError(f"it is for the architecture {name!r}, and lorank knows {known}")
    return found


def has_one_matrix_for_both_ends(names: Names, architecture: Architecture) -> bool:
    """Tell whether the head's weight is the embedding's, so that llama.cpp's file of the model has one tensor alone."""
    ends = [architecture.layer_of(tensor) or "" for tensor in (EMBEDDING, HEAD)]
    weights = [names.modules[layer]._parameters.get("weight") for layer in ends if layer in names.modules]
    config = getattr(names.modules[""], "config", None)
    return bool(getattr(config, "tie_word_embeddings", False)) or (len(weights) == 2 and weights[0] is weights[1])


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    number = _NUMBER.search(name)
    if number is None:
        return table.get(name)
    found = table.get(f"{name[: number.start()]}#{name[number.end() :]}")
    return None if found is None else found.replace("#", number[0])
