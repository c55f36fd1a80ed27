"""nn.ConvTranspose1d, 2d, 3d: W (out, in / groups · kernel), stored as (in, out / groups, *kernel).

As in a convolution, A goes to `rank` channels with the layer's own stride, padding, dilation and groups, and all groups
share it; B mixes these channels at every place. Up to a row and column of zeros at its end, which `output_padding` or
`output_size` may ask for, the result has the size of the layer's output.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdditiveHost, register
from .conv import mix_channels

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeHost(AdditiveHost):
    def matrix(self, layer: Any, part: str) -> Tensor:
        grouped = self.weight(layer, part).unflatten(0, (layer.groups, -1))  # (groups, in / groups, out / groups, ...)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def stored(self, layer: Any, part: str, W: Tensor) -> Tensor:
        weight = self.own(layer, part)
        grouped = W.reshape(layer.groups, weight.shape[1], weight.shape[0] // layer.groups, *weight.shape[2:])
        return grouped.transpose(1, 2).flatten(0, 1)

    def down(self, layer: Any, part: str, x: Tensor, A: Tensor) -> Tensor:
        weight = self.own(layer, part)
        inner = weight.shape[0] // layer.groups
        kernel = A.to(x.dtype).view(-1, inner, *weight.shape[2:]).transpose(0, 1)  # (in / groups, rank, *kernel)
        repeated = kernel.repeat(layer.groups, *[1] * (kernel.dim() - 1))
        # The most that can be asked for: `add` takes as much as the layer put out.
        padding = [max(s, d) - 1 for s, d in zip(layer.stride, layer.dilation, strict=True)]
        return self._transposed(layer, x, repeated, None, padding)  # (..., groups · rank, *size)

    def up(self, layer: Any, part: str, z: Tensor, B: Tensor) -> Tensor:
        return mix_channels(layer, z, B)

    def add(self, layer: Any, part: str, y: Tensor, update: Tensor) -> Tensor:
        for dimension in range(-len(layer.kernel_size), 0):
            update = update.narrow(dimension, 0, y.shape[dimension])
        return super().add(layer, part, y, update)

    def channel(self, layer: Any, part: str, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(layer.kernel_size))

    def apply(self, layer: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        dimensions = len(layer.kernel_size)
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        )
        return self._transposed(layer, x, self.own(layer), layer._parameters["bias"], padding)

    def example(self, layer: Any) -> Tensor:
        weight = self.own(layer)
        sizes = [layer.padding[i] + 2 for i in range(len(layer.kernel_size))]
        count = layer.in_channels * torch.Size(sizes).numel()
        x = torch.linspace(-1, 1, count, device=weight.device, dtype=weight.dtype)
        return x.view(1, layer.in_channels, *sizes)

    def _transposed(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Any) -> Tensor:
        function = _TRANSPOSED[len(layer.kernel_size)]
        return function(x, weight, bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
