"""Merge an adapter into a checkpoint on disk, one tensor at a time: the model is never in memory."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, Slot, appearing_whole, copy_companions, names_in_model, write_index, write_shard
from .errors import AdapterError, did_you_mean, dtype_name, raise_problems
from .fingerprint import Comparison, Fingerprint, compare, other_base
from .formats.content import Content, LayerUpdate
from .formats.fitting import filled, located, tensor_problems
from .hosts import Host, host_of
from .merge_report import MergeReport, MergeRow, measured, warn_of_losses, wide
from .merging import fold
from .names import Names, base_tensors, label_of
from .planning import Place
from .ties import Ties
from .tokens import find_tokens


@dataclass(frozen=True)
class _Update:
    """What changes one weight of the checkpoint."""

    layer: str
    host: Host
    update: LayerUpdate
    parts: list[str]  # of the update, those that lie in this weight


@dataclass
class _Job:
    """What merging does to a checkpoint."""

    model: nn.Module  # on the meta device
    written_as: dict[str, str]  # key in the checkpoint -> key in the result
    updates: dict[str, "_Update"] = field(default_factory=dict)  # by key of the weight
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # rows of a weight, by its key
    values: dict[str, Tensor] = field(default_factory=dict)  # biases and copies, by key: written as they are
    brought: dict[str, list[Tensor]] = field(default_factory=dict)  # what the adapter says the base has, by key
    rows: list[MergeRow] = field(default_factory=list)
    compared: dict[str, Comparison] = field(default_factory=dict)


def merge_checkpoint(
    base: Path,
    content: Content,
    model: nn.Module,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_other_base: bool = False,
    config: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> MergeReport:
    """Write the checkpoint in the folder `base`, with an adapter folded in, to the folder `target`.

    content: the adapter, read for `model`.
    model: the same architecture on the meta device, by which layers and tensors are told.
    dtype: of the result's floating-point tensors; None keeps each as it is. W + ΔW is computed in float32 and rounded
        once.
    config: what changes in config.json.
    progress: called with each file's name before it is written.

    The result appears whole or not at all. Memory holds one tensor, and the adapter. Raises AdapterError for adapters
    that do not fit, another base, values that are not finite, and a target that is there.
    """
    checkpoint = Checkpoint.of(base)
    job = _prepare(checkpoint, content, model)
    shards: dict[str, list[Slot]] = {}
    for file, slots in checkpoint.shards.items():
        kept = [(job.written_as[slot.name], slot) for slot in slots if slot.name in job.written_as]
        shards[file] = [
            Slot(name, _dtype(s.dtype, dtype), tuple(job.values[name].shape) if name in job.values else s.shape)
            for name, s in kept
        ]
    known = {slot.name for slots in shards.values() for slot in slots}
    floating = [slot.dtype for slots in shards.values() for slot in slots if slot.dtype.is_floating_point]
    added = dtype or max(set(floating), key=floating.count)
    last = next(reversed(shards))
    for name, tensor in job.values.items():
        if name not in known:
            kind = added if tensor.is_floating_point() else tensor.dtype
            shards[last].append(Slot(name, kind, tuple(tensor.shape)))
    read_as = {written: key for key, written in job.written_as.items()}
    with appearing_whole(target) as folder:
        for file, slots in shards.items():
            progress(file)

            def tensor_of(slot: Slot, source: Path = base / file) -> Tensor:
                if slot.name in job.values:
                    return _finite(job.values[slot.name].to(slot.dtype), slot.name)
                with safetensors.safe_open(source, framework="pt") as opened:  # anew, or all its pages stay in memory
                    tensor = opened.get_tensor(read_as[slot.name])
                _require_own(job, slot.name, tensor)
                _recognise(job, content.landmarks, slot.name, tensor)
                merged = _merged(job, slot, tensor, allow_other_base) if slot.name in job.updates else None
                if slot.name in job.tokens:
                    merged = _with_tokens(job, slot, tensor, _converted(tensor, slot) if merged is None else merged)
                return _converted(tensor, slot) if merged is None else merged

            write_shard(folder / file, slots, tensor_of)
        raise_problems("cannot merge", other_base(job.compared, allow_other_base, []))
        write_index(folder, shards)
        copy_companions(base, folder)
        _change_config(folder / "config.json", (config or {}) | ({"dtype": dtype_name(dtype)} if dtype else {}))
    report = MergeReport(("the adapter",), tuple(job.rows), tuple(content.copies))
    warn_of_losses(report)
    return report


def _dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


@dataclass(frozen=True)
class _Places:
    """What there is to put something into."""

    own: dict[str, Tensor]  # the model's tensors by name
    present: set[str]  # of these, the ones that the checkpoint has
    names: Names
    ties: Ties

    def aliases(self, key: str) -> set[str]:
        """Return a tensor's names: a tied weight is in the checkpoint under one of them."""
        return {key, *_tied(key, self.own, self.names, self.ties)}


