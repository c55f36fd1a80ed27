"""kohya's and LyCORIS's adapters: one safetensors file, the format of the tools around Stable Diffusion.

A tensor is called `<prefix>_<layer>.<kind>`, such as `lora_unet_conv_in.lora_down.weight`, with `_` for the dots of the
layer's own name: so which layers these are is known with their model alone. The scale of each layer is its own `alpha`
divided by its rank, and alpha is written so that it is. Only a LoKr of two whole factors has none, and gets it folded.

LoRA, DoRA, LoHa and LoKr are written as what they are; other methods, parts of fused projections, and a LoKr that
LyCORIS would not read as it is, as the LoRA that they are equal to. The prefix of a layer is `lora_unet` in diffusers'
UNets, `lora_te` in transformers' CLIP text models, and else `lycoris`, as LyCORIS calls layers of other models.
Differences of whole weights (`diff`, `w_norm`) are refused: they are no adapters.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import AdapterError, raise_problems
from ...names import Names
from .. import safetensors_file
from ..content import Content, Given, as_json, nothing_to_tell, refuse_given, take_about
from .decoding import decode
from .encoding import encode
from .factors import KINDS
from .layers import KEY

NATIVE, WRITES, to_be_told = ("lora", "dora", "loha", "lokr"), True, nothing_to_tell

_ABOUT, _DROPOUT = "lorank.about", "ss_network_dropout"
# Kinds that no other format has after the first dot of a name.
_OWN = {"lora_down.weight", "lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a"}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


def detect(path: Path) -> bool:
    """Tell whether the path is such a file, by the names of its tensors."""
    keys = (key.partition(".") for key in _header(path))
    return any(kind in _OWN or (kind in KINDS and KEY.fullmatch(name) is not None) for name, _, kind in keys)


def _header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header, although its end may be missing; {} of another file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
    except (OSError, ValueError, struct.error, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model with these module names; raises AdapterError for damaged files.

    Without a model, layers keep the names that they have in the file. `given.alpha` is for layers without one.
    """
    _, tensors, metadata = safetensors_file.read(path)
    refuse_given(given, alpha=all(f"{key.partition('.')[0]}.alpha" in tensors for key in tensors))
    content = decode(tensors, names, given.alpha, _dropout(metadata))
    take_about(content, metadata.get(_ABOUT, "{}"))
    return content


def _dropout(metadata: Mapping[str, str]) -> float:
    """Return the dropout that kohya trained with; it says "None" where there was none."""
    try:
        dropout = float(metadata.get(_DROPOUT, 0))
    except ValueError:
        return 0.0
    return dropout if math.isfinite(dropout) and 0 <= dropout < 1 else 0.0


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter into one file; return what is written in another way than it was trained.

    Raises AdapterError, before anything is written, for all that has no place: biases, modules that are trained whole,
    rows of tokens, embeddings, and layers whose weight is no one matrix.
    """
    if path.is_dir():
        raise AdapterError(f"cannot save: {path} is a directory; an adapter of kohya's is a file")
    if path.suffix != ".safetensors":
        raise AdapterError(f"cannot save: {path.name} has to end in .safetensors, or LyCORIS takes it for a pickle")
    encoded = encode(content, model)
    metadata = encoded.metadata
    if dropout := getattr(content.spec, "dropout", 0.0):
        metadata[_DROPOUT] = repr(dropout)
    if content.about:
        metadata[_ABOUT] = as_json(content.about)
    raise_problems("kohya's format cannot hold this adapter", encoded.problems)
    tensors: dict[str, Tensor] = encoded.tensors
    safetensors_file.write_atomically({path: safetensors_file.pack(tensors, metadata)})
    return encoded.notes
