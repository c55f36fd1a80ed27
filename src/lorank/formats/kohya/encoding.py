"""An adapter as a file's tensors, each layer in the form of its method, or as the pair of LoRA that it is equal to."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError, enumerate_names
from ...hosts import FusedHost
from ...names import Names
from ...variants import DoRA, LoHa, LoKr
from ..content import Content, LayerUpdate
from ..pairs import beyond_pairs, folded, pair_of
from .factors import NAMES
from .kronecker import lycoris_rebuilds, rank_of
from .layers import KEY, TEXT, Layers, name_in_file, prefix_of, why_not_held

# Notes, with the layers that they are about.
_FOLDED = "its scale was folded into lokr_w1: LyCORIS has none where lokr_w1 and lokr_w2 are whole"
_NOT_REBUILT = "LyCORIS would not find the division of this LoKr again: it is written as LoRA of rank {}"
_AS_PAIR = "{} is written as LoRA, with the same update"
_TWICE = "LyCORIS 4.1 multiplies with alpha / rank twice where it merges LoHa and LoKr, and once where it runs them"
_PADDING = "LyCORIS pads its input with zeros, and the layer does not: it is the same once it is merged"


@dataclass
class Encoded:
    """What there is to write, and what cannot be written."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Written:
    """The tensors of one layer, by kind."""

    method: str
    tensors: dict[str, Tensor]
    rank: int
    scale: float
    notes: list[str] = field(default_factory=list)


def encode(content: Content, model: nn.Module | None) -> Encoded:
    """Return the tensors and metadata of an adapter; what has no place in the format goes into `problems`."""
    layers = None if model is None else Layers(Names(model))
    encoded = Encoded(problems=beyond_pairs(content))
    encoded.problems += [
        f"{name} shares its weight with {tie.source}, and tools that merge would add the update of both to it"
        for name, tie in content.tied.items()
    ]
    if not content.updates and not encoded.problems:
        encoded.problems.append("the adapter has no updates")
    written: dict[str, _Written] = {}
    notes: dict[str, list[str]] = {}
    for name, update in content.updates.items():
        try:
            key = _key(name, update, model, layers)
            if key in written:
                raise AdapterError(f"another layer has the same name in such a file, {key}")
            written[key] = one = _written(name, update)
            alpha = torch.tensor(one.scale * one.rank, dtype=torch.float32)
            if not alpha or not math.isfinite(alpha):
                raise AdapterError(f"its scale {one.scale:g} is out of the range of float32")
        except AdapterError as error:
            encoded.problems.append(f"{name or 'the model'}: {str(error).removeprefix(f'{name}: ')}")
            continue
        if layers is not None and getattr(layers.names.modules.get(name), "padding_mode", "zeros") != "zeros":
            one.notes.append(_PADDING)
        for note in one.notes:
            notes.setdefault(note, []).append(name)
        encoded.tensors |= {f"{key}.{kind}": tensor for kind, tensor in one.tensors.items()}
        encoded.tensors[f"{key}.alpha"] = alpha
    encoded.notes = [f"{enumerate_names(those, 3)}: {note}" for note, those in notes.items()]
    if prefix_of(model) == TEXT:
        encoded.notes.append(
            f"layers are called {TEXT}_…, those of an only text encoder; SDXL has lora_te1 and lora_te2"
        )
    encoded.metadata = _metadata(written)
    return encoded


