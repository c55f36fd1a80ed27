"""DoRA: the weight's direction is trained by LoRA, the length of each of its rows by a number of its own.

W' = m · (W + scale · B A) / ‖W + scale · B A‖, with the norm of each row, and m a number a row (Liu et al. 2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation", eq. 5; its columns are rows here, as in PyTorch's weights). The backward pass
takes the norm as a constant (its section 4.3).

B A is not formed for the norm: ‖w + s·bA‖² = ‖w‖² + 2s·b(A wᵀ) + s²·b(A Aᵀ)bᵀ, for each row w of W and b of B.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hosts import AdditiveHost, Host
from ..lowrank import delta, product, without_autocast
from .base import Spec, Update, materialised, on_device_of, register
from .lora import LoRAAdapter, LowRank


@register("dora")
@dataclass(frozen=True)
class DoRA(LowRank):
    """LoRA of the direction of each row of W, and a trained length of it. At most one such adapter can be active.

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`. The magnitude has the dtype of A and B; dropout is of
    the low-rank update's input, W itself sees all of it.
    """

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "DoRAAdapter":
        return DoRAAdapter(self, host, layer, part, device)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        return Spec.low_rank(self, tensors, shape)  # raises: the update depends on W

    def factors(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        return tensors["A"], tensors["B"]

    def __str__(self) -> str:
        return f"DoRA of {super().__str__()}"


class DoRAAdapter(LoRAAdapter):
    """A (rank, in), B (out, rank) and the magnitude (out,); of a stack of n matrices each with n in front."""

    additive = False
    run_mirrored = Update.run_mirrored  # the rows of a transposed weight are others

    def add_tensors(self) -> None:
        self.magnitude = nn.Parameter(torch.empty_like(self.B[..., 0]))

    def reset_parameters(self, layer: nn.Module) -> None:
        super().reset_parameters(layer)
        self.magnitude = on_device_of(self.magnitude, self.B)
        self.rebase(layer)

    @torch.no_grad()
    def rebase(self, layer: nn.Module) -> None:
        self.magnitude.copy_(self._norm(layer))

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        host = self.host
        assert isinstance(host, AdditiveHost), "only these are asked to add to an output"
        materialised(self.A, x)
        gain = self._gain(layer)
        z = host.down(layer, self.part, self.dropped(x), self.A)
        update = host.up(layer, self.part, self.scale * self.dropped_lookup(z), gain[:, None] * self.B)
        change = host.channel(layer, self.part, gain - 1).to(y.dtype) * host.without_bias(layer, self.part, y)
        return host.add(layer, self.part, y + change, update)

    def delta_weight(self, layer: nn.Module) -> Tensor:
        W = self._weight(layer)
        return self._gain(layer)[..., None] * (W + delta(self.A, self.B, self.scale)) - W

    def change(self, layer: nn.Module) -> Tensor:
        W = self._weight(layer)
        A = self.dropped_features(materialised(self.A, W))
        changed = self._gain(layer)[..., None] * (W + product(A, self.B, self.scale)) - W
        return self.host.stored(layer, self.part, changed)

    def at_start(self, layer: nn.Module) -> bool:
        return self.A.is_meta or not (self.B.detach().any() and self.A.detach().any())

    def largest_change(self) -> None:
        return None

    def _weight(self, layer: nn.Module) -> Tensor:
        W = self.host.matrix(layer, self.part).detach()
        return W.to(torch.promote_types(torch.promote_types(W.dtype, self.A.dtype), torch.float32))

    def _gain(self, layer: nn.Module) -> Tensor:
        """Return m / ‖W + scale · B A‖, (out,); 1 where a row is zero and has no direction."""
        norm = self._norm(layer)
        # Not divided by 0 at all, or the magnitude would get NaN for a gradient.
        return torch.where(norm > 0, self.magnitude / torch.where(norm > 0, norm, 1.0), 1.0)

    @torch.no_grad()
    def _norm(self, layer: nn.Module) -> Tensor:
        """Return ‖W + scale · B A‖ of each row, (out,), in the dtype of the magnitude."""
        W = self.host.matrix(layer, self.part)
        A, B = self.A, self.B
        wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
        with without_autocast(A.device):
            squared = torch.linalg.vector_norm(W, dim=-1, dtype=wide).square()
            # In W's own dtype, or all of it would be converted; a small correction of ‖w‖² needs no more.
            across = (A.to(W.dtype) @ W.mT).to(wide)  # (rank, out)
            A, B = A.to(wide), B.to(wide)
            squared += 2 * self.scale * (B * across.mT).sum(dim=-1)
            squared += self.scale**2 * ((B @ (A @ A.mT)) * B).sum(dim=-1)
        return squared.clamp(min=0).sqrt().to(self.magnitude.dtype)
