"""nn.Linear: y = x Wᵀ + b, W (out, in)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdditiveHost, NoHost, register


@register(nn.Linear)
class LinearHost(AdditiveHost):
    multiplies_rows = True

    def matrix(self, layer: nn.Linear, part: str) -> Tensor:
        weight = self.weight(layer, part)
        if weight.shape != (layer.out_features, layer.in_features):
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.in_features} inputs and "
                f"{layer.out_features} outputs: packed, it needs a host of its own"
            )
        return weight

    def stored(self, layer: nn.Linear, part: str, W: Tensor) -> Tensor:
        return W

    def down(self, layer: nn.Linear, part: str, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A.to(x.dtype))  # (..., rank)

    def up(self, layer: nn.Linear, part: str, z: Tensor, B: Tensor) -> Tensor:
        return F.linear(z, B.to(z.dtype))  # (..., out)

    def whole(self, layer: nn.Linear, part: str, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W.to(x.dtype))

    def channel(self, layer: nn.Linear, part: str, v: Tensor) -> Tensor:
        return v  # outputs are the last dimension

    def apply(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.own(layer), layer._parameters["bias"])

    def example(self, layer: nn.Linear) -> Tensor:
        weight = self.own(layer)
        return torch.linspace(-1, 1, layer.in_features, device=weight.device, dtype=weight.dtype)[None]