def _prepare(checkpoint: Checkpoint, content: Content, model: nn.Module) -> _Job:
    """Find each of the adapter's places in the checkpoint; raises AdapterError that lists all that is wrong."""
    own = base_tensors(model)
    prefix = getattr(model, "base_model_prefix", "")
    job = _Job(model, names_in_model(checkpoint.names, own, prefix))
    places = _Places(own, set(job.written_as.values()), Names(model), Ties(model))
    problems = content.obstacles()
    problems += [f"{baseline} runs beside the layers, and changes no weight" for baseline in content.baselines]
    problems += _find_updates(job, content, places)
    problems += _find_tokens(job, content, places)
    problems += _find_values(job, content, places)
    problems += _find_brought(job, content, places)
    for found in (job.updates, job.tokens, job.values):
        _repeat(found, places)
    present = places.present | job.values.keys()
    lacking = {
        key.rpartition(".")[0]
        for key, tensor in own.items()
        if isinstance(tensor, nn.Parameter) and prefix and not key.startswith(f"{prefix}.")
        if not places.aliases(key) & present
    }
    problems += [
        f"the checkpoint has no weights for {name}, and the adapter brings none; where it keeps them under other "
        "names, --in-memory merges in the loaded model"
        for name in sorted(lacking)
    ]
    if not job.updates and not job.values and not job.tokens:
        problems.append("it holds no adapter")
    raise_problems("cannot merge", list(dict.fromkeys(problems)))
    needed = {key for key, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    architectures = checkpoint.config.get("architectures") or []
    if type(model).__name__ not in architectures and needed <= present:
        job.written_as = {key: name for key, name in job.written_as.items() if name in own}  # not another task's head
    return job


def _repeat(found: dict[str, Any], places: _Places) -> None:
    """Change a tied weight under each name that the checkpoint has it by."""
    for key in [key for key in found if key in places.own]:
        found.update(dict.fromkeys(places.aliases(key) & places.present - found.keys(), found[key]))


def _find_updates(job: _Job, content: Content, places: _Places) -> list[str]:
    """Put the low-rank updates into the job, by the weight that each changes; return what is wrong."""
    problems: list[str] = []
    for name, host, update in located(content, places.names, problems):
        layer = places.names.modules[name]
        for part, tensors in update.tensors.items():
            place = Place(name, part, layer, host, update.spec_of(part), host.shape(layer, part))
            problems += tensor_problems(place, tensors)
            tied = {other for other, tie in content.tied.items() if places.names.canonical.get(tie.source) == name}
            others = [
                o for o in places.ties.others(layer, host.weight(layer, part)) if o.rpartition(".")[0] not in tied
            ]
            if others:
                problems.append(f"{name} shares its weight with {', '.join(others)}, which merging would change too")
            key = f"{name}.{host.attribute(layer, part)}".removeprefix(".")
            if key not in places.present:
                problems.append(
                    f"the checkpoint has no {key}; {did_you_mean(key, places.present)}. Where it keeps weights under "
                    "other names or stacked, --in-memory merges in the loaded model"
                )
            job.updates.setdefault(key, _Update(name, host, update, [])).parts.append(part)
    return problems


def _find_tokens(job: _Job, content: Content, places: _Places) -> list[str]:
    """Put rows of tokens into the job; return what is wrong."""
    wanted = {f"re:{re.escape(name)}": ids for name, (ids, _) in content.tokens.items()}
    problems: list[str] = []
    found = find_tokens(job.model, wanted, places.names, places.ties, problems)
    for name, (ids, rows) in content.tokens.items():
        own, key = places.own.get(f"{name}.weight"), f"{name}.weight"
        if not problems and places.names.canonical.get(name, name) not in found.rows:
            problems.append(f"the file has rows of tokens for {name} and not for the layer whose weight it shares")
        if own is not None and rows.shape != (len(ids), own.shape[1]):
            problems.append(f"{name}: rows of tokens are {tuple(rows.shape)} in the file, for {len(ids)} tokens")
        if key not in places.present:
            problems.append(f"the checkpoint has no {key}, of which the adapter trains rows")
        job.tokens[key] = (ids, rows)
    return problems


def _find_values(job: _Job, content: Content, places: _Places) -> list[str]:
    """Put biases and copies into the job: they are written as they are; return what is wrong."""
    own = places.own
    job.values |= {f"{layer}.bias": bias for layer, bias in content.biases.items()}
    job.values |= {f"{copy}.{key}": t for copy, tensors in content.copies.items() for key, t in tensors.items()}
    problems = _shared(content, places.names, places.ties)
    problems += [f"the adapter brings {key}, for which this model has no place" for key in job.values if key not in own]
    return problems + [
        f"{key} is {tuple(tensor.shape)} in the adapter, the model needs {tuple(own[key].shape)}"
        for key, tensor in job.values.items()
        if key in own and own[key].shape != tensor.shape
    ]


def _find_brought(job: _Job, content: Content, places: _Places) -> list[str]:
    """Put tensors of the base that came along into the job, to be compared; return what is wrong."""
    own, problems = places.own, []
    for key, tensor in content.base.items():
        if key not in own:
            problems.append(f"the file has {key}, for which this model has no place; {did_you_mean(key, own)}")
        elif own[key].shape != tensor.shape:
            problems.append(
                f"the file brings the base's {key} as {tuple(tensor.shape)}, the model needs {tuple(own[key].shape)}: "
                "another base, or one with another vocabulary (resize_token_embeddings)"
            )
        else:
            for name in places.aliases(key) & places.present:
                job.brought.setdefault(name, []).append(tensor)
    return problems


def _tied(key: str, own: dict[str, Tensor], names: Names, ties: Ties) -> list[str]:
    """Return the other names of a parameter."""
    tensor = own[key]
    return ties.others(names.modules[key.rpartition(".")[0]], tensor) if isinstance(tensor, nn.Parameter) else []


def _shared(content: Content, names: Names, ties: Ties) -> list[str]:
    """Return a problem for each bias and copy whose memory other modules use too."""
    biases = {name: {"bias"} for name in content.biases}
    problems = []
    for name, keys in [*biases.items(), *((name, tensors.keys()) for name, tensors in content.copies.items())]:
        if name not in names.modules:
            continue  # told by its tensors
        module = names.modules[name]
        parameters = dict(module.named_parameters())
        for key in keys & parameters.keys():
            others = ties.others(module, parameters[key])
            if key == "bias":  # a head's own bias is often registered above it too
                others = [other for other in others if not name.startswith(f"{other.rpartition('.')[0]}.")]
            if others:
                problems.append(f"{name} shares its weight with {', '.join(others)}, which merging would change too")
    return problems


@torch.no_grad()
def _merged(job: _Job, slot: Slot, tensor: Tensor, allow_other_base: bool) -> Tensor:
    """Return a weight with its updates folded in."""
    change = job.updates[slot.name]
    name, host, update = change.layer, change.host, change.update
    layer = job.model.get_submodule(name)
    attribute = host.attribute(layer, change.parts[0])
    placeholder = layer._parameters[attribute]
    assert placeholder is not None
    if placeholder.shape != tensor.shape:
        raise AdapterError(
            f"cannot merge: {slot.name} is {tuple(tensor.shape)} in the checkpoint and {tuple(placeholder.shape)} in "
            "the model that its config.json describes"
        )
    try:
        layer._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        before = {part: wide(host.matrix(layer, part)) for part in change.parts}  # stays: a copy is written to
        for part in change.parts:
            if part in update.fingerprints:
                job.compared[label_of(name, part)] = compare(
                    update.fingerprints[part], host.matrix(layer, part), host.dtype_name(layer, part)
                )
        if not allow_other_base and any(not found.same for found in job.compared.values()):
            raise_problems("cannot merge", other_base(job.compared, False, []))
        deltas = {}
        for part in change.parts:
            place = Place(name, part, layer, host, update.spec_of(part), host.shape(layer, part))
            deltas[part] = filled(place, update.tensors[part]).delta_weight(layer)
        layer._parameters[attribute] = nn.Parameter(tensor.to(slot.dtype, copy=True), requires_grad=False)
        for part in change.parts:
            job.rows.append(fold(name, layer, host, part, before[part], deltas[part]))
        weight = layer._parameters[attribute]
        assert weight is not None
        return _finite(weight.detach(), slot.name)
    finally:
        layer._parameters[attribute] = placeholder


def _recognise(job: _Job, landmarks: Mapping[str, Fingerprint], name: str, tensor: Tensor) -> None:
    """Compare a tensor with the one that the adapter remembers of its base, where it has no update of that layer."""
    layer_name, _, attribute = name.rpartition(".")
    if attribute != "weight" or layer_name not in landmarks:
        return
    layer = job.model.get_submodule(layer_name)
    host, placeholder = host_of(layer), layer._parameters[attribute]
    try:
        layer._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        job.compared[layer_name] = compare(landmarks[layer_name], host.matrix(layer, "weight"))
    finally:
        layer._parameters[attribute] = placeholder


@torch.no_grad()
def _with_tokens(job: _Job, slot: Slot, base: Tensor, merged: Tensor) -> Tensor:
    """Return a weight with the rows of its trained tokens; what else was merged into these rows is added."""
    ids, rows = job.tokens[slot.name]
    changed = merged.clone()
    changed[ids] = (wide(merged[ids]) - wide(base[ids]) + rows).to(merged.dtype)
    job.rows.append(
        measured(
            f"{slot.name.removesuffix('.weight')}[tokens]",
            wide(merged[ids]),
            wide(rows) - wide(base[ids]),
            changed[ids],
        )
    )
    return _finite(changed, slot.name)


def _require_own(job: _Job, name: str, tensor: Tensor) -> None:
    """Raise AdapterError when the adapter brings along another value of a tensor of its base."""
    if any(not torch.equal(brought.to(tensor.dtype), tensor) for brought in job.brought.get(name, ())):
        raise AdapterError(f"cannot merge: the file brings the base's {name}, and it differs: another base")


def _converted(tensor: Tensor, slot: Slot) -> Tensor:
    """Return a tensor in its slot's dtype, which must be able to hold it."""
    converted = tensor.to(slot.dtype)
    if converted is not tensor and bool((converted.isinf() & tensor.isfinite()).any()):
        raise AdapterError(f"cannot merge: {slot.name} would hold NaN or Inf in {dtype_name(slot.dtype)}")
    return converted


def _finite(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise AdapterError(f"cannot merge: {name} would hold NaN or Inf in {dtype_name(tensor.dtype)}")
    return tensor


def _change_config(path: Path, changes: dict[str, Any]) -> None:
    if not changes:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    config |= changes
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
