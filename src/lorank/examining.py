"""What an adapter file holds, measured without its base."""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .baselines import Baseline
from .errors import AdapterError, dtype_name, enumerate_names
from .formats import read
from .formats.content import Content, LayerUpdate, is_finite, not_finite, other_tensors, tensors_of_updates
from .names import in_order, label_of

_HUGE = 1e3  # a factor with values above this did not come out of sound training


@dataclass(frozen=True)
class Layer:
    """One adapted matrix, or stack of matrices; parts of a fused projection count as one."""

    name: str
    method: str
    rank: int
    alpha: float | None  # of methods that have one
    scale: float
    shape: tuple[int, ...] | None  # (out, in), or (number, out, in) of a stack; None where the tensors do not tell it
    dtype: str
    norm: float | None  # Frobenius norm of ΔW; None where that depends on the base
    parameters: int


@dataclass(frozen=True)
class Beside:
    """A method that runs beside the layers, and changes no matrix."""

    method: str
    settings: str  # the method with what it was asked for: "adapter-h (size 64)"
    modules: int  # that it runs with, of those in which it has parameters
    parameters: int
    inference: str  # what it costs then


@dataclass
class Examination:
    """The contents of an adapter file."""

    path: Path
    bytes: int
    layers: list[Layer]
    beside: list[Beside]
    copies: list[str]  # modules that were trained whole
    biases: list[str]
    tokens: dict[str, list[int]]  # of which rows were trained, by layer
    tied: dict[str, str]  # layers that have the update of another
    parameters: int
    base_model: str | None
    about: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def groups(self) -> list[list[Layer]]:
        """Return the layers in groups of those that differ in the numbers of their names and their values only."""
        found: dict[tuple, list[Layer]] = {}
        for layer in self.layers:
            alike = (layer.method, layer.rank, layer.alpha, layer.shape, layer.dtype)
            key = (re.sub(r"\b\d+\b", "*", layer.name), *alike)
            found.setdefault(key, []).append(layer)
        return list(found.values())


def examine(
    path: Path, *, allow_pickle: bool = False, alpha: float | None = None, parts: tuple[str, ...] = ()
) -> Examination:
    """Return what an adapter file holds; raises AdapterError when it cannot be read at all.

    allow_pickle, alpha, parts: as for `load`.
    """
    content = read(path, allow_pickle=allow_pickle, alpha=alpha, parts=parts)
    problems, remarks = list(content.problems), list(content.remarks)
    updates = [(name, content.updates[name]) for name in in_order(content.updates)]
    layers = [_layer(name, part, update) for name, update in updates for part in update.tensors]
    if content.needs_model:
        remarks.append(content.needs_model)
    tensors, others = tensors_of_updates(content), other_tensors(content)
    problems += not_finite(tensors, others, content.base)
    ends = [own["up"] for _, own in content.inserted.values() if "up" in own]
    if ends and not any(end.any() for end in ends):
        remarks.append("every bottleneck ends in zeros: this adapter was never trained")
    zero = [layer.name for layer in layers if layer.norm == 0]
    if zero and len(zero) == len(layers):
        remarks.append("every ΔW is zero: this adapter was never trained")
    elif zero:
        remarks.append(f"ΔW is zero in {enumerate_names(zero, 4)}: these layers did not train")
    huge = [name for name, t in tensors.items() if is_finite(t) and t.numel() and float(t.abs().max()) > _HUGE]
    if huge:
        remarks.append(f"values above {_HUGE:g} in {enumerate_names(huge, 4)}")
    if content.base:
        remarks.append(f"it brings {len(content.base)} tensors of its base: {enumerate_names(content.base, 3)}")
    if not layers and not others:
        problems.append("it holds no adapter")
    beside = path.parent.glob("adapter_*") if path.name.startswith("adapter_") else [path]  # with its configuration
    return Examination(
        path=path,
        bytes=sum(
            file.stat().st_size for file in (path.glob("adapter*") if path.is_dir() else beside) if file.is_file()
        ),
        layers=layers,
        beside=[_beside(baseline, content) for baseline in content.baselines],
        copies=list(content.copies),
        biases=list(content.biases),
        tokens={name: ids for name, (ids, _) in content.tokens.items()},
        tied={name: tie.source for name, tie in content.tied.items()},
        parameters=sum(tensor.numel() for tensor in [*tensors.values(), *others.values()]),
        base_model=content.base_model,
        about=content.about,
        problems=problems,
        remarks=remarks,
    )


def _beside(baseline: Baseline, content: Content) -> Beside:
    own = [tensors for method, tensors in content.inserted.values() if method == baseline.variant]
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in own]
    trained = [size for size in sizes if size]
    return Beside(baseline.variant, str(baseline), len(trained), sum(trained), baseline.inference())


def _layer(name: str, part: str, update: LayerUpdate) -> Layer:
    spec, tensors = update.spec_of(part), update.tensors[part]
    shape, norm = update.matrices.get(part), None
    with suppress(AdapterError):  # it has no factors apart from its base
        A, B = update.pair(part)
        shape, norm = (*B.shape[:-1], A.shape[-1]), _norm(A, B, spec.scale)
    return Layer(
        name=label_of(name, part),
        method=spec.variant,
        rank=spec.rank,
        alpha=getattr(spec, "alpha", None),
        scale=spec.scale,
        shape=shape,
        dtype=dtype_name(next(iter(tensors.values())).dtype),
        norm=norm,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )


def _norm(A: Tensor, B: Tensor, scale: float) -> float:
    """Return the Frobenius norm of scale · B A, from the small matrices BᵀB and A Aᵀ, without forming ΔW."""
    A, B = A.detach().double(), B.detach().double()
    squared = float(((B.mT @ B) * (A @ A.mT)).sum())
    return abs(scale) * max(squared, 0.0) ** 0.5
