"""llama.cpp's adapters: one GGUF file, for models whose layers `gguf_names` knows.

`<tensor>.weight.lora_a` is A (rank, in) and `.lora_b` is B (out, rank) with the rows of W in llama.cpp's order. Of the
token embedding, whose A is looked up, lora_a is (vocabulary, rank) and lora_b (dimension, rank). One alpha holds for
the file: llama.cpp multiplies each update by alpha / its own rank, or by 1 where alpha is 0.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, enumerate_names, raise_problems
from ..hosts import NoHost
from ..names import Names
from ..variants import LoRA
from . import gguf_file
from .content import Content, Given, LayerUpdate, as_json, nothing_to_tell, refuse_given, take_about
from .gguf_names import (
    EMBEDDING,
    HEAD,
    Architecture,
    architecture_called,
    architecture_of,
    has_one_matrix_for_both_ends,
)
from .pairs import Pair, beyond_pairs, pairs_of
from .rotation import Heads, heads_of, rotated, unrotated
from .safetensors_file import write_atomically

_TYPE, _ARCHITECTURE, _METHOD = "general.type", "general.architecture", "adapter.type"
_ALPHA, _INVOCATION, _PROMPT = "adapter.lora.alpha", "adapter.alora.invocation_tokens", "adapter.lora.prompt_prefix"
_ABOUT = "lorank.about"
_FACTOR = re.compile(r"(?P<tensor>.+)\.weight\.lora_(?P<factor>[ab])")
_NEEDS_MODEL = (
    "its rows of q and k are in llama.cpp's order, by heads, whose number only the model says: give the model"
)

NATIVE, WRITES, to_be_told = ("lora",), True, nothing_to_tell


def detect(path: Path) -> bool:
    """Tell whether the path is a GGUF file that says it is an adapter; a model's is none."""
    return path.is_file() and gguf_file.value_of(path, _TYPE) == "adapter"


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter of a transformers model, which may be on the meta device, in float32.

    Returns which layers had their scale folded into B. Raises AdapterError, before anything is written, without a
    model, for a class that is not in `gguf_names.ARCHITECTURES`, and for all that llama.cpp has no place for.
    """
    if path.is_dir():
        raise AdapterError(f"cannot save: {path} is a directory; a GGUF adapter is a file")
    if model is None:
        raise AdapterError(
            "cannot save: a GGUF adapter names the architecture of its model, so the model has to be given; it may be "
            "on the meta device"
        )
    try:
        architecture = architecture_of(model)
    except AdapterError as error:
        raise AdapterError(f"cannot save: {error}") from None
    problems = beyond_pairs(content)
    places = _places(pairs_of(content, problems), content, Names(model), architecture, problems)
    heads = heads_of(model)
    alpha = _common_alpha(places)
    tensors: dict[str, Tensor] = {}
    folded: list[str] = []
    for tensor, (layer, pair) in places.items():
        if _alpha_of(pair) != alpha:
            pair = pair.at(pair.rank, alpha / pair.rank)
            folded.append(layer)
        try:
            tensors |= _written(tensor, pair, architecture, heads)
        except AdapterError as error:
            problems.append(f"{layer}: {error}")
    if not tensors and not problems:
        problems.append("the adapter has no updates")
    raise_problems("cannot save as GGUF", problems)
    write_atomically({path: gguf_file.pack(_metadata(content, architecture, heads, alpha), tensors)})
    if not folded:
        return []
    return [f"scale folded into B, where it is not {alpha:g} / rank: {enumerate_names(folded, 3)}"]


def _metadata(
    content: Content, architecture: Architecture, heads: Heads | None, alpha: float
) -> dict[str, str | int | float]:
    metadata: dict[str, str | int | float] = {
        _ARCHITECTURE: architecture.name,
        _TYPE: "adapter",
        _METHOD: "lora",
        _ALPHA: alpha,
    }
    if architecture.rotated and heads is not None:  # llama.cpp has them from the model; readers without one do not
        metadata |= dict(zip(_head_counts(architecture), (heads.queries, heads.keys), strict=True))
    if content.about:
        metadata[_ABOUT] = as_json(content.about)
    return metadata


def _places(
    pairs: Mapping[str, Pair], content: Content, names: Names, architecture: Architecture, problems: list[str]
) -> dict[str, tuple[str, Pair]]:
    """Return {tensor: (layer, its pair)}; why a layer has no tensor goes into `problems`."""
    found: dict[str, tuple[str, Pair]] = {}
    one_matrix = has_one_matrix_for_both_ends(names, architecture)
    for layer, pair in pairs.items():
        tensor = architecture.tensor_of(layer)
        if tensor is None:
            known = enumerate_names((key.rpartition(".")[2] for key in architecture.tensors), 12)
            problems.append(f"{layer}: of this architecture llama.cpp takes updates of {known}")
        elif tensor in (EMBEDDING, HEAD) and (one_matrix or layer in content.tied):
            problems.append(
                f"{layer}: the embedding and the head have one weight, which llama.cpp cannot adapt: it has one tensor "
                "for both, and uses it in two ways"
            )
        else:
            problems += _shape_problems(layer, pair, names)
            found[tensor] = layer, pair
    return found


def _shape_problems(layer: str, pair: Pair, names: Names) -> list[str]:
    if layer not in names.modules:
        return [f"{layer}: this model has no such layer"]
    try:
        host = names.host(layer)
        out, in_ = host.shape(names.modules[layer], host.parts(names.modules[layer])[0])
    except (NoHost, ValueError):
        return [f"{layer}: lorank knows no matrix of it"]
    found = (pair.B.shape[0], pair.A.shape[1])
    if found == (out, in_) and pair.lookup == host.lookup:
        return []
    return [f"{layer}: the update is {found}, and the model's matrix {(out, in_)}"]


def _common_alpha(places: Mapping[str, tuple[str, Pair]]) -> float:
    """Return the alpha with which the fewest updates need another B."""
    alphas = Counter(_alpha_of(pair) for _, pair in places.values())
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    return alpha if 1e-30 < abs(alpha) < 1e30 else 1.0  # as a float32 it might be 0, which means a scale of 1


def _alpha_of(pair: Pair) -> float:
    """Return the alpha that gives a pair its scale, as a file holds it."""
    return torch.tensor(pair.scale * pair.rank, dtype=torch.float32).item()


def _written(tensor: str, pair: Pair, architecture: Architecture, heads: Heads | None) -> dict[str, Tensor]:
    """Return the two tensors of a pair whose scale is the file's."""
    A, B = pair.A.float(), pair.B.float()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise AdapterError("with its scale in B it holds numbers that are too large for float32")
    of_layer = architecture.heads_of(tensor, heads)
    if of_layer is None:
        raise AdapterError("the model's configuration does not say how many heads it has, by which its rows are sorted")
    A, B = (A.T if tensor == EMBEDDING else A), (rotated(B, of_layer) if of_layer else B)
    return {f"{tensor}.weight.lora_a": A, f"{tensor}.weight.lora_b": B}


