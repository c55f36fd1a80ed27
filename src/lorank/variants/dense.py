"""What methods have in common whose update is no product of two factors: ΔW is formed for every forward."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..hosts import AdditiveHost, Host
from ..lowrank import full_precision, without_autocast
from .base import materialised, on_device_of
from .dropout import WithDropout
from .lora import LowRank, factor_dtype


class DenseAdapter(WithDropout):
    """An update that is applied to the layer's input as one matrix ΔW (out, in)."""

    def __init__(self, spec: LowRank, host: Host, layer: nn.Module, part: str, device: torch.device | None = None):
        super().__init__(spec, host, part)
        weight = host.weight(layer, part)
        device, dtype = device or weight.device, factor_dtype(spec, weight)
        for name, shape in self.shapes(layer).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if device.type != "meta":
            self.reset_parameters(layer)

    @abstractmethod
    def shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its parameters by name."""

    @abstractmethod
    def initialise(self) -> None:
        """Fill the parameters in place, so that ΔW = 0."""

    @abstractmethod
    def product(self) -> Tensor:
        """Return ΔW (out, in) with gradient, in the dtype of its parameters."""

    def reset_parameters(self, layer: nn.Module) -> None:
        weight = self.host.weight(layer, self.part)
        for name, parameter in self.named_parameters():
            setattr(self, name, on_device_of(parameter, weight))
        with torch.no_grad():
            self.initialise()

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        host = self.host
        assert isinstance(host, AdditiveHost), "only these are asked to add to an output"
        materialised(next(self.parameters()), x)
        with without_autocast(x.device):
            W = self.product()
        return host.add(layer, self.part, y, host.whole(layer, self.part, self.dropped(x), W))

    def delta_weight(self, layer: nn.Module) -> Tensor:
        with full_precision(next(self.parameters()).device):
            W = self.product()
            return W.to(torch.promote_types(W.dtype, torch.float32))

    def change(self, layer: nn.Module) -> Tensor:
        materialised(next(self.parameters()), self.host.own(layer, self.part))
        with without_autocast(self.host.own(layer, self.part).device):
            W = self.product()
        return self.host.stored(
            layer, self.part, self.dropped_features(W.to(torch.promote_types(W.dtype, torch.float32)))
        )

    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, scale={self.scale:g}"
