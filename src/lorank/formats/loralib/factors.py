"""What loralib's layers make of `lora_A` and `lora_B`, as A (rank, in) and B (out, rank) of ours.

`Linear` and `Embedding` have the same factors. `MergedLinear` has those of n equal parts of the rows, one after the
other: A (n · r, in) and B (n · rows, r). `Conv2d` reads B A in the shape of its weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...hosts import AdditiveHost, ConvHost, Host, NoHost, RowLayout, layout_of
from ...lowrank import stack_blocks
from ...names import Names
from ...variants import LoRA
from ..content import Given, LayerUpdate
from .reshaping import reshaped


def decode_layer(name: str, factors: Mapping[str, Tensor], names: Names | None, given: Given) -> LayerUpdate:
    """Return the update of a layer with these factors; raises AdapterError when they are none."""
    missing = {"A", "B"} - factors.keys()
    if missing:
        raise AdapterError(f"the file lacks lora_{missing.pop()}")
    A, B = factors["A"], factors["B"]
    if A.dim() != 2 or B.dim() != 2 or not A.numel() or not B.numel() or A.shape[0] % B.shape[1]:
        raise AdapterError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors")
    layer, host = _layer(name, names)
    if isinstance(host, ConvHost):
        return _convolution(A, B, layer, given)
    enabled, shape = A.shape[0] // B.shape[1], _shape(layer, host)
    if enabled == 1 and (shape is None or shape[1] != A.shape[1] or shape[0] == B.shape[0]):
        spec = LoRA(A.shape[0], alpha=_alpha(given))
        return LayerUpdate(spec, {"weight": {"A": A, "B": B}}, lookup=host is not None and host.lookup)
    return _merged(A, B, enabled, shape, _layout(name, names, shape), given)


def _alpha(given: Given) -> float:
    assert given.alpha is not None, "the reader has asked for it"
    return given.alpha


def _layer(name: str, names: Names | None) -> tuple[Any, Host | None]:
    """Return a layer and its host, where there are any; that there is none, `fit` says."""
    if names is None or name not in names.modules:
        return None, None
    try:
        return names.modules[name], names.host(name)
    except NoHost:
        return names.modules[name], None


def _shape(layer: nn.Module | None, host: Host | None) -> tuple[int, ...] | None:
    """Return (out, in) of a layer that has one matrix."""
    if layer is None or not isinstance(host, AdditiveHost) or host.parts(layer) != ("weight",):
        return None
    return host.shape(layer, "weight")


def _layout(name: str, names: Names | None, shape: tuple[int, ...] | None) -> RowLayout | None:
    """Return which rows of a layer are which part, where that is known."""
    owner, child = names.parent(name) if names is not None and shape is not None else (None, "")
    if names is None or shape is None or owner is None:
        return None
    try:
        return layout_of(owner, child, names.modules[name], shape[0])
    except NoHost:
        return None


def equal_parts(layout: RowLayout) -> bool:
    """Tell whether the parts are equal ranges of rows, one after the other: what `MergedLinear` has."""
    ranges = list(layout.parts.values())
    size = layout.width // len(ranges)
    return layout.groups == 1 and ranges == [(i * size, (i + 1) * size) for i in range(len(ranges))]


def _merged(
    A: Tensor, B: Tensor, enabled: int, shape: tuple[int, ...] | None, layout: RowLayout | None, given: Given
) -> LayerUpdate:
    """Return the update of a `MergedLinear` of which so many parts are enabled.

    By parts where the model's are the same; otherwise as one pair of factors of the whole layer, as far as it is known.
    """
    rank, (rows, odd) = B.shape[1], divmod(B.shape[0], enabled)
    count, wrong = divmod(shape[0], rows) if shape is not None and rows else (enabled, 0)
    if odd or wrong or count < enabled:
        layer = f"a layer of {shape[0]} rows" if shape is not None else "any layer"
        raise AdapterError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no factors of parts of {layer}")
    if layout is not None and (not equal_parts(layout) or len(layout.parts) != count):
        layout = None  # loralib cut the rows without regard to it
    if shape is None:
        known = list(given.parts) if len(given.parts) == enabled else []
    else:
        known = list(layout.parts) if layout is not None else [str(i) for i in range(count)]
    chosen = [i for i, part in enumerate(known) if part in given.parts or str(i) in given.parts]
    if count == enabled and shape is not None:
        chosen = list(range(count))
    if len(chosen) != enabled:
        told = f"; {', '.join(given.parts)} does not tell" if given.parts else ""
        which = f"which of {', '.join(known)}" if known else "which"
        raise AdapterError(
            f"the file adapts {enabled} parts of a fused projection, and does not say {which}: pass parts=, with "
            f"{enabled} names{told}"
        )
    pairs = list(zip(A.split(rank), B.split(rows), strict=True))
    spec = LoRA(rank, alpha=_alpha(given))
    if layout is not None or shape is None:
        by_part = {known[i]: {"A": a.clone(), "B": b.clone()} for i, (a, b) in zip(chosen, pairs, strict=True)}
        return LayerUpdate(spec, by_part, by_parts=True)
    places = [torch.arange(i * rows, (i + 1) * rows, device="cpu") for i in chosen]
    whole = stack_blocks([(a, b, rows) for (a, b), rows in zip(pairs, places, strict=True)], shape[0])
    spec = LoRA(rank * enabled, alpha=_alpha(given) * enabled)  # alpha / rank as it was
    return LayerUpdate(spec, {"weight": dict(zip("AB", whole, strict=True))})


def _convolution(A: Tensor, B: Tensor, layer: Any, given: Given) -> LayerUpdate:
    """Return the update of a convolution, of which loralib adds (B A).view(weight.shape)."""
    kernel, shape = layer.kernel_size, tuple(layer._parameters["weight"].shape)
    numbers = torch.Size(shape).numel()
    if B.shape[0] * A.shape[1] != numbers or A.shape[0] != B.shape[1] or A.shape[0] % kernel[0] or len(set(kernel)) > 1:
        raise AdapterError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} make no kernel of {shape}, of which all sides are "
            "equal in loralib"
        )
    factors = reshaped(A, B, numbers // shape[0])
    spec = LoRA(factors[0].shape[0], alpha=_alpha(given) * factors[0].shape[0] * kernel[0] / A.shape[0])
    named = dict(zip("AB", factors, strict=True))
    return LayerUpdate(spec, {"weight": named}, groups=layer.groups, shapes={"weight": shape})
