"""The updates of a content as plain factors, and updates made of factors."""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import AdapterError, raise_problems
from ..formats.content import Content, LayerUpdate, is_finite
from ..names import in_order, label_of
from ..variants import LoRA, LowRank, Spec
from .factors import Factors


def require_sound(content: Content, action: str, name: str = "") -> None:
    """Raise AdapterError for what a reader found wrong with a file, and for an adapter that holds nothing."""
    whose = f"{name}: " if name else ""
    problems = [f"{whose}{problem}" for problem in content.obstacles()]
    problems += [f"{whose}{baseline} is no update that could be computed with" for baseline in content.baselines]
    if not (content.inserted or content.updates or content.copies or content.biases or content.tokens):
        problems.append(f"{whose}it holds no adapter")
    raise_problems(action, problems)


def checked_pair(layer: str, part: str, update: LayerUpdate) -> Factors:
    """Return A and B of a part as `LayerUpdate.pair` does: ΔW = scale · B A.

    Raises AdapterError, with the layer's name, where the update has no such form, or is not finite.
    """
    try:
        A, B = update.pair(part)
    except AdapterError as error:
        raise AdapterError(f"{label_of(layer, part)}: {error}") from None
    if A.dim() < 2 or B.dim() != A.dim() or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise AdapterError(f"{label_of(layer, part)}: A {tuple(A.shape)} and B {tuple(B.shape)} are no pair of factors")
    if not (is_finite(A) and is_finite(B)):
        raise AdapterError(f"{label_of(layer, part)} holds NaN or Inf")
    return A.detach(), B.detach()


def unscaled(pair: Factors, scale: float) -> Factors:
    """Return A and B in float64, with the scale folded in: ΔW = B A exactly."""
    A, B = pair
    return A.double(), B.double() * scale


def factors(layer: str, part: str, update: LayerUpdate) -> Factors:
    """Return A and B of a part in float64 with ΔW = B A exactly; raises as `checked_pair` does."""
    return unscaled(checked_pair(layer, part, update), update.spec_of(part).scale)


def all_pairs(content: Content, action: str) -> Iterator[tuple[str, str, LayerUpdate, Factors]]:
    """Yield (layer, part, update, `checked_pair`) for every matrix, one at a time: some methods have large factors.

    Raises AdapterError that lists all that have none, after the last one.
    """
    problems = []
    for layer in in_order(content.updates):
        update = content.updates[layer]
        for part in update.tensors:
            try:
                pair = checked_pair(layer, part, update)
            except AdapterError as error:
                problems.append(str(error))
                continue
            if not problems:
                yield layer, part, update, pair
    raise_problems(action, problems)


def dtype_of(*updates: LayerUpdate) -> torch.dtype:
    """Return the dtype for a result: float32, or wider where a factor is."""
    dtype = torch.float32
    for update in updates:
        for tensors in update.tensors.values():
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def plain_spec(rank: int, like: Spec | None = None) -> LoRA:
    """Return the spec of factors that need no scale: alpha is the rank. Dropout is that of another spec."""
    dropout = like.dropout if isinstance(like, LowRank) else 0.0
    return LoRA(rank=rank, alpha=float(rank), dropout=dropout)


def rebuilt(update: LayerUpdate, made: Mapping[str, Factors], dtype: torch.dtype) -> LayerUpdate:
    """Return an update at the same place whose parts have other factors, {part: (A, B)} with ΔW = B A."""
    specs = {part: plain_spec(A.shape[-2], update.spec) for part, (A, _) in made.items()}
    spec = next(iter(specs.values()))
    tensors: dict[str, dict[str, Tensor]] = {
        part: {"A": A.to(dtype).contiguous(), "B": B.to(dtype).contiguous()} for part, (A, B) in made.items()
    }
    others = {part: own for part, own in specs.items() if own != spec}
    return dataclasses.replace(update, spec=spec, specs=others, tensors=tensors)


def with_updates(content: Content, updates: Mapping[str, LayerUpdate]) -> Content:
    """Return a content with other updates, and the spec that most of them have."""
    made = dataclasses.replace(content, updates=dict(updates))
    made.spec = most_common(made)
    return made


def most_common(content: Content) -> Spec:
    """Return the spec that most layers have."""
    specs = [content.updates[layer].spec for layer in in_order(content.updates)]
    return max(dict.fromkeys(specs), key=specs.count, default=LoRA())
