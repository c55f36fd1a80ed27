"""merge and merged: fold adapters into the weights, for good or for a block (paper, section 4.1)."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import Adapted, become, detach, why_not_detachable
from .baselines import Inserted
from .companions import BiasOffset
from .errors import AdapterError, AdapterWarning, dtype_name, enumerate_names, raise_problems
from .fingerprint import Comparison, compare, other_base
from .hosts import FusedHost, Host, NoHost, host_of, plain_parameter, registered_host
from .merge_report import MergeReport, MergeRow, measured, warn_of_losses, wide
from .names import base_tensors, label_of
from .surgery import named_or_active, thaw_base, why_not_together
from .tied import Mirror
from .ties import Ties
from .tree import (
    adapted_layers,
    base_modules,
    entries,
    leaves_of,
    require_not_folded,
    require_not_sharded,
    require_whole_model,
    unwrapped,
    updates_of,
)
from .variants import Adapter, Update


@dataclass(frozen=True)
class _Job:
    """The adapters to fold into one layer."""

    name: str
    layer: Adapted
    stand_in: nn.Module | None
    updates: dict[str, list[Update]]  # part -> updates of it
    offsets: list[BiasOffset]
    dtype: torch.dtype | None  # for a layer that has to be unpacked
    bases: dict[str, Comparison]  # part -> with the base that an update of it was trained on, where that is another

    @property
    def quantised(self) -> Host | None:
        """The host of the layer, when its weight is packed and has to be unpacked."""
        hosts = [update.host for updates in self.updates.values() for update in updates]
        return next((host for host in hosts if host.quantised), None)

    def written(self) -> list[Tensor]:
        """Return the layer's own tensors that folding writes."""
        if self.stand_in is not None:
            return list(base_tensors(self.layer).values())
        weights = [] if self.quantised is not None else self.weights()
        biases = [plain_parameter(self.layer, "bias")] if self.offsets else []
        return list({id(tensor): tensor for tensor in weights + biases}.values())

    def weights(self) -> list[nn.Parameter]:
        """Return the layer's own parameters that updates change."""
        return [updates[0].host.weight(self.layer, updates[0].part) for updates in self.updates.values()]


def merge(model: nn.Module, name: str | None = None, *, allow_other_base: bool = False) -> MergeReport:
    """Fold an adapter into the base for good, remove it, and return a report of what rounding cost.

    Afterwards the model is an ordinary one: the adapter's layers have their own class again and cost nothing
    extra. W + ΔW is computed in float32 and rounded once to the weight's dtype; the copies and biases of
    `train_also` and `bias` are written likewise. Without a name it is the active adapters that are merged, all
    of them at once; other adapters stay.

    A quantised layer becomes an ordinary one, W dequantised plus ΔW, in the dtype in which the model computes. An
    adapter that was trained on the same base in another quantisation warns, with the difference that was measured;
    one that was trained on other weights is an error, unless `allow_other_base`, or it was loaded so.

    Raises AdapterError before anything is changed: for weights that another module uses too (tied embedding and
    head), for values that are not finite or would not be in the weight's dtype, on the meta device, and for
    layers that were sharded. Warns when a layer loses more than half of its update to rounding.
    """
    model = unwrapped(model)
    jobs, names = _prepare(model, name, allow_other_base)
    for adapter in names:
        require_whole_model(model, adapter, "cannot merge")
    reasons = {job.name: why_not_detachable(job.layer) for job in jobs}
    raise_problems("cannot merge", [f"{layer}: {reason}" for layer, reason in reasons.items() if reason])
    rows: list[MergeRow] = []
    for job in jobs:  # layer by layer, so that the model computes the same at every moment
        rows += _fold(job)
        unpacked = job.layer.adapters.unpacked
        job.layer.adapters.run_unpacked(None)
        for adapter in names:
            if adapter in job.layer.adapters:
                detach(job.layer, adapter)
            if not isinstance(job.layer, Adapted):
                break
        if unpacked is not None:
            become(job.layer, unpacked)
        _renew(job.layer)
    thaw_base(model)
    _settle_quantisation(model, any(job.quantised for job in jobs))
    report = MergeReport(tuple(names), tuple(rows), tuple(job.name for job in jobs if job.stand_in is not None))
    warn_of_losses(report)
    return report


def _renew(layer: nn.Module) -> None:
    """Let the adapters that stay on a layer know what it has become."""
    if not isinstance(layer, Adapted):
        return
    for leaf in updates_of(layer):
        if leaf.host.quantised:
            leaf.host = registered_host(layer) or leaf.host
            layer.adapters.may_block = False
        leaf.remember_base(layer)


