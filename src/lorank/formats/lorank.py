"""lorank's own file, for adapters that PEFT's layout cannot hold: one safetensors file with everything by name.

Biases or copied blocks without an update of a matrix, adapters behind layers, prefixes; and beside these any update,
each method by its own tensors. The header says what they are, and by some fingerprints on which base they were
trained.

    updates/<layer>/<part>/<tensor>    inserted/<module>/<tensor>    biases/<layer>
    copies/<module>/<tensor>           tokens/<layer>

A slash in a module's own name, and what else is no letter or digit of a name, is written as in an address (%2F).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote as quoted, unquote

import safetensors
from safetensors import SafetensorError
from torch import Tensor, nn

from ..baselines import Baseline
from ..errors import AdapterError, enumerate_names
from ..fingerprint import Fingerprint
from ..names import Names
from ..planned import Bias
from ..tied import Tie
from ..variants import METHODS, LoRA, Spec
from . import safetensors_file
from .content import Content, Given, LayerUpdate, as_json, nothing_to_tell, refuse_given, take_about

quote = partial(quoted, safe="")

TENSORS = "adapter_lorank.safetensors"
_KEY = "lorank.adapter"
_VERSION = 1
_SECTIONS = ("updates", "inserted", "biases", "copies", "tokens")

NATIVE, WRITES, to_be_told = tuple(METHODS), True, nothing_to_tell


def detect(path: Path) -> bool:
    """Tell whether a path is such a file, or a directory with one."""
    file = path / TENSORS if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safetensors.safe_open(file, "pt") as found:
            return _KEY in (found.metadata() or {})
    except (SafetensorError, OSError):
        return file.name == TENSORS  # damaged, which reading it will say


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter into a directory. Other files there stay as they are."""
    if path.exists() and not path.is_dir():
        raise AdapterError(f"cannot save: {path} is a file; an adapter is a directory")
    others = [name for name in ("adapter_config.json", "adapter_model.safetensors") if (path / name).is_file()]
    if others:
        raise AdapterError(f"cannot save: {path} has an adapter in another format already ({', '.join(others)})")
    tensors = {f"biases/{quote(layer)}": bias for layer, bias in content.biases.items()}
    tensors |= {f"tokens/{quote(layer)}": rows for layer, (_, rows) in content.tokens.items()}
    for name, copy in content.copies.items():
        tensors |= {f"copies/{quote(name)}/{key}": tensor for key, tensor in copy.items()}
    for name, (_, own) in content.inserted.items():
        tensors |= {f"inserted/{quote(name)}/{key}": tensor for key, tensor in own.items()}
    for layer, update in content.updates.items():
        for part, own in update.tensors.items():
            tensors |= {f"updates/{quote(layer)}/{part}/{key}": tensor for key, tensor in own.items()}
    packed = safetensors_file.pack(tensors)
    account = {
        "version": _VERSION,
        "spec": content.spec.to_json() if content.updates else None,
        "updates": {layer: _update_to_json(update) for layer, update in content.updates.items()},
        "baselines": [baseline.to_json() for baseline in content.baselines],
        "inserted": {name: method for name, (method, _) in content.inserted.items()},
        "tokens": {layer: ids for layer, (ids, _) in content.tokens.items()},
        "copies": sorted(content.copies),
        "tied": {name: {"source": tie.source, "transposed": tie.transposed} for name, tie in content.tied.items()},
        "bias": content.bias,
        "landmarks": {name: found.to_json() for name, found in content.landmarks.items()},
        "about": json.loads(as_json(content.about)),
        "base_model": content.base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "sha256": safetensors_file.digest(packed),
    }
    header = {"format": "pt", _KEY: json.dumps(account, sort_keys=True, separators=(",", ":"))}
    safetensors_file.write_atomically({path / TENSORS: safetensors_file.with_metadata(packed, header)})
    return []


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter; raises AdapterError for damaged files, and for those of another version of lorank."""
    refuse_given(given)
    file = path / TENSORS if path.is_dir() else path
    packed, tensors, metadata = safetensors_file.read(file)
    try:
        account = json.loads(metadata[_KEY])
        if account["version"] != _VERSION:
            raise AdapterError(
                f"{file} was written by another lorank (version {account['version']} of the file; this one reads "
                f"{_VERSION}); update lorank"
            )
        if account["sha256"] != safetensors_file.digest(packed):
            raise AdapterError(
                f"{file}: the tensors are not those that were saved (their sha256 differs): damaged or edited"
            )
        return _parse(account, _by_section(tensors))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{file}: its header is damaged ({type(error).__name__}: {error})") from None


def _by_section(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {section: {} for section in _SECTIONS}
    for key, tensor in tensors.items():
        section, _, rest = key.partition("/")
        found[section][unquote(rest) if section in ("biases", "tokens") else rest] = tensor
    return found


def _parse(account: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Content:
    """Return what the header and the tensors say; raises KeyError and the like where the two do not fit."""
    content = Content(LoRA() if account["spec"] is None else Spec.from_json(account["spec"]))
    nested = {section: _nested(tensors[section]) for section in ("updates", "inserted", "copies")}
    for layer, fields in account["updates"].items():
        own: dict[str, dict[str, Tensor]] = {}
        for key, tensor in nested["updates"].pop(layer).items():
            part, _, name = key.partition("/")
            own.setdefault(part, {})[name] = tensor
        content.updates[layer] = _update_from_json(fields, own)
    for name, method in account["inserted"].items():
        content.inserted[name] = str(method), nested["inserted"].pop(name, {})
    for name in account["copies"]:
        content.copies[name] = nested["copies"].pop(name)
    unnamed = [f"{section}/{name}" for section, left in nested.items() for name in left]
    unnamed += [f"tokens/{name}" for name in tensors["tokens"].keys() ^ account["tokens"].keys()]
    if unnamed:
        raise ValueError(f"it does not name {enumerate_names(unnamed, 3)}")
    content.biases = dict(tensors["biases"])
    content.tokens = {layer: ([*map(int, ids)], tensors["tokens"][layer]) for layer, ids in account["tokens"].items()}
    content.baselines = tuple(Baseline.from_json(stored) for stored in account["baselines"])
    content.tied = {n: Tie(str(t["source"]), bool(t["transposed"])) for n, t in account["tied"].items()}
    content.landmarks = {name: Fingerprint.from_json(stored) for name, stored in account["landmarks"].items()}
    if account["bias"] not in get_args(Bias):
        raise ValueError(f"bias is {account['bias']!r}")
    content.bias = account["bias"]
    content.base_model = None if account["base_model"] is None else str(account["base_model"])
    take_about(content, account["about"])
    return content


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition("/")
        found.setdefault(unquote(name), {})[rest] = tensor
    return found


def _update_to_json(update: LayerUpdate) -> dict[str, Any]:
    return {
        "spec": update.spec.to_json(),
        "specs": {part: spec.to_json() for part, spec in update.specs.items()},
        "base": {part: found.to_json() for part, found in update.fingerprints.items()},
        "shapes": {part: list(shape) for part, shape in update.shapes.items()},
        "matrices": {part: list(shape) for part, shape in update.matrices.items()},
        "lookup": update.lookup,
        "transposed": update.transposed,
        "groups": update.groups,
    }


def _update_from_json(fields: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> LayerUpdate:
    return LayerUpdate(
        Spec.from_json(fields["spec"]),
        tensors,
        specs={str(part): Spec.from_json(spec) for part, spec in fields["specs"].items()},
        shapes={str(part): tuple(map(int, shape)) for part, shape in fields["shapes"].items()},
        matrices={str(part): tuple(map(int, shape)) for part, shape in fields["matrices"].items()},
        lookup=bool(fields["lookup"]),
        transposed=bool(fields["transposed"]),
        groups=int(fields["groups"]),
        fingerprints={str(part): Fingerprint.from_json(base) for part, base in fields["base"].items()},
        by_parts=True,
    )
