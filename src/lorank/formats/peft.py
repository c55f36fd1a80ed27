"""PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

The tensors say where an adapter sits; the configuration says with which scale. PEFT, vLLM and others read these
files with the same outputs. Beside that the safetensors header carries lorank's own account of the adapter under
the key "lorank": the parts of fused projections, the rank and scale of every layer, a fingerprint of the adapted
weights and the sha256 of the tensors. It is checked where it is there, and not needed where it is not.
"""

import dataclasses
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import AdapterError, AdapterWarning, enumerate_names, raise_problems
from ..fingerprint import Fingerprint
from ..hosts import FusedHost, layout_of
from ..lowrank import split_blocks, stack_blocks
from ..planning import Bias
from ..targets import Names
from ..variants import LoRA, Spec
from . import safetensors_file
from .content import Content, LayerUpdate
from .pattern import Pattern

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEADER_VERSION = 1

# Settings that change what the tensors mean, with the values that do not.
_MEANINGFUL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Initialisations for which PEFT takes the adapter's start out of the base weight when it loads the file.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings that say how the adapter was trained, or for whom, and nothing about its tensors.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "init_lora_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying"),
        "runtime_config",
    }
)
_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+){0,2})"
)
_REFUSED_KEYS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "token_adapter": "trained tokens",
    "lora_B.bias": "a bias of the low-rank update",
}


def detect(path: Path) -> bool:
    """Tell whether the path is an adapter in PEFT's layout: a directory, or its safetensors file."""
    folder = path if path.is_dir() else path.parent
    return (folder / CONFIG).is_file() and (path.is_dir() or path.suffix == ".safetensors")


def write(content: Content, path: Path, model: nn.Module) -> None:
    """Write an adapter into a directory. Other files there stay as they are."""
    tensors = _encode_tensors(content)
    config = _encode_config(content, model)
    header = _header(content)
    header["sha256"] = safetensors_file.digest(safetensors_file.pack(tensors))
    metadata = {"format": "pt", "lorank": json.dumps(header, sort_keys=True, separators=(",", ":"))}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # The tensors go first: their header alone says what they are, should the second file never arrive.
    files = {path / TENSORS: safetensors_file.pack(tensors, metadata), path / CONFIG: text.encode()}
    safetensors_file.write_atomically(files)


def read(path: Path, names: Names) -> Content:
    """Read an adapter for a model with these module names; raises AdapterError that lists every problem."""
    folder, file = (path, path / TENSORS) if path.is_dir() else (path.parent, path)
    config = _read_config(folder / CONFIG)
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        hint = (
            f"; {pickled.name} is a pickle, which lorank does not open: save it as safetensors"
            if pickled.exists()
            else ""
        )
        raise AdapterError(f"{folder} has no {TENSORS}{hint}")
    packed, tensors, metadata = safetensors_file.read(file)
    header = _read_header(metadata, packed, file)
    _check_config(config, folder)
    content = _decode(config, tensors, header, names)
    if header is not None:
        _check_header(header, content, config, names)
    return content


# ---- writing


def _encode_tensors(content: Content) -> dict[str, Tensor]:
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


def _rank_alpha(update: LayerUpdate) -> tuple[int, float]:
    """Return rank and alpha of the whole layer, such that PEFT computes the same scale."""
    parts, spec = len(update.factors), update.spec
    return parts * spec.rank, spec.alpha * (math.sqrt(parts) if spec.rank_stabilised else parts)