def _settle_quantisation(model: nn.Module, unpacked: bool) -> None:
    """Let transformers know that a model is no longer quantised, once none of its layers is."""
    quantiser = getattr(model, "hf_quantizer", None)
    if not unpacked or quantiser is None:
        return
    hosts = {name: registered_host(module) for name, module in base_modules(model)}
    packed = [name for name, host in hosts.items() if host is not None and host.quantised]
    if not packed:
        quantiser.remove_quantization_config(model)
        return
    warnings.warn(
        f"{enumerate_names(packed, 3)} stay quantised, the adapted layers no longer are; save_pretrained would "
        "describe them all as quantised",
        AdapterWarning,
        stacklevel=3,
    )


@contextmanager
def merged(model: nn.Module, name: str | None = None, *, allow_other_base: bool = False) -> Iterator[MergeReport]:
    """Run with adapters folded into the weights; afterwards the weights are the same bits as before.

    The block needs memory for a copy of every weight that it changes. Inside it the model cannot be adapted,
    switched or loaded; a state dict taken there is an ordinary checkpoint of the merged model. Raises
    AdapterError as `merge` does.
    """
    model = unwrapped(model)
    jobs, names = _prepare(model, name, allow_other_base)
    active = {id(layer): (layer, layer.adapters.active) for layer in adapted_layers(model).values()}
    saved = [(tensor, tensor.detach().clone()) for job in jobs for tensor in job.written()]
    try:
        for layer, _ in active.values():
            layer.adapters.folded = tuple(names)
        rows = [row for job in jobs for row in _fold(job)]
        for layer, before in active.values():
            layer.adapters.activate(tuple(other for other in before if other not in names))
        yield MergeReport(tuple(names), tuple(rows), tuple(job.name for job in jobs if job.stand_in is not None))
    finally:
        for tensor, bits in saved:
            tensor.data.copy_(bits)
        for layer, names_before in active.values():
            layer.adapters.run_unpacked(None)
            layer.adapters.folded = ()
            layer.adapters.activate(names_before)


def _prepare(model: nn.Module, name: str | None, allow_other_base: bool) -> tuple[list[_Job], list[str]]:
    require_not_folded(model, "cannot merge")
    require_not_sharded(model, "cannot merge")
    names = named_or_active(model, name, "merge")
    problems = why_not_together(model, names)
    by_layer: dict[str, tuple[Adapted, list[nn.Module]]] = {}
    for adapter in names:
        for layer_name, (layer, entry) in entries(model, adapter).items():
            by_layer.setdefault(layer_name, (layer, []))[1].append(entry)
    _require_changes_of_weights(names, [entry for _, found in by_layer.values() for entry in found])
    dtype = _floating_dtype(model)
    jobs = [_job(layer_name, layer, found, dtype) for layer_name, (layer, found) in by_layer.items()]
    ties = Ties(model)
    layers = {layer_name: layer for layer_name, (layer, _) in by_layer.items()}
    for job in jobs:
        problems += _left_on_another_base(job, names)
        problems += _no_longer_tied(job, ties, layers) + _job_problems(job, ties, _mirrored_in(job, layers))
    raise_problems("cannot merge", problems)
    other = {label: found for job in jobs for label, found in _other_bases(job, allow_other_base).items()}
    raise_problems("cannot merge", other_base(other, False, [], "merge"))
    return jobs, names


def _left_on_another_base(job: _Job, names: Sequence[str]) -> list[str]:
    """Return a problem for each adapter that would stay on a layer, and is a change of the base that it has now."""
    entries_left = {name: job.layer.adapters[name] for name in job.layer.adapters.names if name not in names}
    return [
        f"'{name}' stays on {job.name}, and is no sum with its base: on another base it would compute something else. "
        "Remove it first, or merge it too"
        for name, entry in entries_left.items()
        if isinstance(entry, Adapter) and any(not leaf.additive and not leaf.behind for leaf in entry.leaves())
    ]


def _require_changes_of_weights(names: Sequence[str], found: Sequence[nn.Module]) -> None:
    """Raise AdapterError for adapters that run beside the base, and change none of its weights."""
    leaves = [leaf for entry in found if isinstance(entry, Adapter) for leaf in entry.leaves()]
    beside = {leaf.spec.variant for leaf in leaves if isinstance(leaf, Inserted)}
    if beside:
        raise AdapterError(
            f"cannot merge {enumerate_names(names)}: {' and '.join(sorted(beside))} runs beside the base's layers and "
            "changes none of their weights; keep it unmerged"
        )


