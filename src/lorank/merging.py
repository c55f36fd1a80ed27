"""merge and merged: fold adapters into the weights, for good or for a block (paper, section 4.1)."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import Adapted, detach, why_not_detachable
from .companions import BiasOffset
from .errors import AdapterWarning, dtype_name, raise_problems
from .hosts import FusedHost, Host, NoHost, host_of, plain_parameter
from .surgery import named_or_active, thaw_base, why_not_together
from .ties import Ties
from .tree import (
    adapted_layers,
    base_modules,
    entries,
    require_not_folded,
    require_not_sharded,
    require_whole_model,
    unwrapped,
)
from .variants import Adapter, LoRAAdapter, Update

# A layer that loses more than this share of its update to rounding is worth a warning.
_LOUD_ERROR = 0.5


@dataclass(frozen=True)
class MergeRow:
    """What merging did to one matrix or bias."""

    label: str  # "h.0.attn.c_attn[q]"
    dtype: torch.dtype
    update_norm: float  # Frobenius norm of what was to be added
    relative_error: float  # norm of what rounding to the dtype changed, over update_norm; 0 where nothing was added


@dataclass(frozen=True)
class MergeReport:
    """What merging did, measured on the rounded weights. Printing it shows the worst layers."""

    adapters: tuple[str, ...]
    rows: tuple[MergeRow, ...]
    copies: tuple[str, ...]  # modules that were replaced by the adapter's copy

    @property
    def worst(self) -> MergeRow | None:
        """The row with the largest relative error."""
        return max(self.rows, key=lambda row: row.relative_error, default=None)

    def __str__(self) -> str:
        lines = [f"merged {', '.join(self.adapters)} into {len(self.rows)} tensors, computed in float32, rounded once"]
        if self.copies:
            lines.append(f"replaced by the adapter's copy: {', '.join(self.copies)}")
        if self.rows:
            ordered = sorted(self.rows, key=lambda row: -row.relative_error)
            lines.append("relative error of the update after rounding, worst first:")
            for row in ordered[:5]:
                tensor = f"{row.label} ({dtype_name(row.dtype)}, update norm {row.update_norm:.3g})"
                lines.append(f"  {row.relative_error:9.2e}  {tensor}")
            if len(ordered) > 5:
                lines.append(
                    f"  and {len(ordered) - 5} more, the median {ordered[len(ordered) // 2].relative_error:.2e}"
                )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """The adapters to fold into one layer."""

    name: str
    layer: Adapted
    stand_in: nn.Module | None
    updates: dict[str, list[Update]]  # part -> updates of it
    offsets: list[BiasOffset]

    def written(self) -> list[Tensor]:
        """Return the layer's own tensors that folding writes."""
        if self.stand_in is not None:
            return [tensor for _, tensor in _base_tensors(self.layer)]
        weights = [updates[0].host.weight(self.layer, updates[0].part) for updates in self.updates.values()]
        biases = [plain_parameter(self.layer, "bias")] if self.offsets else []
        return list({id(tensor): tensor for tensor in weights + biases}.values())


def merge(model: nn.Module, name: str | None = None) -> MergeReport:
    """Fold an adapter into the base for good, remove it, and return a report of what rounding cost.

    Afterwards the model is an ordinary one: the adapter's layers have their own class again and cost nothing
    extra. W + ΔW is computed in float32 and rounded once to the weight's dtype; the copies and biases of
    `train_also` and `bias` are written likewise. Without a name it is the active adapters that are merged, all
    of them at once; other adapters stay.

    Raises AdapterError before anything is changed: for weights that another module uses too (tied embedding and
    head), for values that are not finite or would not be in the weight's dtype, on the meta device, and for
    layers that were sharded. Warns when a layer loses more than half of its update to rounding.
    """
    model = unwrapped(model)
    jobs, names = _prepare(model, name)
    for adapter in names:
        require_whole_model(model, adapter, "cannot merge")
    reasons = {job.name: why_not_detachable(job.layer) for job in jobs}
    raise_problems("cannot merge", [f"{layer}: {reason}" for layer, reason in reasons.items() if reason])
    rows: list[MergeRow] = []
    for job in jobs:  # layer by layer, so that the model computes the same at every moment
        rows += _fold(job)
        for adapter in names:
            if adapter in job.layer.adapters:
                detach(job.layer, adapter)
            if not isinstance(job.layer, Adapted):
                break
    thaw_base(model)
    report = MergeReport(tuple(names), tuple(rows), tuple(job.name for job in jobs if job.stand_in is not None))
    warn_of_rounding(report)
    return report


def warn_of_rounding(report: MergeReport) -> None:
    """Warn when a layer lost more than half of its update."""
    worst = report.worst
    if worst is not None and worst.relative_error > _LOUD_ERROR:
        warnings.warn(
            f"rounding to {dtype_name(worst.dtype)} lost {worst.relative_error:.0%} of the update of {worst.label}; "
            "merge into a float32 base, or keep the adapter unmerged",
            AdapterWarning,
            stacklevel=3,
        )


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Iterator[MergeReport]:
    """Run with adapters folded into the weights; afterwards the weights are the same bits as before.

    The block needs memory for a copy of every weight that it changes. Inside it the model cannot be adapted,
    switched or loaded; a state dict taken there is an ordinary checkpoint of the merged model. Raises
    AdapterError as `merge` does.
    """
    model = unwrapped(model)
    jobs, names = _prepare(model, name)
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
            layer.adapters.folded = ()
            layer.adapters.activate(names_before)


