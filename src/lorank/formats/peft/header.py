"""lorank's own account of an adapter, in the safetensors header under the key "lorank".

It holds what PEFT's configuration cannot say exactly: the spec of every layer, the parts of fused projections, a
fingerprint of the adapted weights, and the sha256 of the tensors. It is checked where it is there, and not needed
where it is not.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import AdapterError
from ...fingerprint import Fingerprint
from ...hosts import FusedHost
from ...lowrank import split_blocks
from ...names import Names
from ...planning import Bias
from ...tied import Tie
from ...variants import LoRA, Spec
from .. import safetensors_file
from ..content import Content, LayerUpdate
from .config import BIAS, rank_alpha
from .layout import BLOCKS, MATRIX, layout_of

_KEY = "lorank"
_VERSION = 1


@dataclass(frozen=True)
class LayerAccount:
    """What the header says of one layer."""

    spec: LoRA
    specs: dict[str, LoRA]  # of parts that differ
    parts: list[str]  # ["weight"], or the parts in the order of their blocks
    layout: str  # of `layout.py`
    blocks: int  # times the rank that PEFT's pair has
    stacks: dict[str, int]  # how many matrices a part is a stack of, where it is one
    fingerprints: dict[str, Fingerprint]  # by part; a part may have none


@dataclass(frozen=True)
class Account:
    """What the header says of the adapter."""

    spec: LoRA
    bias: Bias
    layers: dict[str, LayerAccount]
    biases: list[str]  # layers whose bias is in the file
    copies: list[str]  # modules of which a copy is in the file
    tied: dict[str, Tie]  # layers whose factors in the file are those of another
    about: dict[str, Any]


def encode_header(content: Content, packed: bytes) -> dict[str, str]:
    """Return the metadata of a file with these tensors."""
    layers = {}
    for name, update in content.updates.items():
        prints = {part: fingerprint.to_json() for part, fingerprint in update.fingerprints.items()}
        layout = layout_of(update)
        stacks = {part: A.shape[0] for part, (A, _) in update.factors.items() if A.dim() == 3}
        layers[name] = {"spec": update.spec.to_json(), "parts": list(update.factors), "base": prints}
        if update.specs:
            layers[name]["specs"] = {part: spec.to_json() for part, spec in update.specs.items()}
        layers[name] |= {"layout": layout.kind, "blocks": layout.blocks, "stacks": stacks}
    account = {
        "version": _VERSION,
        "spec": content.spec.to_json(),
        "layers": layers,
        "biases": sorted(content.biases),
        "copies": sorted(content.copies),
        "bias": content.bias,
        "tied": {name: {"source": tie.source, "transposed": tie.transposed} for name, tie in content.tied.items()},
        "about": content.about,
        "sha256": safetensors_file.digest(packed),
    }
    return {"format": "pt", _KEY: json.dumps(account, sort_keys=True, separators=(",", ":"))}


def read_header(metadata: Mapping[str, str], packed: bytes, file: Path) -> Account | None:
    """Return the account in a file's metadata; None when another tool wrote the file.

    Raises AdapterError for a header that cannot be read, and for tensors that are not those it was written for.
    """
    if _KEY not in metadata:
        return None
    try:
        account = json.loads(metadata[_KEY])
        version, digest = account["version"], account["sha256"]
        parsed = _parse(account) if version == _VERSION else None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, AdapterError) as error:
        raise AdapterError(f"{file}: lorank's header is damaged ({type(error).__name__}: {error})") from None
    if parsed is None:
        raise AdapterError(
            f"{file} was written by another lorank (header version {version}; this one reads {_VERSION}); update lorank"
        )
    if digest != safetensors_file.digest(packed):
        raise AdapterError(
            f"{file}: the tensors are not those that were saved (their sha256 differs): damaged or edited"
        )
    return parsed


def _parse(account: dict[str, Any]) -> Account:
    layers = {}
    for name, fields in account["layers"].items():
        prints = {part: Fingerprint.from_json(base) for part, base in fields["base"].items()}
        parts = [str(part) for part in fields["parts"]]
        layout = str(fields.get("layout", MATRIX if parts == ["weight"] else BLOCKS))
        blocks = int(fields.get("blocks", len(parts)))
        stacks = {str(part): int(number) for part, number in fields.get("stacks", {}).items()}
        specs = {str(part): _spec(spec) for part, spec in fields.get("specs", {}).items()}
        layers[name] = LayerAccount(_spec(fields["spec"]), specs, parts, layout, blocks, stacks, prints)
    if account["bias"] not in BIAS.values():
        raise ValueError(f"bias is {account['bias']!r}")
    if not all(isinstance(name, str) for name in [*account["biases"], *account["copies"]]):
        raise ValueError("names of modules are strings")
    about = account.get("about", {})  # files of 0.1 before it had one
    if not isinstance(about, dict):
        raise ValueError(f"about is {about!r}")
    tied = {n: Tie(str(t["source"]), bool(t["transposed"])) for n, t in account.get("tied", {}).items()}
    biases, copies = [*account["biases"]], [*account["copies"]]
    return Account(_spec(account["spec"]), account["bias"], layers, biases, copies, tied, about)


def _spec(fields: dict[str, Any]) -> LoRA:
    spec = Spec.from_json(fields)
    if not isinstance(spec, LoRA):
        raise ValueError(f"its variant is {spec.variant}")
    return spec


def apply_account(account: Account, content: Content, names: Names | None) -> None:
    """Hold what was read against the file's own account, and take from it specs, parts and fingerprints."""
    problems = content.problems
    for name, tie in account.tied.items():
        copied, source = content.updates.pop(name, None), content.updates.get(tie.source)
        if copied is None or source is None or not _is_mirrored(copied, source, tie):
            problems.append(f"{name}: its factors are not those of {tie.source}, with which its header ties it")
    content.tied = account.tied
    problems += [
        f"the file lacks the factors of {name}" for name in sorted(account.layers.keys() - content.updates.keys())
    ]
    problems += [
        f"the file has factors of {name}, which its header does not name"
        for name in sorted(content.updates.keys() - account.layers.keys())
    ]
    problems += [f"the file lacks the bias of {name}" for name in sorted(set(account.biases) - content.biases.keys())]
    content.spec = account.spec
    content.bias = account.bias
    content.about = account.about
    for name, told in account.layers.items():
        update = content.updates.get(name)
        if update is None:
            continue
        for part in update.factors:
            read, told_spec = update.spec_of(part), told.specs.get(part, told.spec)
            rank, _ = rank_alpha(told_spec, told.blocks if told.layout == BLOCKS else 1)  # kernels were taken apart
            if not math.isclose(read.scale, told_spec.scale, rel_tol=1e-6) or rank != read.rank:
                problems.append(
                    f"{name}: rank and scale are {read.rank} and {read.scale:g} in adapter_config.json, {rank} and "
                    f"{told_spec.scale:g} in the tensors' own header; the two do not belong together"
                )
        update.spec, update.specs = told.spec, told.specs
        update.by_parts = True
        update.fingerprints = told.fingerprints
        if told.layout == BLOCKS and names is not None:
            _split_parts(name, told.parts, update, names, problems)