def _mirrored_in(job: _Job, layers: Mapping[str, Adapted]) -> set[str]:
    """Return the layers that compute with all of a job's updates too, so that they may change with its weight."""
    wanted = {id(update) for updates in job.updates.values() for update in updates}
    return {
        name
        for name, layer in layers.items()
        if wanted and wanted <= {id(leaf.source) for leaf in leaves_of(layer) if isinstance(leaf, Mirror)}
    }


def _no_longer_tied(job: _Job, ties: Ties, layers: Mapping[str, Adapted]) -> list[str]:
    """Return a problem for each layer that has an update of a job, but not its weight: merging would not reach it."""
    own = {id(update) for updates in job.updates.values() for update in updates}
    sharing = {other.rpartition(".")[0] for weight in job.weights() for other in ties.others(job.layer, weight)}
    return [
        f"{name} has the update of {job.name}, and no longer its weight, as after `to_empty` or loading with "
        "assign=True; tie them again"
        for name, layer in layers.items()
        if name not in sharing and any(isinstance(leaf, Mirror) and id(leaf.source) in own for leaf in leaves_of(layer))
    ]


def _floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of most of the base's plain parameters: what a quantised layer of it computes in."""
    own = [p for _, module in base_modules(model) for p in module._parameters.values() if type(p) is nn.Parameter]
    counts = Counter(p.dtype for p in own if p.is_floating_point())
    return counts.most_common(1)[0][0] if counts else None


@torch.no_grad()
def _other_bases(job: _Job, allowed: bool) -> dict[str, Comparison]:
    """Note where an update was trained on another base; return those of other weights that nobody has allowed."""
    refused = {}
    for part, updates in job.updates.items():
        for update in updates:
            if update.base is None:
                continue
            W = update.host.matrix(job.layer, update.part)
            found = compare(update.base, W, update.host.dtype_name(job.layer, update.part))
            if not found.same and not (allowed or update.other_base_allowed):
                refused[label_of(job.name, update.part)] = found
            if not found.same or found.repacked:
                job.bases[part] = found
    return refused


def _job(name: str, layer: Adapted, found: Sequence[nn.Module], dtype: torch.dtype | None) -> _Job:
    stand_in = next((entry for entry in found if not isinstance(entry, Adapter)), None)
    leaves = [leaf for entry in found if isinstance(entry, Adapter) for leaf in entry.leaves()]
    updates: dict[str, list[Update]] = {}
    for leaf in leaves:
        if isinstance(leaf, Update):
            updates.setdefault(leaf.part, []).append(leaf)
    if "weight" in updates and len(updates) > 1:  # one adapter has the whole, another parts of it: round once
        whole = updates.pop("weight")
        updates = {"weight": [*whole, *(update for parts in updates.values() for update in parts)]}
    return _Job(name, layer, stand_in, updates, [leaf for leaf in leaves if isinstance(leaf, BiasOffset)], dtype, {})