def _head_counts(architecture: Architecture) -> tuple[str, str]:
    """Return the keys under which GGUF files have the numbers of heads."""
    return f"{architecture.name}.attention.head_count", f"{architecture.name}.attention.head_count_kv"


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model with these module names, or for none; raises AdapterError for damaged files.

    Without a model its layers are called as in transformers. How many heads there are, by which llama.cpp orders the
    rows of q and k, lorank's files say; those of others stay in that order then, and the content needs the model.
    """
    refuse_given(given)
    metadata, tensors = gguf_file.read(path)
    if metadata.get(_METHOD) != "lora":
        raise AdapterError(f"{path}: {_METHOD} is {metadata.get(_METHOD)!r}; lora can be read")
    architecture = architecture_called(metadata.get(_ARCHITECTURE))
    model = None if names is None else names.modules[""]
    if model is not None:
        own = architecture_of(model)
        if own.name != architecture.name:
            raise AdapterError(f"{path} is for the architecture {architecture.name}, and this model's is {own.name}")
        architecture = own
    heads = told = _heads_in(metadata, architecture)
    content = Content(LoRA())
    content.problems += _metadata_problems(metadata)
    if model is not None:
        heads = heads_of(model)
        if told is not None and told != heads:
            content.problems.append(f"the file is of a model with {told}, and this one has {heads or 'none'}")
    alpha = _alpha(metadata)
    if metadata.get(_PROMPT):
        content.remarks.append(
            f"it was trained on prompts that begin with {metadata[_PROMPT]!r}; nothing here adds that"
        )
    for tensor, factors in _factors(tensors, content.problems).items():
        layer = architecture.layer_of(tensor)
        if layer is None:
            content.problems.append(f"{tensor}.weight: this architecture has no such tensor that can be adapted")
            continue
        try:
            of_layer = architecture.heads_of(tensor, heads)
            if of_layer is None:
                content.needs_model = _NEEDS_MODEL
            content.updates[layer] = _update(tensor, factors, alpha, of_layer or 0)
        except AdapterError as error:
            content.problems.append(f"{tensor}.weight: {error}")
    if content.updates:
        content.spec = Counter(update.spec for update in content.updates.values()).most_common(1)[0][0]
    take_about(content, metadata.get(_ABOUT, "{}"))
    return content


def _factors(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return {tensor: {"a", "b"}} of those that have both; whatever else there is goes into `problems`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            found.setdefault(factor["tensor"], {})[factor["factor"]] = value
        elif name.endswith("_norm.weight"):
            problems.append(f"{name}: a norm that was trained whole, which llama.cpp leaves out when it loads the file")
        else:
            problems.append(f"{name} is no factor of an update")
    whole = {name: factors for name, factors in found.items() if len(factors) == 2}
    for name in sorted(found.keys() - whole.keys()):
        problems.append(f"{name}.weight: the file lacks lora_{'b' if 'a' in found[name] else 'a'}")
    return whole


def _update(tensor: str, factors: Mapping[str, Tensor], alpha: float, heads: int) -> LayerUpdate:
    """Return the update that two tensors make, with rows rotated in so many heads.

    Raises AdapterError when the tensors do not fit together.
    """
    A, B = factors["a"], factors["b"]
    lookup = tensor == EMBEDDING
    if A.dim() != 2 or B.dim() != 2 or A.shape[1 if lookup else 0] != B.shape[1]:
        raise AdapterError(f"lora_a {tuple(A.shape)} and lora_b {tuple(B.shape)} are no pair of factors of a matrix")
    rank = B.shape[1]
    spec = LoRA(rank=rank, alpha=alpha or float(rank))
    A, B = (A.T.contiguous() if lookup else A), (unrotated(B, heads) if heads else B)
    return LayerUpdate(spec, {"weight": {"A": A, "B": B}}, lookup=lookup)


def _alpha(metadata: Mapping[str, Any]) -> float:
    alpha = metadata.get(_ALPHA, 0.0)  # llama.cpp takes a missing one for 0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{_ALPHA} is {alpha!r}; it must be a finite number")
    return float(alpha)


def _heads_in(metadata: Mapping[str, Any], architecture: Architecture) -> Heads | None:
    queries, keys = (metadata.get(key) for key in _head_counts(architecture))
    return Heads.of(queries, keys)


def _metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Return what a file asks for that an adapter here does not do."""
    tokens = metadata.get(_INVOCATION)
    if tokens is None or (isinstance(tokens, gguf_file.Array) and not tokens.count):
        return []
    return ["it is an aLoRA, which acts from its invocation tokens on; here it would act from the start"]
