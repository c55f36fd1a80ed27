"""What methods have in common whose update is a product of two factors: ΔW = scale · B A, which is never formed."""

from abc import abstractmethod

from torch import Tensor, nn

from ..hosts import AdditiveHost, Host
from ..lowrank import delta, product
from .base import materialised
from .dropout import WithDropout


class PairAdapter(WithDropout):
    """An update that is applied to the layer's input factor by factor."""

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (..., r, in) and B (..., out, r) with ΔW = scale · B A, with gradient."""

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.pair()
        return self._add(self.host, layer, self.part, x, y, A, B)

    def run_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.pair()
        return self._add(host, layer, part, x, y, B.T, A.T)

    def _add(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        assert isinstance(host, AdditiveHost), "only these are asked to add to an output"
        materialised(down, x)
        z = self.dropped_lookup(host.down(layer, part, self.dropped(x), down))  # (..., r)
        return host.add(layer, part, y, host.up(layer, part, self.scale * z, up))

    def delta_weight(self, layer: nn.Module) -> Tensor:
        return delta(*self.pair(), self.scale)

    def change(self, layer: nn.Module) -> Tensor:
        A, B = self.pair()
        A = self.dropped_features(materialised(A, self.host.own(layer, self.part)))
        return self.host.stored(layer, self.part, product(A, B, self.scale))

    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, scale={self.scale:g}"
