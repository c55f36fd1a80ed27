"""`adapter_model.safetensors`: which tensor is what, by its name."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import enumerate_names
from ...hosts import own_parameter
from ...names import Names, lies_in
from ..content import Content, LayerUpdate
from .config import BIAS, alphas_of, ranks_of, spec_of
from .header import Account
from .layout import PARAMETERS, PARTS, Pair, layout_of, read_kernels, read_stack, written_pair, written_stack

_PREFIX = "base_model.model."
_PLAIN = ("lora_A.weight", "lora_B.weight")
_LOOKUP = ("lora_embedding_A", "lora_embedding_B")
_ROWS = "token_adapter.trainable_tokens_delta"
_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+){0,2})"
)
_REFUSED_KEYS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_B.bias": "a bias of the low-rank update",
}


def encode_tensors(content: Content) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    for name, update in content.updates.items():
        for path, (A, B) in _written(name, update):
            kinds = _LOOKUP if update.host and update.host.lookup else _PLAIN
            tensors[_key(path, kinds[0])], tensors[_key(path, kinds[1])] = A, B
    for name, tie in content.tied.items():  # PEFT is given factors of its own for each layer
        A, B = written_pair(content.updates[tie.source])
        down, up = (B.T, A.T) if tie.transposed else (A, B)
        source = content.updates[tie.source].host
        lookup = source is not None and source.lookup != tie.transposed  # an embedding that mirrors one, or a head
        kinds = _LOOKUP if lookup else _PLAIN
        tensors[_key(name, kinds[0])], tensors[_key(name, kinds[1])] = down.clone(), up.clone()
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


def _written(name: str, update: LayerUpdate) -> Iterator[tuple[str, Pair]]:
    """Yield the pairs of tensors of a layer, with the path under which each stands."""
    assert update.host is not None, "content that is written was gathered from a model"
    kind = layout_of(update).kind
    if kind == PARAMETERS:
        for path, (A, B) in zip(_nested(name, len(update.factors)), update.factors.values(), strict=True):
            yield path, written_stack(A, B)
    elif kind == PARTS:
        yield from ((f"{name}.{part}".removeprefix("."), pair) for part, pair in update.factors.items())
    else:
        yield name, written_pair(update)


def _nested(name: str, parameters: int) -> list[str]:
    """Return PEFT's paths for adapted parameters of one module, in their order: it wraps one in the next."""
    return [name + ".base_layer" * (parameters - 1 - i) for i in range(parameters)]


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
    for place in _places(factors, config, account, names, problems):
        _decode_place(place, factors, config, content)
    _decode_tokens(config, rest, names, content)
    _decode_rest(config, rest, account, names, content)
    if account is None:
        content.remarks += _gaps(config, content, names)
    return content


def _is_factor_tail(kind: str, rest: str) -> bool:
    """`.weight` or `.<adapter>.weight` after lora_A; nothing or `.<adapter>` after lora_embedding_A."""
    if kind.startswith("lora_embedding"):
        return rest.count(".") <= 1
    return rest.endswith(".weight")


@dataclass(frozen=True)
class _Place:
    """One pair of factors of a file: of which layer and part it is, and how it lies in the file."""

    path: str  # in the tensors' names
    layer: str
    part: str = "weight"
    parameter: bool = False  # in PEFT's layout of parameters,
    experts: int = 0  # as a stack of so many matrices, or of one

    @property
    def matched_as(self) -> str:
        """The name that PEFT's patterns are matched with."""
        return f"{self.layer}.{self.part}".removeprefix(".") if self.parameter else self.layer


