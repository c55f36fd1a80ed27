"""`adapter_model.safetensors`: which tensor is what, by its name."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ...errors import AdapterError, enumerate_names
from ...names import Names, lies_in
from ...variants import DoRA, LowRank, Spec
from ..content import Content, LayerUpdate
from .config import bias_of, spec_by_pattern, spec_of
from .header import Account
from .layout import (
    PARAMETERS,
    PARTS,
    Pair,
    read_kernels,
    read_merged,
    read_stack,
    read_third,
    written_pair,
    written_stack,
)
from .methods import Method, method_of
from .older import in_todays_terms
from .places import Place, nested, places_of

_PREFIX = "base_model.model."
_LOOKUP = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_ROWS = "token_adapter.trainable_tokens_delta"
_REFUSED_KEYS = {
    "lora_magnitude_vector": "a DoRA magnitude, and adapter_config.json does not say use_dora",
    "lora_B.bias": "a bias of the low-rank update, which cannot be read yet",
}


def encode_tensors(content: Content) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names that PEFT gives them."""
    method = method_of(content)
    tensors: dict[str, Tensor] = {}
    for name, update in content.updates.items():
        for path, named in _written(name, update, method):
            suffixes = method.suffixes | _LOOKUP if method.pairs and update.lookup else method.suffixes
            tensors |= {_key(path, suffixes[key]): tensor for key, tensor in named.items()}
    for name, tie in content.tied.items():  # PEFT is given factors of its own for each layer
        source = content.updates[tie.source]
        lookup = method.pairs and source.lookup != tie.transposed  # an embedding that mirrors one, or a head
        for path, named in _written(name, source, method):
            if tie.transposed:
                named = {"A": named["B"].T, "B": named["A"].T}
            suffixes = method.suffixes | _LOOKUP if lookup else method.suffixes
            tensors |= {_key(path, suffixes[key]): tensor.clone() for key, tensor in named.items()}
    tensors |= method.shared(content)
    for name, (_, rows) in content.tokens.items():
        tensors[_key(name, _ROWS)] = rows
    wrapped = content.updates.keys() | content.tied.keys()
    for name, value in content.biases.items():
        owner = "base_layer." if name in wrapped else "token_adapter.base_layer." if name in content.tokens else ""
        tensors[_key(name, f"{owner}bias")] = value
    for name, copy in content.copies.items():
        # safetensors refuses shared memory; what is tied inside a copy is written out twice
        tensors.update({_key(name, key): tensor.clone() for key, tensor in copy.items()})
    return tensors


def _written(name: str, update: LayerUpdate, method: Method) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of a layer's pairs, or of its parts, with the path under which they stand."""
    kind = method.layout(update).kind

    def of_part(part: str, pair: Callable[[], Pair]) -> dict[str, Tensor]:
        if not method.pairs:
            return method.written(update.tensors[part], update.shapes.get(part, ()))
        A, B = pair()
        return {"A": A, "B": B} | method.beside_pair(update, part)

    if kind == PARAMETERS:
        for path, part in zip(nested(name, len(update.tensors)), update.tensors, strict=True):
            yield path, of_part(part, lambda part=part: written_stack(*update.factors(part)))
    elif kind == PARTS:
        for part in update.tensors:
            yield f"{name}.{part}".removeprefix("."), of_part(part, lambda part=part: update.factors(part))
    else:
        yield name, of_part("weight", lambda: written_pair(update))


def _key(name: str, suffix: str) -> str:
    return f"{_PREFIX}{name}.{suffix}" if name else f"{_PREFIX}{suffix}"


