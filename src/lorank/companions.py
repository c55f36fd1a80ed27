"""What is trained beside the low-rank updates: biases, and the joining of several adapters of one layer."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .adapted import in_turn
from .hosts import AdditiveHost, NoHost, has_host, host_of, overrides_forward, plain_parameter, registered_host
from .variants import Adapter, materialised, on_device_of

# Layers whose output is f(x) + bias, with the dimensions of the output that come after the bias's own.
_TRAILING = {
    nn.LayerNorm: 0,
}
_CHANNEL_SECOND = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Parts(Adapter):
    """Several adapters of one layer under one name, by part: {"q": ..., "v": ..., "bias": ...}."""

    def __init__(self, parts: Mapping[str, Adapter]):
        super().__init__()
        for part in in_turn(parts):
            self.add_module(part, parts[part])
        self.additive = all(adapter.additive for adapter in parts.values())
        self.behind = any(adapter.behind for adapter in parts.values())
        self.prepares = any(adapter.prepares for adapter in parts.values())

    def leaves(self) -> Iterator[Adapter]:
        for adapter in self._modules.values():
            yield from cast(Adapter, adapter).leaves()

    def prepare(self, layer: nn.Module, x: Tensor) -> Tensor:
        for adapter in self._modules.values():
            x = cast(Adapter, adapter).prepare(layer, x)
        return x

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for adapter in self._modules.values():
            y = cast(Adapter, adapter)(layer, x, y)
        return y

    def attribute(self, layer: nn.Module) -> str:
        raise NotImplementedError("each of the leaves changes a parameter of its own")

    def change(self, layer: nn.Module) -> Tensor:
        raise NotImplementedError("each of the leaves changes a parameter of its own")

    def reset_parameters(self, layer: nn.Module) -> None:
        for adapter in self.leaves():
            adapter.reset_parameters(layer)


class BiasOffset(Adapter):
    """A trained change of the layer's bias, added to its output. The layer's own bias stays as it is.

    An offset and not a value, so that several adapters add up, and that loading or merging another base under it
    does not change what was trained.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        bias = plain_parameter(layer, "bias")
        dtype = torch.promote_types(bias.dtype, torch.float32)
        self.offset = nn.Parameter(torch.zeros(bias.shape, device=bias.device, dtype=dtype))  # (out,)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + broadcast_bias(layer, materialised(self.offset, y), y.dim()).to(y.dtype)

    def adds(self, layer: nn.Module) -> bool:
        host = registered_host(layer)
        return host is None or host.additive

    def attribute(self, layer: nn.Module) -> str:
        return "bias"

    def change(self, layer: nn.Module) -> Tensor:
        bias = layer._parameters["bias"]
        assert bias is not None, "it was there when this was made"
        return materialised(self.offset, bias)

    def reset_parameters(self, layer: nn.Module) -> None:
        self.offset = on_device_of(self.offset, plain_parameter(layer, "bias"))
        nn.init.zeros_(self.offset)

    def value(self, layer: nn.Module) -> Tensor:
        """Return the whole trained bias, (out,), in the offset's dtype."""
        return plain_parameter(layer, "bias").detach() + self.offset.detach()


INSERTED = "inserted"  # the name among a layer's parts of what a baseline runs with it


def join(parts: Mapping[str, Adapter]) -> Adapter:
    """Return one adapter for a layer: itself when it is the layer's only matrix, a `Parts` otherwise."""
    if parts.keys() == {"weight"} or parts.keys() == {INSERTED}:
        return next(iter(parts.values()))
    return Parts(parts)


def why_no_bias_offset(layer: nn.Module) -> str | None:
    """Return why the layer's bias cannot be trained by an offset of its output; None when it can."""
    try:
        plain_parameter(layer, "bias")
        if has_host(layer):
            host_of(layer)
            return None
    except NoHost as error:
        return str(error)
    if _trailing_dimensions(layer, 1) is not None:
        return None
    return f"lorank does not know how {type(layer).__name__} applies its bias"


def broadcast_bias(layer: nn.Module, bias: Tensor, dimensions: int) -> Tensor:
    """View a vector like the layer's bias so that it broadcasts against an output of so many dimensions."""
    host = registered_host(layer)
    if isinstance(host, AdditiveHost):
        return host.channel(layer, "weight", bias)
    trailing = _trailing_dimensions(layer, dimensions)
    return bias.view(*bias.shape, *[1] * trailing) if trailing else bias


def _trailing_dimensions(layer: nn.Module, output_dimensions: int) -> int | None:
    for kind, trailing in _TRAILING.items():
        if isinstance(layer, kind):
            return None if overrides_forward(layer, kind) else trailing
    for kind in _CHANNEL_SECOND:
        if isinstance(layer, kind):
            return None if overrides_forward(layer, kind) else max(output_dimensions - 2, 0)
    return None
