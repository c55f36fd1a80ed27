"""Any parameter of two or three dimensions by its name, above all the weights of mixtures of experts.

A part for every such parameter of the module that holds it, which runs under W + ΔW. One of two dimensions is a matrix
(out, in) as it stands; one of three is a stack of them, (experts, out, in), or (experts, in, out) where the module says
`is_transposed`, as transformers' expert modules do. The kernel of a convolution that computes something of its own is
(out, in · kernel), of a transposed one (in, out · kernel).
"""

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .base import Host, NoHost, register_finder


class ParameterHost(Host):
    def parts(self, layer: nn.Module) -> tuple[str, ...]:
        return tuple(
            name
            for name, p in layer._parameters.items()
            if p is not None and not isinstance(p, UninitializedParameter)
            if p.dim() >= 2 and p.is_floating_point() and "bias" not in name
        )

    def attribute(self, layer: nn.Module, part: str) -> str:
        return part

    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        weight = self.weight(layer, part)
        if _is_kernel(layer, weight):
            return weight.flatten(1)
        if weight.dim() not in (2, 3):
            raise NoHost(f"its {part} has {weight.dim()} dimensions; only matrices and stacks of them can be adapted")
        return weight.mT if _transposed(layer, weight) else weight

    def stored(self, layer: nn.Module, part: str, W: Tensor) -> Tensor:
        weight = self.own(layer, part)
        if _is_kernel(layer, weight):
            return W.reshape(weight.shape)
        return W.mT if _transposed(layer, weight) else W


def _transposed(layer: nn.Module, weight: Tensor) -> bool:
    return weight.dim() == 3 and getattr(layer, "is_transposed", False) is True


def _is_kernel(layer: nn.Module, weight: Tensor) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and weight.dim() > 2


PARAMETER = ParameterHost()


@register_finder
def _experts(layer: nn.Module) -> Host | None:
    """Return the host of a module that holds the weights of a mixture of experts as parameters of its own."""
    return PARAMETER if "expert" in type(layer).__name__.lower() and PARAMETER.parts(layer) else None