def decode(
    config: Mapping[str, Any], method: Method, tensors: Mapping[str, Tensor], account: Account | None, names: Names
) -> Content:
    """Return what the tensors are; what is wrong with them goes into the content's `problems`."""
    problems: list[str] = []
    config = config if account is not None or not method.rank_patterns else in_todays_terms(config)
    bias = bias_of(config, method) if account is None else account.bias
    content = Content(spec_of(config, method, problems), bias=bias, problems=problems)
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    lookups: set[str] = set()
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        in_copy = account is not None and any(path.startswith(f"{name}.") for name in account.copies)
        factor = None if in_copy else method.match(path)
        if factor and factor[1] == "magnitude" and not isinstance(content.spec, DoRA):
            factor = None
        refused = next((what for token, what in _REFUSED_KEYS.items() if f".{token}" in f".{path}"), None)
        if factor:
            layer, kind = factor
            found = factors.setdefault(layer, {})
            if kind in found:
                problems.append(f"{key}: a second {kind} for the same layer (several adapters in one file?)")
            found[kind] = tensor
            lookups |= {layer} if "lora_embedding_" in path else set()
        elif refused and not in_copy:
            problems.append(f"{key} is {refused}")
        elif path.endswith((".lora_A", ".lora_B")):
            problems.append(f"{key} has loralib's name, without .weight; it is not a tensor of PEFT's layout")
        elif path in rest:
            problems.append(f"{key} is in the file twice, with and without the prefix {_PREFIX}")
        else:
            rest[path] = tensor
    try:
        content.spec = method.take_shared(rest, content.spec)
    except AdapterError as error:
        problems.append(str(error))
    for place in places_of(factors, config, account, names, problems):
        _decode_place(place, factors[place.path], config, method, content)
    for layer in lookups & content.updates.keys():
        content.updates[layer].lookup = True
    for update in content.updates.values():
        update.transposed = bool(config.get("fan_in_fan_out"))
    _decode_tokens(config, rest, content)
    _decode_rest(config, rest, account, names, content)
    if account is None:
        content.remarks += _gaps(config, content, names)
    return content


