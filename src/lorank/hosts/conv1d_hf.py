"""transformers' Conv1D (GPT-2, ImageGPT): a linear layer whose weight is stored as (in, out)."""

import torch
from torch import Tensor, nn

from .base import NoHost, register
from .linear import LinearHost


@register("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
class Conv1DHost(LinearHost):
    transposed = True

    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        weight = self.weight(layer, part)
        if weight.dim() != 2 or weight.shape[1] != layer.nf:
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.nf} outputs: it needs a host of its own"
            )
        return weight.T

    def stored(self, layer: nn.Module, part: str, W: Tensor) -> Tensor:
        return W.T

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        bias = layer._parameters["bias"]
        assert bias is not None, "Conv1D always has one"
        weight = self.own(layer)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    def example(self, layer: nn.Module) -> Tensor:
        weight = self.own(layer)
        return torch.linspace(-1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)[None]
