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

    @torch.no_grad()
    def behaves(self, layer: nn.Linear) -> bool:
        weight = self.weight(layer)
        x = torch.linspace(-1, 1, layer.in_features, device=weight.device, dtype=weight.dtype)[None]
        return agrees(layer, x, F.linear(x, weight, layer.bias))


def agrees(layer: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Tell whether `layer.forward(x)` is `expected`, to the 5 % that 8-bit arithmetic inside may cost."""
    try:
        y = layer.forward(x)
    except Exception:  # another signature, other assumptions about x: whatever it is, it is not ours
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    if y.device.type == "meta":
        return True  # there are no numbers to compare; the shape is right
    return bool(torch.linalg.vector_norm((y - expected).float()) <= 0.05 * torch.linalg.vector_norm(expected.float()))