def _decode_place(
    place: Place, tensors: Mapping[str, Tensor], config: Mapping[str, Any], method: Method, content: Content
) -> None:
    """Put the tensors of one place into the content."""
    spec = spec_by_pattern(config, method, content.spec, place.matched_as, content.problems)
    if method.pairs:
        read = _read_pair(place, tensors, spec)
        if isinstance(read, str):
            content.problems.append(f"{place.path}: {read}")
            return
        spec, named = read
    else:
        spec, named = method.read(tensors, spec), method.restored(tensors)
    by_parts = place.parameter or place.third is not None
    update = content.updates.setdefault(place.layer, LayerUpdate(spec, {}, by_parts=by_parts))
    if spec != update.spec:
        update.specs[place.part] = spec
    update.tensors[place.part] = named
    if method.pairs and not place.parameter and tensors["A"].dim() > 2 and place.layer == place.path:
        out, groups = tensors["B"].shape[0], tensors["A"].shape[0] // tensors["B"].shape[1]
        update.groups = groups
        update.shapes[place.part] = (out, tensors["A"].shape[1] // groups, *tensors["A"].shape[2:])


def _read_pair(place: Place, tensors: Mapping[str, Tensor], spec: Spec) -> tuple[Spec, dict[str, Tensor]] | str:
    """Return the spec and tensors of one pair of factors of a layer's matrix, or what is wrong with it."""
    missing = {"A", "B"} - tensors.keys()
    if missing:
        return f"the file lacks lora_{missing.pop()}"
    A, B = tensors["A"], tensors["B"]
    merged = A.dim() == 2 and B.dim() == 3 and any(place.enabled)
    read: Pair | str
    if place.parameter:
        read = read_stack(A, B, place.experts, place.swapped)
    elif A.dim() > 2 and place.layer == place.path:
        read = read_kernels(A, B, place.channels)
    elif merged:
        read = read_merged(A, B, place.enabled)
    elif place.third is not None:
        read = read_third(A, B, place.third)
    else:
        read = (A, B)
    if isinstance(read, str):
        return read
    blocks = max(A.shape[0] // max(B.shape[1], 1), 1) if A.dim() > 2 and not place.parameter else 1
    if read[0].dim() < 2 or read[1].dim() < 2 or read[0].shape[-2] != read[1].shape[-1]:
        return f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors"
    times = sum(place.enabled) if merged else 1  # the rank of each part
    written_rank, rest = divmod(read[0].shape[-2] * blocks, times)
    if written_rank != spec.rank or rest:
        return f"its factors have rank {written_rank}, adapter_config.json says {spec.rank}"
    if isinstance(spec, LowRank) and not blocks == times == place.additions == 1:
        alpha = spec.alpha / (blocks**0.5 if spec.rank_stabilised else blocks) * times * place.additions
        spec = dataclasses.replace(spec, rank=spec.rank // blocks * times, alpha=alpha)
    beside = {name: tensor for name, tensor in tensors.items() if name not in ("A", "B")}
    if isinstance(spec, DoRA) and "magnitude" not in beside:
        return "the file lacks its lora_magnitude_vector, and adapter_config.json says use_dora"
    if place.layer == place.path:  # PEFT gives the magnitudes of a convolution the dimensions of its output
        beside = {name: tensor.flatten() for name, tensor in beside.items()}
    return spec, {"A": read[0], "B": read[1]} | beside


def _decode_tokens(config: Mapping[str, Any], rest: dict[str, Tensor], content: Content) -> None:
    """Take the rows of trained tokens out of `rest`; of which tokens they are stands in the configuration."""
    indices = config.get("trainable_token_indices") or {}
    for path in [path for path in rest if path == _ROWS or path.endswith(f".{_ROWS}")]:
        name, rows = path.removesuffix(_ROWS).removesuffix("."), rest.pop(path)
        wanted = indices
        if isinstance(indices, dict):
            wanted = next((ids for entry, ids in indices.items() if f".{name}".endswith(f".{entry}")), None)
        if not isinstance(wanted, list) or not all(isinstance(i, int) for i in wanted) or rows.dim() != 2:
            content.problems.append(f"{path}: trainable_token_indices in adapter_config.json does not say whose rows")
            continue
        if len(wanted) != len(rows):
            content.problems.append(f"{path}: {len(rows)} rows for {len(wanted)} tokens")
            continue
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        content.tokens[name] = ([wanted[i] for i in order], rows[order])
    if indices and not content.tokens:
        content.problems.append(
            f"adapter_config.json: trainable_token_indices is {indices!r}, and the file has no rows of tokens"
        )


def _decode_rest(
    config: Mapping[str, Any], rest: Mapping[str, Tensor], account: Account | None, names: Names, content: Content
) -> None:
    """Sort the tensors that are no factors into copies, biases, and tensors of the base that came along."""
    wanted = config.get("modules_to_save") or []
    entries = [] if isinstance(wanted, str) else [str(entry) for entry in wanted]
    copied = account.copies if account is not None else _modules_to_save(entries, rest, names)
    for name in copied:
        content.copies[name] = {}
    for path, tensor in rest.items():
        plain = _plain_path(path, names)
        top = next((name for name in copied if plain.startswith(name + ".")), None)
        module, _, tensor_name = plain.rpartition(".")
        if top is not None and "original_module." not in plain.removeprefix(top):
            content.copies[top][plain.removeprefix(top + ".")] = tensor
        elif "original_module." in plain and module not in names.modules:
            content.base[plain.replace("original_module.", "")] = tensor
        elif tensor_name == "bias" and content.bias != "none":
            content.biases[module] = tensor
        else:
            content.base[plain] = tensor
    if account is None and content.bias == "adapted":
        for name in content.updates:
            layer = names.modules.get(name)
            if layer is not None and layer._parameters.get("bias") is not None and name not in content.biases:
                content.problems.append(
                    f"{name}: bias is 'lora_only', and the file lacks its bias (PEFT 0.7 to 0.20 trained such biases "
                    "and did not save them; with bias 'none' in adapter_config.json the rest can be loaded)"
                )


def _plain_path(path: str, names: Names) -> str:
    """Return a tensor's path without the names of PEFT's wrappers, unless the model has modules called so."""
    if path.rpartition(".")[0] in names.modules:
        return path
    plain = re.sub(r"(^|\.)modules_to_save\.(?:default\.)?", r"\1", path)
    return plain.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def _modules_to_save(entries: list[str], rest: Mapping[str, Tensor], names: Names) -> list[str]:
    """Return the modules that the entries name and of which the file has tensors."""
    found = []
    for path in rest:
        components = path.split(".")
        for length in range(1, len(components)):
            name = ".".join(components[:length])
            if name.endswith(tuple(entries)):  # as PEFT matches them, without regard to dots (peft#3755)
                found += [name] if name not in found else []
                break
    absent = {
        name
        for entry in entries
        for name in names.modules
        if f".{name}".endswith(f".{entry}") and names.canonical[name] == name and name not in found
    }
    # named in the configuration, there in the model, but not in the file: an empty copy makes its keys missing
    return found + sorted(absent)


def _gaps(config: Mapping[str, Any], content: Content, names: Names) -> list[str]:
    """Return a remark when the configuration names layers of this model for which the file has no tensors.

    PEFT would put an untrained adapter there; the tensors decide, so lorank adapts only what is in the file.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None:
        return []
    excluded = config.get("exclude_modules") or []
    excluded = excluded if isinstance(excluded, list) else []

    def is_named(name: str, entries: list[str]) -> bool:
        return any(f".{name}".endswith(f".{entry}") for entry in entries)

    adapted = {names.canonical.get(name, name) for name in content.updates}
    gaps = [
        name
        for name in names.modules
        if names.canonical[name] == name
        and is_named(name, targets)
        and not is_named(name, excluded)
        and name not in adapted
        and not lies_in(name, content.copies)
        and names.why_not(name) is None
    ]
    if not gaps:
        return []
    return [f"target_modules also names {enumerate_names(gaps, 3)}, for which the file has no tensors; not adapted"]
