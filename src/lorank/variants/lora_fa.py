"""LoRA-FA: LoRA with A frozen as it was drawn; B alone is trained.

Half of the parameters, and of the layer's input only A x has to be kept for the backward pass, rank numbers a token
(Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", section 3).
With rows of A of one length and at right angles, which A is drawn with here, the projection of B's gradient by
(A Aᵀ)⁻¹ that the method's later version and PEFT's optimiser use is a number, which Adam does not see.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..hosts import Host
from .base import on_device_of, register
from .lora import LoRAAdapter, LowRank


@register("lora-fa")
@dataclass(frozen=True)
class LoRAFA(LowRank):
    """LoRA of which B alone is trained.

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    """

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "LoRAFAAdapter":
        return LoRAFAAdapter(self, host, layer, part, device)

    def __str__(self) -> str:
        return f"{self.variant}, {super().__str__()}"


class LoRAFAAdapter(LoRAAdapter):
    """A (rank, in), which is a buffer, and B (out, rank)."""

    partners = ()  # B has a gradient from the first step
    A: torch.Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def add_tensors(self) -> None:
        A = self._parameters.pop("A")
        self.register_buffer("A", None if A is None else A.data)

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        weight = self.host.weight(layer, self.part)
        self.A, self.B = on_device_of(self.A, weight), on_device_of(self.B, weight)
        # As long as the rows that LoRA draws, uniform in ±1/√in: of length √(1/3).
        A = torch.empty_like(self.A, dtype=torch.promote_types(self.A.dtype, torch.float32))
        for matrix in A.flatten(0, -3) if A.dim() > 2 else A[None]:
            nn.init.orthogonal_(matrix, gain=(1 / 3) ** 0.5)
        self.A.copy_(A)
        self.B.zero_()