def _prepare(model: nn.Module, name: str | None) -> tuple[list[_Job], list[str]]:
    require_not_folded(model, "cannot merge")
    require_not_sharded(model, "cannot merge")
    names = named_or_active(model, name, "merge")
    problems = why_not_together(model, names)
    by_layer: dict[str, tuple[Adapted, list[nn.Module]]] = {}
    for adapter in names:
        for layer_name, (layer, entry) in entries(model, adapter).items():
            by_layer.setdefault(layer_name, (layer, []))[1].append(entry)
    jobs = [_job(layer_name, layer, found) for layer_name, (layer, found) in by_layer.items()]
    ties = Ties(model)
    for job in jobs:
        problems += _job_problems(job, ties)
    raise_problems("cannot merge", problems)
    return jobs, names


def _job(name: str, layer: Adapted, found: Sequence[nn.Module]) -> _Job:
    stand_in = next((entry for entry in found if not isinstance(entry, Adapter)), None)
    leaves = [leaf for entry in found if isinstance(entry, Adapter) for leaf in entry.leaves()]
    updates: dict[str, list[Update]] = {}
    for leaf in leaves:
        if isinstance(leaf, Update):
            updates.setdefault(leaf.part, []).append(leaf)
    if "weight" in updates and len(updates) > 1:  # one adapter has the whole, another parts of it: round once
        whole = updates.pop("weight")
        updates = {"weight": [*whole, *(update for parts in updates.values() for update in parts)]}
    return _Job(name, layer, stand_in, updates, [leaf for leaf in leaves if isinstance(leaf, BiasOffset)])


@torch.no_grad()
def _job_problems(job: _Job, ties: Ties) -> list[str]:
    problems = []
    for parameter in job.written():
        others = ties.others(job.layer, parameter) if isinstance(parameter, nn.Parameter) else []
        if parameter is job.layer._parameters.get("bias"):  # a head's own bias is often registered above it too
            others = [name for name in others if not job.name.startswith(f"{name.rpartition('.')[0]}.")]
        if others:
            problems.append(
                f"{job.name} shares its weight with {', '.join(others)}, which merging would change too. Give it one "
                "of its own first, `layer.weight = torch.nn.Parameter(layer.weight.detach().clone())`, and on a "
                "transformers model set `config.tie_word_embeddings = False`; or keep the adapter unmerged"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            problems.append(f"{job.name} has an expanded weight, of which one number stands for many")
        if parameter.device.type == "meta":
            problems.append(f"{job.name} is on the meta device; load its weights first")
        elif isinstance(parameter, nn.Parameter) and not torch.isfinite(parameter).all():
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
        trained = dict(_base_tensors(job.stand_in))
        for name, tensor in _base_tensors(job.layer):
            if isinstance(tensor, nn.Parameter) and not torch.isfinite(trained[name].to(tensor.dtype)).all():
                problems.append(f"{job.name}.{name}: too large for {dtype_name(tensor.dtype)}")
    if job.offsets:
        bias = plain_parameter(job.layer, "bias")
        total = sum((offset.offset for offset in job.offsets), wide(bias))
        if not torch.isfinite(total.to(bias.dtype)).all():
            problems.append(f"{job.name}: the merged bias is too large for {dtype_name(bias.dtype)}")
    for part, updates in job.updates.items():
        W = updates[0].host.matrix(job.layer, part)
        limit = torch.finfo(W.dtype).max
        # |ΔW| <= |scale| · rank · max|A| · max|B|: cheap, and enough for all but the odd float16 layer.
        factors = [u for u in updates if isinstance(u, LoRAAdapter)]
        bound = sum(abs(u.scale) * u.A.shape[0] * float(u.A.abs().max() * u.B.abs().max()) for u in factors)
        if len(factors) == len(updates) and float(W.abs().max()) + bound < limit:
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
            delta = update.host.whole(update.part, delta)
        total = delta if total is None else total + delta
    assert total is not None, "a part of a job has at least one update"
    return total


@torch.no_grad()
def _fold(job: _Job) -> list[MergeRow]:
    rows: list[MergeRow] = []
    if job.stand_in is not None:
        trained = dict(_base_tensors(job.stand_in))
        for name, tensor in _base_tensors(job.layer):
            before = wide(tensor).clone()
            tensor.data.copy_(trained[name])
            if trained[name].dtype != tensor.dtype:  # a float32 copy in a half-precision base
                rows.append(_row(f"{job.name}.{name}", before, wide(trained[name]) - before, tensor))
    for part, updates in job.updates.items():
        host: Host = updates[0].host
        before = wide(host.matrix(job.layer, part)).clone()
        rows.append(fold(job.name, job.layer, host, part, before, _delta(job, part)))
    if job.offsets:
        bias = plain_parameter(job.layer, "bias")
        before = wide(bias).clone()
        update = sum((offset.offset.detach() for offset in job.offsets), torch.zeros_like(before))
        bias.data.copy_(before + update)
        rows.append(_row(f"{job.name}.bias", before, update, bias))
    return rows


def fold(name: str, layer: nn.Module, host: Host, part: str, before: Tensor, update: Tensor) -> MergeRow:
    """Write `before + update` (out, in) into a layer, rounded once, and return what that cost."""
    host.write(layer, part, before + update)
    label = name if part == "weight" else f"{name}[{part}]"
    return _row(label, before, update, host.matrix(layer, part))


def _row(label: str, before: Tensor, update: Tensor, after: Tensor) -> MergeRow:
    norm = float(torch.linalg.vector_norm(update))
    lost = float(torch.linalg.vector_norm(wide(after) - before - update))
    return MergeRow(label, after.dtype, norm, lost / norm if norm else 0.0)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which updates are added: float32, or wider."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _base_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the module's own parameters and buffers by name, without adapters."""
    found = []
    for prefix, child in base_modules(module):
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                found.append((f"{prefix}.{name}".removeprefix("."), tensor))
    return found
