"""`adapter_model.safetensors`: which tensor is what, by its name."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import enumerate_names
from ...hosts import FusedHost
from ...lowrank import stack_blocks
from ...targets import Names, lies_in
from ...variants import LoRA
from ..content import Content, LayerUpdate
from .config import BIAS, alphas_of, ranks_of, spec_of
from .header import Account

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+){0,2})"
)
_REFUSED_KEYS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "token_adapter": "trained tokens",
    "lora_B.bias": "a bias of the low-rank update",
}


def encode_tensors(content: Content) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    for name, update in content.updates.items():
        assert update.host is not None, "content that is written was gathered from a model"
        A, B = _whole(update)
        kinds = ("lora_embedding_A", "lora_embedding_B") if update.host.lookup else ("lora_A.weight", "lora_B.weight")
        tensors[_key(name, kinds[0])], tensors[_key(name, kinds[1])] = A, B
    for name, value in content.biases.items():
        tensors[_key(name, "base_layer.bias" if name in content.updates else "bias")] = value
    for name, copy in content.copies.items():
        # safetensors refuses shared memory; what is tied inside a copy is written out twice
        tensors.update({_key(name, key): tensor.clone() for key, tensor in copy.items()})
    return tensors


def _whole(update: LayerUpdate) -> tuple[Tensor, Tensor]:
    """Return the factors of the whole layer: for parts of a fused projection, one exact block-structured pair."""
    if not isinstance(update.host, FusedHost):
        return update.factors["weight"]
    layout = update.host.layout
    return stack_blocks([(A, B, layout.index(part)) for part, (A, B) in update.factors.items()], layout.rows)


def _key(name: str, suffix: str) -> str:
    return f"{_PREFIX}{name}.{suffix}" if name else f"{_PREFIX}{suffix}"


def decode(config: Mapping[str, Any], tensors: Mapping[str, Tensor], account: Account | None, names: Names) -> Content:
    """Return what the tensors are; what is wrong with them goes into the content's `problems`."""
    problems: list[str] = []
    base = spec_of(config, problems)
    content = Content(base, bias=BIAS[config.get("bias") or "none"], problems=problems)
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        in_copy = account is not None and any(path.startswith(f"{name}.") for name in account.copies)
        factor = None if in_copy else _FACTOR.fullmatch(path)
        refused = next((what for token, what in _REFUSED_KEYS.items() if f".{token}" in f".{path}"), None)
        if factor and _is_factor_tail(factor["kind"], factor["rest"]):
            kind = "A" if factor["kind"].endswith("A") else "B"
            found = factors.setdefault(factor["path"] or "", {})
            if kind in found:
                problems.append(f"{key}: a second {kind} for the same layer (several adapters in one file?)")
            found[kind] = tensor
        elif refused and not in_copy:
            problems.append(f"{key} is {refused}, which cannot be read yet")
        elif factor and factor["rest"] == "" and not factor["kind"].startswith("lora_embedding"):
            problems.append(f"{key} has loralib's name, without .weight; it is not a tensor of PEFT's layout")
        elif path in rest:
            problems.append(f"{key} is in the file twice, with and without the prefix {_PREFIX}")
        else:
            rest[path] = tensor
    ranks = ranks_of(config, factors, problems)
    alphas = alphas_of(config, factors, problems)
    for path, pair in factors.items():
        update = _update(path, pair, dataclasses.replace(base, rank=ranks[path], alpha=alphas[path]), problems)
        if update is not None:
            content.updates[path] = update
    _decode_rest(config, rest, account, names, content)
    if account is None:
        content.remarks += _gaps(config, content, names)
    return content


def _is_factor_tail(kind: str, rest: str) -> bool:
    """`.weight` or `.<adapter>.weight` after lora_A; nothing or `.<adapter>` after lora_embedding_A."""
    if kind.startswith("lora_embedding"):
        return rest.count(".") <= 1
    return rest.endswith(".weight")


def _update(path: str, pair: dict[str, Tensor], spec: LoRA, problems: list[str]) -> LayerUpdate | None:
    missing = {"A", "B"} - pair.keys()
    if missing:
        problems.append(f"{path}: the file lacks lora_{missing.pop()}")
        return None
    A, B = pair["A"], pair["B"]
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        problems.append(f"{path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors")
        return None
    if A.shape[0] != spec.rank:
        problems.append(f"{path}: its factors have rank {A.shape[0]}, adapter_config.json says {spec.rank}")
        spec = dataclasses.replace(spec, rank=max(A.shape[0], 1))
    return LayerUpdate(spec, {"weight": (A, B)})


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
                content.problems.append(f"{name}: bias is 'lora_only', and the file lacks its bias")


def _plain_path(path: str, names: Names) -> str:
    """Return a tensor's path without the names of PEFT's wrappers, unless the model has modules called so."""
    if path.rpartition(".")[0] in names.modules:
        return path
    return re.sub(r"(^|\.)modules_to_save\.(?:default\.)?", r"\1", path).replace(".base_layer.", ".")


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
