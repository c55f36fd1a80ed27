"""lorank's own account of an adapter, in the safetensors header under the key "lorank".

It holds what PEFT's configuration cannot say exactly: the spec of every layer, the parts of fused projections, a
fingerprint of the adapted weights, and the sha256 of the tensors. It is checked where it is there, and not needed
where it is not.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ...errors import AdapterError, raise_problems
from ...fingerprint import Fingerprint
from ...hosts import layout_of
from ...lowrank import split_blocks
from ...targets import Names
from ...variants import LoRA, Spec
from .. import safetensors_file
from ..content import Content, LayerUpdate
from .config import rank_alpha

_VERSION = 1


def encode_header(content: Content) -> dict[str, Any]:
    layers = {}
    for name, update in content.updates.items():
        prints = {part: fingerprint.to_json() for part, fingerprint in update.fingerprints.items()}
        layers[name] = {"spec": update.spec.to_json(), "parts": list(update.factors), "base": prints}
    return {
        "version": _VERSION,
        "spec": content.spec.to_json(),
        "layers": layers,
        "biases": sorted(content.biases),
        "copies": sorted(content.copies),
        "bias": content.bias,
    }


def read_header(metadata: Mapping[str, str], packed: bytes, file: Path) -> dict[str, Any] | None:
    if "lorank" not in metadata:
        return None
    header = json.loads(metadata["lorank"])
    if header.get("version") != _VERSION:
        raise AdapterError(
            f"{file} was written by another lorank (header version {header.get('version')}; this one reads "
            f"{_VERSION}); update lorank"
        )
    if header.get("sha256") != safetensors_file.digest(packed):
        raise AdapterError(
            f"{file}: the tensors are not those that were saved (their sha256 differs): damaged or edited"
        )
    return header


def check_header(header: Mapping[str, Any], content: Content, names: Names) -> None:
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
        if not math.isclose(update.spec.scale, spec.scale, rel_tol=1e-6) or rank_alpha(told)[0] != update.spec.rank:
            problems.append(
                f"{name}: rank and scale are {update.spec.rank} and {update.spec.scale:g} in adapter_config.json, "
                f"{rank_alpha(told)[0]} and {spec.scale:g} in the tensors' own header; the two do not belong together"
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
