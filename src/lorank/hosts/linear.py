"""nn.Linear: y = x Wᵀ + b, W (out, in)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Host, NoHost, register


@register(nn.Linear)
class LinearHost(Host):
    def matrix(self, layer: nn.Linear, part: str) -> Tensor:
        weight = self.weight(layer)
        if weight.shape != (layer.out_features, layer.in_features):
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.in_features} inputs and "
                f"{layer.out_features} outputs: packed, it needs a host of its own"
            )
        return weight

    def write(self, layer: nn.Linear, part: str, W: Tensor) -> None:
        self.weight(layer).data.copy_(W)

    def down(self, layer: nn.Linear, part: str, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A.to(x.dtype))  # (..., rank)

    def up(self, layer: nn.Linear, part: str, z: Tensor, B: Tensor) -> Tensor:
        return F.linear(z, B.to(z.dtype))  # (..., out)

    def channel(self, layer: nn.Linear, part: str, v: Tensor) -> Tensor:
        return v  # outputs are the last dimension

    @torch.no_grad()
    def behaves(self, layer: nn.Linear) -> bool:
        weight = self.weight(layer)
        x = torch.linspace(-1, 1, layer.in_features, device=weight.device, dtype=weight.dtype)[None]
        return agrees(layer, x, F.linear(x, weight, layer.bias))


def agrees(layer: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Tell whether the layer's own forward gives `expected` for x, up to rounding."""
    try:
        y = getattr(layer, "base_forward", layer.forward)(x)
    except Exception:  # another signature, other assumptions about x: whatever it is, it is not ours
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    if y.device.type == "meta":
        return True  # there are no numbers to compare yet; merging looks again
    size = torch.linalg.vector_norm(expected.float())
    tolerance = 100 * torch.finfo(expected.dtype).eps
    # A layer of zeros agrees with everything, and so with nothing.
    return bool(size > 0 and torch.linalg.vector_norm((y - expected).float()) <= tolerance * size)