def _encode_config(content: Content, model: nn.Module) -> dict[str, Any]:
    spec = content.spec
    of_layer = {name: _rank_alpha(update) for name, update in content.updates.items()}
    rank, alpha = Counter(of_layer.values()).most_common(1)[0][0] if of_layer else (spec.rank, spec.alpha)
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, content),
        "auto_mapping": None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rank_stabilised,
        "use_dora": False,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "bias": {"none": "none", "adapted": "lora_only", "all": "all"}[content.bias],
        "fan_in_fan_out": any(type(update.host).__name__ == "Conv1DHost" for update in _plain(content)),
        "target_modules": _target_modules(content, model),
        "exclude_modules": None,
        "modules_to_save": sorted(content.copies) or None,
        "rank_pattern": {_exactly(n): r for n, (r, _) in sorted(of_layer.items()) if r != rank},
        "alpha_pattern": {_exactly(n): _number(a) for n, (_, a) in sorted(of_layer.items()) if a != alpha},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _plain(content: Content) -> list[LayerUpdate]:
    """Return the updates with the hosts of their whole layers."""
    return [
        dataclasses.replace(update, host=update.host.base) if isinstance(update.host, FusedHost) else update
        for update in content.updates.values()
    ]


def _target_modules(content: Content, model: nn.Module) -> list[str] | str:
    """Return full names, which PEFT takes as endings too; where one is the end of another, an exact pattern."""
    layers = sorted(content.updates)
    others = [name for name, _ in model.named_modules() if name not in content.updates]
    ambiguous = any(name.endswith(f".{layer}") for name in others for layer in layers if len(name) > len(layer))
    return "|".join(re.escape(layer) for layer in layers) if ambiguous or "" in layers else layers


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _task_type(model: nn.Module, content: Content) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    # PEFT adds the head to modules_to_save by itself for these, so they are only true when it was trained.
    heads = {"classifier", "score"} & content.copies.keys()
    if name.endswith("ForSequenceClassification") and heads:
        return "SEQ_CLS"
    if name.endswith("ForTokenClassification") and heads:
        return "TOKEN_CLS"
    return None


def _header(content: Content) -> dict[str, Any]:
    layers = {}
    for name, update in content.updates.items():
        prints = {part: fingerprint.to_json() for part, fingerprint in update.fingerprints.items()}
        layers[name] = {"spec": update.spec.to_json(), "parts": list(update.factors), "base": prints}
    return {
        "version": _HEADER_VERSION,
        "spec": content.spec.to_json(),
        "layers": layers,
        "biases": sorted(content.biases),
        "copies": sorted(content.copies),
        "bias": content.bias,
    }


