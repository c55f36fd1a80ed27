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
from typing import Any, get_args

import torch

from ...errors import AdapterError, enumerate_names
from ...fingerprint import Fingerprint
from ...hosts import FusedHost
from ...lowrank import split_blocks
from ...names import Names
from ...planning import Bias
from ...tied import Tie
from ...variants import Spec
from .. import safetensors_file
from ..content import Content, LayerUpdate, as_json, take_about
from .layout import BLOCKS, MATRIX
from .methods import Method, method_of

_KEY = "lorank"
_VERSION = 1


@dataclass(frozen=True)
class LayerAccount:
    """What the header says of one layer."""

    spec: Spec
    specs: dict[str, Spec]  # of parts that differ
    parts: list[str]  # ["weight"], or the parts in the order of their blocks
    layout: str  # of `layout.py`
    blocks: int  # times the rank that PEFT's pair has
    stacks: dict[str, int]  # how many matrices a part is a stack of, where it is one
    matrices: dict[str, tuple[int, ...]]  # shapes of ΔW by part
    fingerprints: dict[str, Fingerprint]  # by part; a part may have none


@dataclass(frozen=True)
class Account:
    """What the header says of the adapter."""

    spec: Spec
    bias: Bias
    layers: dict[str, LayerAccount]
    biases: list[str]  # layers whose bias is in the file
    copies: list[str]  # modules of which a copy is in the file
    tied: dict[str, Tie]  # layers whose factors in the file are those of another
    about: object


def encode_header(content: Content, packed: bytes) -> dict[str, str]:
    """Return the metadata of a file with these tensors."""
    layers = {}
    method = method_of(content)
    for name, update in content.updates.items():
        prints = {part: fingerprint.to_json() for part, fingerprint in update.fingerprints.items()}
        layout = method.layout(update)
        stacks = {p: t["A"].shape[0] for p, t in update.tensors.items() if "A" in t and t["A"].dim() == 3}
        layers[name] = {"spec": update.spec.to_json(), "parts": list(update.tensors), "base": prints}
        if update.specs:
            layers[name]["specs"] = {part: spec.to_json() for part, spec in update.specs.items()}
        layers[name] |= {"layout": layout.kind, "blocks": layout.blocks, "stacks": stacks}
        layers[name]["matrices"] = {part: list(shape) for part, shape in update.matrices.items()}
    account = {
        "version": _VERSION,
        "spec": content.spec.to_json(),
        "layers": layers,
        "biases": sorted(content.biases),
        "copies": sorted(content.copies),
        "bias": content.bias,
        "tied": {name: {"source": tie.source, "transposed": tie.transposed} for name, tie in content.tied.items()},
        "about": json.loads(as_json(content.about)),
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
        specs = {str(part): Spec.from_json(spec) for part, spec in fields.get("specs", {}).items()}
        shapes = {str(part): tuple(map(int, shape)) for part, shape in fields.get("matrices", {}).items()}
        spec = Spec.from_json(fields["spec"])
        layers[name] = LayerAccount(spec, specs, parts, layout, blocks, stacks, shapes, prints)
    if account["bias"] not in get_args(Bias):
        raise ValueError(f"bias is {account['bias']!r}")
    if not all(isinstance(name, str) for name in [*account["biases"], *account["copies"]]):
        raise ValueError("names of modules are strings")
    about = account.get("about", {})  # files of 0.1 before it had one
    tied = {n: Tie(str(t["source"]), bool(t["transposed"])) for n, t in account.get("tied", {}).items()}
    biases, copies = [*account["biases"]], [*account["copies"]]
    return Account(Spec.from_json(account["spec"]), account["bias"], layers, biases, copies, tied, about)


def apply_account(account: Account, content: Content, method: Method, names: Names | None) -> None:
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
    take_about(content, account.about)
    unrecognised = []
    for name, told in account.layers.items():
        update = content.updates.get(name)
        if update is None:
            continue
        problems += _contradictions(name, told, update, method)
        split = told.layout != BLOCKS or (names is not None and _split_parts(name, told.parts, update, names, problems))
        if split:  # else it stays the one update of the whole layer that PEFT sees
            _restore(name, told, update, method, problems)
            update.matrices, update.fingerprints = told.matrices, told.fingerprints
        elif told.fingerprints:
            unrecognised.append(name)
        update.by_parts = True
    if unrecognised and names is None:
        content.remarks.append(
            f"parts of {enumerate_names(unrecognised, 3)} are one update of the whole layer without the model, which "
            "does not say by which base it was trained"
        )


def _contradictions(name: str, told: LayerAccount, update: LayerUpdate, method: Method) -> list[str]:
    """Return where the configuration gives a layer another rank or scale than the header does."""
    problems = []
    for part in update.tensors:
        read, spec = update.spec_of(part), told.specs.get(part, told.spec)
        blocks = told.blocks if told.layout == BLOCKS else 1  # kernels were taken apart
        rank = blocks * (spec.factor_rank if method.pairs else spec.rank)
        if not math.isclose(read.scale, spec.scale, rel_tol=1e-5) or rank != read.rank:
            problems.append(
                f"{name}: rank and scale are {read.rank} and {read.scale:g} in adapter_config.json, {rank} and "
                f"{spec.scale:g} in the tensors' own header; the two do not belong together"
            )
    return problems


def _restore(name: str, told: LayerAccount, update: LayerUpdate, method: Method, problems: list[str]) -> None:
    """Give a layer the specs of the header, and the tensors that PEFT's pair was made of."""
    update.spec, update.specs = told.spec, told.specs
    for part, tensors in update.tensors.items() if method.pairs else ():
        try:
            tensors |= update.spec_of(part).restored(tensors.pop("A"), tensors.pop("B"))
        except AdapterError as error:
            problems.append(f"{name}: {error}")


def _is_mirrored(copied: LayerUpdate, source: LayerUpdate, tie: Tie) -> bool:
    theirs, own = copied.tensors["weight"], source.tensors["weight"]
    if tie.transposed:
        own = {"A": own["B"].T, "B": own["A"].T} if own.keys() == {"A", "B"} else {}
    return theirs.keys() == own.keys() and all(
        theirs[key].shape == own[key].shape and torch.equal(theirs[key], own[key]) for key in own
    )


def _split_parts(name: str, parts: list[str], update: LayerUpdate, names: Names, problems: list[str]) -> bool:
    """Take the pair of a whole layer apart into its parts; tell whether that could be done."""
    A, B = update.tensors["weight"]["A"], update.tensors["weight"]["B"]
    if name not in names.modules:
        problems.append(f"the file adapts parts of {name}, which this model has not")
        return False
    try:
        host = names.host(names.canonical[name], parts)
    except AdapterError as error:
        problems.append(f"{name}: {error}")
        return False
    if not isinstance(host, FusedHost):
        problems.append(f"{name}: its parts {', '.join(parts)} are no rows of this model's layer")
        return False
    layout = host.layout
    fits = B.shape[0] == layout.rows and all(part in layout.parts for part in parts)
    blocks = split_blocks(A, B, [layout.index(part) for part in parts]) if fits else None
    if blocks is None:
        problems.append(f"{name}: its tensors are not the parts {', '.join(parts)} of this model's layer")
        return False
    update.tensors = {part: {"A": a, "B": b} for part, (a, b) in zip(parts, blocks, strict=True)}
    return True
