"""nn.Conv1d, Conv2d, Conv3d: W (out, in / groups · kernel), stored as (out, in / groups, *kernel).

A is a convolution to `rank` channels with the layer's own stride, padding, dilation and groups; B mixes these channels
at every place. In a grouped convolution all groups share A, each has its own rows of B: so ΔW has the weight's own
shape, and merges. That is why a group must be able to use any rank: depthwise layers too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdditiveHost, register

_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# How each pads and convolves; a subclass with another way of it is found out by `behaves`.
_FORWARD: dict[int, Callable[..., Tensor]] = {
    1: nn.Conv1d._conv_forward,
    2: nn.Conv2d._conv_forward,
    3: nn.Conv3d._conv_forward,
}


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvHost(AdditiveHost):
    def matrix(self, layer: Any, part: str) -> Tensor:
        return self.weight(layer, part).flatten(1)

    def stored(self, layer: Any, part: str, W: Tensor) -> Tensor:
        return W.reshape(self.own(layer, part).shape)

    def down(self, layer: Any, part: str, x: Tensor, A: Tensor) -> Tensor:
        kernel = A.to(x.dtype).view(-1, *self.own(layer, part).shape[1:])  # (rank, in / groups, *kernel)
        repeated = kernel.repeat(layer.groups, *[1] * (kernel.dim() - 1))
        return _convolved(layer, x, repeated, None)  # (..., groups · rank, *size)

    def up(self, layer: Any, part: str, z: Tensor, B: Tensor) -> Tensor:
        return mix_channels(layer, z, B)

    def whole(self, layer: Any, part: str, x: Tensor, W: Tensor) -> Tensor:
        return _convolved(layer, x, W.to(x.dtype).view(self.own(layer, part).shape), None)

    def channel(self, layer: Any, part: str, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(layer.kernel_size))

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return _convolved(layer, x, self.own(layer), layer._parameters["bias"])

    def example(self, layer: Any) -> Tensor:
        weight = self.own(layer)
        sizes = [d * (k - 1) + s + 1 for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)]
        count = layer.in_channels * torch.Size(sizes).numel()
        x = torch.linspace(-1, 1, count, device=weight.device, dtype=weight.dtype)
        return x.view(1, layer.in_channels, *sizes)


def _convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _FORWARD[len(layer.kernel_size)](layer, x, weight, bias)


def mix_channels(layer: Any, z: Tensor, B: Tensor) -> Tensor:
    """Apply B (out, rank) at every place of z (..., groups · rank, *size), each group's rows to its own channels."""
    dimensions = len(layer.kernel_size)
    return _POINTWISE[dimensions](z, B.to(z.dtype).view(*B.shape, *[1] * dimensions), groups=layer.groups)