def _places(
    factors: Mapping[str, object],
    config: Mapping[str, Any],
    account: Account | None,
    names: Names,
    problems: list[str],
) -> list[_Place]:
    """Return what each pair of factors in a file belongs to."""
    found: dict[str, _Place] = {}
    for name, told in account.layers.items() if account is not None else ():
        if told.layout == PARAMETERS:
            paths = zip(_nested(name, len(told.parts)), told.parts, strict=True)
            found |= {path: _Place(path, name, part, True, told.stacks.get(part, 0)) for path, part in paths}
        elif told.layout == PARTS:
            paths = ((f"{name}.{part}".removeprefix("."), part) for part in told.parts)
            found |= {path: _Place(path, name, part) for path, part in paths}
    if account is not None:
        parameters = {place.matched_as for place in found.values() if place.parameter}
        if parameters != set(config.get("target_parameters") or []):
            problems.append(
                f"target_parameters is {config.get('target_parameters')!r} in adapter_config.json, the tensors' own "
                f"header has {sorted(parameters)}"
            )
    else:
        for name, parameters in _target_parameters(config, names, problems).items():
            for path, part in zip(_nested(name, len(parameters)), parameters, strict=True):
                weight = own_parameter(names.modules[name], part)
                found[path] = _Place(path, name, part, True, weight.shape[0] if weight.dim() == 3 else 0)
        problems += [f"{path}: the file lacks its factors" for path in found if path not in factors]
    return [found.get(path) or _Place(path, path) for path in factors]


def _target_parameters(config: Mapping[str, Any], names: Names, problems: list[str]) -> dict[str, list[str]]:
    """Return {module: its parameters} that `target_parameters` names, which PEFT takes as endings."""
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list):
        problems.append(f"adapter_config.json: target_parameters is {wanted!r}")
        return {}
    found: dict[str, list[str]] = {}
    for entry in wanted:
        matches = names.parameters_matching(str(entry)) if "*" not in str(entry) else []
        if not matches and names.modules.keys() - {""}:
            problems.append(f"adapter_config.json: target_parameters names '{entry}', which this model has not")
        for name, part in matches:
            found.setdefault(name, []).append(part)
    return {name: [part for part in names.modules[name]._parameters if part in parts] for name, parts in found.items()}


def _decode_place(
    place: _Place, factors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], content: Content
) -> None:
    """Put one pair of factors into the content, as factors of its layer's matrix."""
    path, pair, problems = place.path, factors[place.path], content.problems
    rank = ranks_of(config, [place.matched_as], problems)[place.matched_as]
    alpha = alphas_of(config, [place.matched_as], problems)[place.matched_as]
    spec = dataclasses.replace(content.spec, rank=rank, alpha=alpha)
    missing = {"A", "B"} - pair.keys()
    if missing:
        problems.append(f"{path}: the file lacks lora_{missing.pop()}")
        return
    A, B = pair["A"], pair["B"]
    read: Pair | str
    if place.parameter:
        read = read_stack(A, B, place.experts)
    elif A.dim() > 2 and place.layer == place.path:
        read = read_kernels(A, B)
    else:
        read = (A, B)
    if isinstance(read, str):
        problems.append(f"{path}: {read}")
        return
    blocks = max(A.shape[0] // max(B.shape[1], 1), 1) if A.dim() > 2 and not place.parameter else 1
    written_rank = read[0].shape[-2] * blocks if read[0].dim() > 1 else 0
    if read[0].dim() < 2 or read[1].dim() < 2 or read[0].shape[-2] != read[1].shape[-1]:
        problems.append(f"{path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors")
        return
    if written_rank != spec.rank:
        problems.append(f"{path}: its factors have rank {written_rank}, adapter_config.json says {spec.rank}")
        spec = dataclasses.replace(spec, rank=max(written_rank, 1))
    if blocks > 1:
        spec = dataclasses.replace(
            spec, rank=spec.rank // blocks, alpha=spec.alpha / (blocks**0.5 if spec.rank_stabilised else blocks)
        )
    update = content.updates.setdefault(place.layer, LayerUpdate(spec, {}, by_parts=place.parameter))
    if spec != update.spec:
        update.specs[place.part] = spec
    update.factors[place.part] = read


def _decode_tokens(config: Mapping[str, Any], rest: dict[str, Tensor], names: Names, content: Content) -> None:
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
                content.problems.append(f"{name}: bias is 'lora_only', and the file lacks its bias")


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