def _is_mirrored(copied: LayerUpdate, source: LayerUpdate, tie: Tie) -> bool:
    (A, B), (down, up) = copied.factors["weight"], source.factors["weight"]
    expected = (up.T, down.T) if tie.transposed else (down, up)
    return A.shape == expected[0].shape and torch.equal(A, expected[0]) and torch.equal(B, expected[1])


def _split_parts(name: str, parts: list[str], update: LayerUpdate, names: Names, problems: list[str]) -> None:
    A, B = update.factors["weight"]
    if name not in names.modules:
        problems.append(f"the file adapts parts of {name}, which this model has not")
        return
    try:
        host = names.host(names.canonical[name], parts)
    except AdapterError as error:
        problems.append(f"{name}: {error}")
        return
    if not isinstance(host, FusedHost):
        problems.append(f"{name}: its parts {', '.join(parts)} are no rows of this model's layer")
        return
    layout = host.layout
    fits = B.shape[0] == layout.rows and all(part in layout.parts for part in parts)
    blocks = split_blocks(A, B, [layout.index(part) for part in parts]) if fits else None
    if blocks is None:
        problems.append(f"{name}: its tensors are not the parts {', '.join(parts)} of this model's layer")
        return
    update.factors = dict(zip(parts, blocks, strict=True))
