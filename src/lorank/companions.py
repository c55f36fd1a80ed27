"""What is trained beside the low-rank updates: biases, and the joining of several adapters of one layer."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .adapted import base_class
from .hosts import NoHost, has_host, plain_parameter
from .variants import Adapter

# Layers whose output is f(x) + bias, with the dimensions of the output that come after the bias's own.
_TRAILING = {
    nn.LayerNorm: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
}
_CHANNEL_SECOND = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Parts(Adapter):
    """Several adapters of one layer under one name, by part: {"q": ..., "v": ..., "bias": ...}."""

    def __init__(self, parts: Mapping[str, Adapter]):
        super().__init__()
        for part, adapter in parts.items():
            self.add_module(part, adapter)

    def leaves(self) -> Iterator[Adapter]:
        for adapter in self._modules.values():
            yield from cast(Adapter, adapter).leaves()

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for adapter in self._modules.values():
            y = cast(Adapter, adapter)(layer, x, y)
        return y

    def reset_parameters(self, layer: nn.Module) -> None:
        for adapter in self.leaves():
            adapter.reset_parameters(layer)


class BiasOffset(Adapter):
    """A trained bias in place of the layer's own: y + (value − bias). The layer's own stays as it is."""

    def __init__(self, layer: nn.Module, device: torch.device | None = None):
        super().__init__()
        bias = plain_parameter(layer, "bias")
        dtype = torch.promote_types(bias.dtype, torch.float32)
        self.value = nn.Parameter(bias.detach().to(device or bias.device, dtype, copy=True))  # (out,)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + broadcast_bias(layer, self.value - cast(Tensor, layer.bias), y).to(y.dtype)

    def reset_parameters(self, layer: nn.Module) -> None:
        self.value.data.copy_(plain_parameter(layer, "bias"))

    def delta_bias(self, layer: nn.Module) -> Tensor:
        """Return value − bias in float32, (out,)."""
        return self.value.detach() - plain_parameter(layer, "bias").detach()


def join(parts: Mapping[str, Adapter]) -> Adapter:
    """Return one adapter for a layer: itself when it is the layer's only matrix, a `Parts` otherwise."""
    return parts["weight"] if parts.keys() == {"weight"} else Parts(parts)


def why_no_bias_offset(layer: nn.Module) -> str | None:
    """Return why the layer's bias cannot be trained by an offset of its output; None when it can."""
    try:
        plain_parameter(layer, "bias")
    except NoHost as error:
        return str(error)
    if has_host(layer) or _trailing_dimensions(layer, 1) is not None:
        return None
    return f"lorank does not know how {type(layer).__name__} applies its bias"


def broadcast_bias(layer: nn.Module, bias: Tensor, y: Tensor) -> Tensor:
    """View a vector like the layer's bias so that it broadcasts against its output y."""
    trailing = _trailing_dimensions(layer, y.dim())
    return bias.view(*bias.shape, *[1] * trailing) if trailing else bias


def _trailing_dimensions(layer: nn.Module, output_dimensions: int) -> int | None:
    for kind, trailing in _TRAILING.items():
        if isinstance(layer, kind):
            return trailing if _keeps_forward(layer, kind) else None
    if isinstance(layer, _CHANNEL_SECOND):
        return max(output_dimensions - 2, 0)
    return None


def _keeps_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether no subclass between the layer's class and `kind` has a forward of its own."""
    mro = base_class(layer).__mro__
    return not any("forward" in vars(cls) for cls in mro[: mro.index(kind)])