# ---- reading


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path.parent} has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def _read_header(metadata: Mapping[str, str], packed: bytes, file: Path) -> dict[str, Any] | None:
    if "lorank" not in metadata:
        return None
    header = json.loads(metadata["lorank"])
    if header.get("version") != _HEADER_VERSION:
        raise AdapterError(
            f"{file} was written by another lorank (header version {header.get('version')}; this one reads "
            f"{_HEADER_VERSION}); update lorank"
        )
    if header.get("sha256") != safetensors_file.digest(packed):
        raise AdapterError(
            f"{file}: the tensors are not those that were saved (their sha256 differs): damaged or edited"
        )
    return header


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what changes the meaning of the tensors and is not supported; warn about what is not known."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA can be read")
    for key, harmless in _MEANINGFUL.items():
        if key in config and config[key] not in harmless:
            problems.append(f"{key} is {config[key]!r}, which is not supported")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        problems.append(
            f"init_lora_weights is {init!r}: the adapter belongs to a base from which PEFT takes the adapter's start away "
            "when it loads; convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("rank_pattern", dict), ("alpha_pattern", dict)):
        if config.get(key) is not None and not isinstance(config[key], kinds):
            problems.append(f"{key} is {config[key]!r}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {config['bias']!r}; PEFT knows none, all and lora_only")
    raise_problems(f"cannot read {folder / CONFIG}", problems)
    unknown = sorted(k for k in config.keys() - _HARMLESS - _MEANINGFUL.keys() if config[k])
    if unknown:
        warnings.warn(
            f"{folder / CONFIG}: {enumerate_names(unknown)} is not known here and was ignored",
            AdapterWarning,
            stacklevel=5,
        )


def _decode(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None, names: Names
) -> Content:
    problems: list[str] = []
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        refused = next((what for token, what in _REFUSED_KEYS.items() if f".{token}" in f".{path}"), None)
        factor = _FACTOR.fullmatch(path)
        if refused:
            problems.append(f"{key} is {refused}, which cannot be read yet")
        elif factor and _is_factor_tail(factor["kind"], factor["rest"]):
            kind = "A" if factor["kind"].endswith("A") else "B"
            found = factors.setdefault(factor["path"] or "", {})
            if kind in found:
                problems.append(f"{key}: a second {kind} for the same layer (several adapters in one file?)")
            found[kind] = tensor
        elif factor and factor["rest"] == "" and not factor["kind"].startswith("lora_embedding"):
            problems.append(f"{key} has loralib's name, without .weight; it is not a tensor of PEFT's layout")
        else:
            rest[path] = tensor
    base = _spec(config, problems)
    content = Content(base, bias=_BIAS[config.get("bias") or "none"])
    alphas = _alphas(config, factors, problems)
    for path, pair in factors.items():
        missing = {"A", "B"} - pair.keys()
        if missing:
            problems.append(f"{path}: the file lacks lora_{missing.pop()}")
            continue
        rank = pair["A"].shape[0]
        if rank < 1 or pair["A"].dim() != 2 or pair["B"].dim() != 2:
            problems.append(
                f"{path}: lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)} are no factors"
            )
            continue
        spec = dataclasses.replace(base, rank=rank, alpha=alphas[path])
        content.updates[path] = LayerUpdate(spec, {"weight": (pair["A"], pair["B"])})
    _decode_rest(config, rest, header, names, content, problems)
    raise_problems("this adapter does not fit this model", problems)
    if header is None:
        _warn_of_gaps(config, content, names)
    return content


_BIAS: dict[str, Bias] = {"none": "none", "lora_only": "adapted", "all": "all"}


def _is_factor_tail(kind: str, rest: str) -> bool:
    """`.weight` or `.<adapter>.weight` after lora_A; nothing or `.<adapter>` after lora_embedding_A."""
    if kind.startswith("lora_embedding"):
        return rest.count(".") <= 1
    return rest.endswith(".weight")


def _spec(config: Mapping[str, Any], problems: list[str]) -> LoRA:
    try:
        return LoRA(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout") or 0.0,
            rank_stabilised=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except AdapterError as error:
        problems.append(f"{CONFIG}: {error}")
        return LoRA()


def _alphas(config: Mapping[str, Any], layers: Mapping[str, Any], problems: list[str]) -> dict[str, float]:
    """Return each layer's alpha: that of the first key of alpha_pattern that matches its name, or the global one."""
    default = config.get("lora_alpha", 8)
    patterns = []
    for text, alpha in (config.get("alpha_pattern") or {}).items():
        try:
            patterns.append((Pattern(text), alpha))
        except AdapterError as error:
            problems.append(str(error))
    return {name: next((a for pattern, a in patterns if pattern.matches_end(name)), default) for name in layers}


def _decode_rest(
    config: Mapping[str, Any],
    rest: Mapping[str, Tensor],
    header: Mapping[str, Any] | None,
    names: Names,
    content: Content,
    problems: list[str],
) -> None:
    """Sort the tensors that are no factors into copies, biases, and tensors of the base that came along."""
    wanted = config.get("modules_to_save") or []
    entries = [] if isinstance(wanted, str) else list(wanted)
    copied = header["copies"] if header is not None else _modules_to_save(entries, rest, names)
    for name in copied:
        content.copies[name] = {}
    biases_are_trained = content.bias != "none"
    for path, tensor in rest.items():
        plain = re.sub(r"(^|\.)modules_to_save\.(?:default\.)?", r"\1", path).replace(".base_layer.", ".")
        top = next((name for name in copied if plain.startswith(name + ".")), None)
        module, _, tensor_name = plain.rpartition(".")
        if "original_module." in plain:
            content.base[plain.replace("original_module.", "")] = tensor
        elif top is not None:
            content.copies[top][plain.removeprefix(top + ".")] = tensor
        elif tensor_name == "bias" and biases_are_trained:
            content.biases[module] = tensor
        else:
            content.base[plain] = tensor
    if header is None and content.bias == "adapted":
        for name in content.updates:
            layer = names.modules.get(name)
            if layer is not None and layer._parameters.get("bias") is not None and name not in content.biases:
                problems.append(f"{name}: bias is 'lora_only', and the file lacks its bias")


def _modules_to_save(entries: list[str], rest: Mapping[str, Tensor], names: Names) -> list[str]:
    """Return the modules that the entries name, as whole dotted components, and of which the file has tensors."""
    found = []
    for path in rest:
        components = path.removesuffix(".weight").split(".")
        for length in range(1, len(components) + 1):
            name = ".".join(components[:length])
            if any(f".{name}".endswith(f".{entry}") for entry in entries) and name not in found:
                found.append(name)
                break
    absent = {
        name
        for entry in entries
        for name in names.modules
        if f".{name}".endswith(f".{entry}") and names.canonical[name] == name and name not in found
    }
    # named in the configuration, there in the model, but not in the file: an empty copy makes its keys missing
    return found + sorted(absent)


def _warn_of_gaps(config: Mapping[str, Any], content: Content, names: Names) -> None:
    """Warn when the configuration names layers of this model for which the file has no tensors.

    PEFT would put an untrained adapter there; the tensors decide, so lorank adapts only what is in the file.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None:
        return
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
        and not any(name == top or name.startswith(top + ".") for top in content.copies)
        and names.why_not(name) is None
    ]
    if gaps:
        warnings.warn(
            f"target_modules also names {enumerate_names(gaps, 3)}, for which the file has no tensors; not adapted",
            AdapterWarning,
            stacklevel=6,
        )


def _check_header(header: Mapping[str, Any], content: Content, config: Mapping[str, Any], names: Names) -> None:
    """Hold the file against its own account, and take from it the specs, parts and fingerprints."""
    problems = [f"the file lacks the factors of {name}" for name in header["layers"].keys() - content.updates.keys()]
    problems += [
        f"the file has factors of {name}, which its header does not name"
        for name in content.updates.keys() - header["layers"].keys()
    ]
    problems += [f"the file lacks the bias of {name}" for name in set(header["biases"]) - content.biases.keys()]
    content.spec = cast(LoRA, Spec.from_json(header["spec"]))
    content.bias = header["bias"]
    for name, fields in header["layers"].items():
        update = content.updates.get(name)
        if update is None:
            continue
        spec, parts = cast(LoRA, Spec.from_json(fields["spec"])), list(fields["parts"])
        told = LayerUpdate(spec, dict.fromkeys(parts, update.factors["weight"]))
        if not math.isclose(update.spec.scale, spec.scale, rel_tol=1e-6) or _rank_alpha(told)[0] != update.spec.rank:
            problems.append(
                f"{name}: {CONFIG} says rank {update.spec.rank} and scale {update.spec.scale:g}, the tensors' own "
                f"header rank {_rank_alpha(told)[0]} and scale {spec.scale:g}; the two files do not belong together"
            )
        update.spec = spec
        update.fingerprints = {part: Fingerprint.from_json(base) for part, base in fields["base"].items()}
        if parts != ["weight"]:
            _split_parts(name, parts, update, names, problems)
    raise_problems("this adapter does not fit this model", problems)


def _split_parts(name: str, parts: list[str], update: LayerUpdate, names: Names, problems: list[str]) -> None:
    A, B = update.factors["weight"]
    if name not in names.modules:
        problems.append(f"the file adapts {name}, which this model has not")
        return
    owner, child = names.parent(names.canonical[name])
    assert owner is not None, "a fused layer is held by the module that splits it"
    try:
        layout = layout_of(owner, child, names.modules[name], B.shape[0])
    except AdapterError as error:
        problems.append(f"{name}: {error}")
        return
    unknown = [part for part in parts if part not in layout.parts]
    blocks = None if unknown else split_blocks(A, B, [layout.index(part) for part in parts])
    if blocks is None:
        problems.append(
            f"{name}: its tensors are not the parts {', '.join(parts)} of this model's {type(owner).__name__}"
        )
        return
    update.factors = dict(zip(parts, blocks, strict=True))