@torch.no_grad()
def _job_problems(job: _Job, ties: Ties, mirrored: Collection[str]) -> list[str]:
    problems = []
    packed = job.weights() if job.quantised is not None else []
    for parameter in [*job.written(), *packed]:
        others = ties.others(job.layer, parameter) if isinstance(parameter, nn.Parameter) else []
        if parameter is job.layer._parameters.get("bias"):  # a head's own bias is often registered above it too
            others = [name for name in others if not job.name.startswith(f"{name.rpartition('.')[0]}.")]
        if not packed:  # unpacked, it would no longer be the same weight
            others = [name for name in others if name.rpartition(".")[0] not in mirrored]
        if others:
            problems.append(
                f"{job.name} shares its weight with {', '.join(others)}, which merging would change too. Adapt them as "
                "one (tie=True), or give it one of its own first, "
                "`layer.weight = torch.nn.Parameter(layer.weight.detach().clone())`, and on a transformers model set "
                "`config.tie_word_embeddings = False`; or keep the adapter unmerged"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            problems.append(f"{job.name} has an expanded weight, of which one number stands for many")
        if parameter.device.type == "meta":
            problems.append(f"{job.name} is on the meta device; load its weights first")
        elif isinstance(parameter, nn.Parameter) and not packed and not torch.isfinite(parameter).all():
            problems.append(f"{job.name} holds NaN or Inf in the base's own weights")
    trained = [leaf for leaves in job.updates.values() for leaf in leaves] + job.offsets
    trained += [job.stand_in] if job.stand_in is not None else []
    for module in trained:
        for parameter_name, parameter in module.named_parameters():
            if parameter.device.type == "meta":
                problems.append(
                    f"the adapter's {parameter_name} at {job.name} is on the meta device; load or reset it first"
                )
            elif not torch.isfinite(parameter).all():
                problems.append(f"the adapter's {parameter_name} at {job.name} holds NaN or Inf")
    used = ties.used_outside(job.name, job.layer) if job.stand_in is not None else []
    if used:
        problems.append(f"modules in {job.name} are also used as {', '.join(used)}, which merging would change too")
    try:
        if any(update.host.additive for updates in job.updates.values() for update in updates):
            host_of(job.layer)  # a subclass that was adapted on the meta device could not be looked at before
    except NoHost as error:
        problems.append(f"{job.name}: {error}")
    return problems or _overflows(job)


def _overflows(job: _Job) -> list[str]:
    """Return a problem for each tensor that the layer's dtype (float16, in practice) could not hold."""
    problems = []
    if job.stand_in is not None:
        trained = base_tensors(job.stand_in)
        for name, tensor in base_tensors(job.layer).items():
            if isinstance(tensor, nn.Parameter) and not torch.isfinite(trained[name].to(tensor.dtype)).all():
                problems.append(f"{job.name}.{name}: too large for {dtype_name(tensor.dtype)}")
    if job.offsets:
        bias = plain_parameter(job.layer, "bias")
        total = sum((offset.offset for offset in job.offsets), wide(bias))
        if not torch.isfinite(total.to(bias.dtype)).all():
            problems.append(f"{job.name}: the merged bias is too large for {dtype_name(bias.dtype)}")
    for part, updates in job.updates.items():
        W = updates[0].host.matrix(job.layer, part)
        if job.quantised is not None:
            W = W.to(job.quantised.unpacked_dtype(job.layer) or job.dtype)
        limit = torch.finfo(W.dtype).max
        bounds = [update.largest_change() for update in updates]
        known = [bound for bound in bounds if bound is not None]
        if len(known) == len(bounds) and float(W.abs().max()) + sum(known) < limit:
            continue
        if not torch.isfinite((wide(W) + _delta(job, part)).to(W.dtype)).all():
            problems.append(
                f"{job.name}: W + ΔW is too large for {dtype_name(W.dtype)}; merge into a bfloat16 or float32 base"
            )
    return problems


def _delta(job: _Job, part: str) -> Tensor:
    """Return the sum of the updates of a part, (out, in), in float32."""
    total = None
    for update in job.updates[part]:
        delta = update.delta_weight(job.layer)
        if update.part != part and isinstance(update.host, FusedHost):
            delta = update.host.padded(update.part, delta)
        total = delta if total is None else total + delta
    assert total is not None, "a part of a job has at least one update"
    return total


@torch.no_grad()
def _fold(job: _Job) -> list[MergeRow]:
    rows: list[MergeRow] = []
    if job.stand_in is not None:
        trained = base_tensors(job.stand_in)
        for name, tensor in base_tensors(job.layer).items():
            before = wide(tensor).clone()
            tensor.data.copy_(trained[name])
            if trained[name].dtype != tensor.dtype:  # a float32 copy in a half-precision base
                rows.append(measured(f"{job.name}.{name}", before, wide(trained[name]) - before, tensor))
    if job.offsets:
        bias = plain_parameter(job.layer, "bias")
        before = wide(bias).clone()
        update = sum((offset.offset.detach() for offset in job.offsets), torch.zeros_like(before))
        bias.data.copy_(before + update)
        rows.append(measured(f"{job.name}.bias", before, update, bias))
    for part, updates in job.updates.items():
        host: Host = updates[0].host
        before = wide(host.matrix(job.layer, part)).clone()
        if host.quantised:
            row = _unpack(job, host, before)
        else:
            row = fold(job.name, job.layer, host, part, before, _delta(job, part))
        if part in job.bases and row.update_norm:
            apart = job.bases[part].difference * float(torch.linalg.vector_norm(before))
            row = dataclasses.replace(row, base=job.bases[part], base_error=apart / row.update_norm)
        rows.append(row)
    return rows


def _unpack(job: _Job, host: Host, before: Tensor) -> MergeRow:
    """Let an ordinary layer with W + ΔW run in the place of a quantised one."""
    update = _delta(job, "weight")
    W = (before + update).to(host.unpacked_dtype(job.layer) or job.dtype or before.dtype)
    unpacked = host.unpacked(job.layer, W).requires_grad_(False).train(job.layer.training)
    job.layer.adapters.run_unpacked(unpacked)
    return dataclasses.replace(measured(job.name, before, update, W), unpacked=host.dtype_name(job.layer, "weight"))


def fold(name: str, layer: nn.Module, host: Host, part: str, before: Tensor, update: Tensor) -> MergeRow:
    """Write `before + update` (out, in) into a layer, rounded once, and return what that cost."""
    host.write(layer, part, before + update)
    return measured(label_of(name, part), before, update, host.matrix(layer, part))
