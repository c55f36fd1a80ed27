"""nn.Bilinear: y = x₁ᵀ W x₂ + b. W (out, in₁ · in₂), stored as (out, in₁, in₂); the layer runs under W + ΔW."""

from torch import Tensor, nn

from .base import Host, register


@register(nn.Bilinear)
class BilinearHost(Host):
    def matrix(self, layer: nn.Bilinear, part: str) -> Tensor:
        return self.weight(layer, part).flatten(1)

    def stored(self, layer: nn.Bilinear, part: str, W: Tensor) -> Tensor:
        return W.reshape(self.own(layer, part).shape)