def _key(name: str, update: LayerUpdate, model: nn.Module | None, layers: Layers | None) -> str:
    """Return what a layer is called in the file; raises AdapterError for one that the format does not have."""
    if reason := why_not_held(update.host, update.lookup):
        raise AdapterError(reason)
    if not name:
        raise AdapterError("it is one layer, and the format has layers of a model")
    if layers is None:
        return name if KEY.fullmatch(name) and "." not in name else f"{prefix_of(None)}_{name_in_file(name, None)}"
    if clashes := layers.clashes(name):
        raise AdapterError(f"{enumerate_names(clashes)} has the same name where dots are _")
    above = layers.names.modules.get(name.rpartition(".")[0])
    if isinstance(above, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise AdapterError("PyTorch reads its weight without calling it, so LyCORIS's adapter would have no effect")
    return f"{prefix_of(model)}_{name_in_file(name, model)}"


def _written(name: str, update: LayerUpdate) -> _Written:
    """Return the tensors of a layer; raises AdapterError where they are no matrices, or depend on its base."""
    kernel = update.shapes.get("weight", ())[2:]
    whole = list(update.tensors) == ["weight"] and not isinstance(update.host, FusedHost)
    tensors, spec = update.tensors.get("weight", {}), update.spec_of("weight")
    if any(tensor.dim() > 2 for part in update.tensors.values() for tensor in part.values()):
        raise AdapterError("it is a stack of matrices")
    if whole and isinstance(spec, LoHa):
        return _twice(_Written("LoHa", _named("LoHa", tensors), spec.rank, spec.scale))
    if whole and isinstance(spec, LoKr):
        return _twice(_kronecker(update, spec, kernel))
    if whole and isinstance(spec, DoRA):
        found = _pair(*update.factors(), spec.scale, kernel)
        magnitude = tensors["magnitude"]
        found.tensors["dora_scale"] = magnitude.view(-1, *[1] * max(len(kernel) + 1, 1))
        return found
    if not whole:
        pair = pair_of(name, update)
        return _noted(_pair(pair.A, pair.B, pair.scale, ()), update)
    return _noted(_pair(*update.pair(), spec.scale, kernel), update)


def _pair(A: Tensor, B: Tensor, scale: float, kernel: tuple[int, ...]) -> _Written:
    """Return LoRA's tensors, of a convolution with its kernel."""
    down, up = (A.unflatten(1, (-1, *kernel)), B.view(*B.shape, *[1] * len(kernel))) if kernel else (A, B)
    return _Written("LoRA", _named("LoRA", {"A": down, "B": up}), len(A), scale)


def _named(method: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensors[name] for kind, name in NAMES[method].items() if name in tensors}


def _noted(written: _Written, update: LayerUpdate) -> _Written:
    """Say where a method that the format has for whole layers alone was written as one pair."""
    variants = {spec.variant for part in update.tensors if isinstance(spec := update.spec_of(part), LoHa | LoKr)}
    if variants:
        written.notes.append(_AS_PAIR.format(enumerate_names(sorted(variants))))
    return written


def _kronecker(update: LayerUpdate, spec: LoKr, kernel: tuple[int, ...]) -> _Written:
    """Return the tensors of LoKr, or of LoRA where LyCORIS or ComfyUI would not make the same of them."""
    tensors = dict(update.tensors["weight"])
    # ComfyUI multiplies a D (out₂, in₂, kernel) of other dimensions than a Conv2d's with C along the wrong ones.
    misread = len(kernel) not in (0, 2) and "D" in tensors
    if misread or not lycoris_rebuilds(tensors, math.prod(kernel)):
        pair = _pair(*update.pair(), spec.scale, kernel)
        pair.notes.append(_NOT_REBUILT.format(pair.rank))
        return pair
    written = _Written("LoKr", {}, rank_of(tensors) or spec.rank, spec.scale)
    if rank_of(tensors) is None and spec.scale != 1:
        tensors["C"] = folded(tensors["C"], spec.scale)
        written.scale = 1.0
        written.notes.append(_FOLDED)
    if "D" in tensors and kernel:
        tensors["D"] = tensors["D"].unflatten(1, (-1, *kernel))
    written.tensors = _named("LoKr", tensors)
    return written


def _twice(written: _Written) -> _Written:
    if written.scale != 1 and written.method != "LoRA":
        written.notes.append(_TWICE)
    return written


def _metadata(written: Mapping[str, _Written]) -> dict[str, str]:
    """Return what kohya's tools show of a file; its tensors alone say what it is."""
    if not written:
        return {}
    methods = Counter(one.method for one in written.values())
    own = methods.keys() == {"LoRA"} and not any("dora_scale" in one.tensors for one in written.values())
    ranks = {one.rank for one in written.values()}
    alphas = {one.scale * one.rank for one in written.values()}
    arguments: dict[str, Any] = {"algo": methods.most_common(1)[0][0].lower()}
    if any("dora_scale" in one.tensors for one in written.values()):
        arguments["dora_wd"] = "True"
    return {
        "format": "pt",
        "ss_network_module": "networks.lora" if own else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        **({} if own else {"ss_network_args": json.dumps(arguments, sort_keys=True)}),
    }
