"""transformers' Conv1D (GPT-2, ImageGPT): a linear layer whose weight is stored as (in, out)."""

import torch
from torch import Tensor, nn

from .base import NoHost, register
from .linear import LinearHost, agrees


@register("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
class Conv1DHost(LinearHost):
    transposed = True

    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        weight = self.weight(layer)
        if weight.dim() != 2 or weight.shape[1] != layer.nf:
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.nf} outputs: it needs a host of its own"
            )
        return weight.T

    def write(self, layer: nn.Module, part: str, W: Tensor) -> None:
        self.weight(layer).data.copy_(W.T)

    @torch.no_grad()
    def behaves(self, layer: nn.Module) -> bool:
        weight = self.weight(layer)
        x = torch.linspace(-1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)[None]
        return agrees(layer, x, torch.addmm(layer.get_parameter("bias"), x, weight))
