"""LoRA-GA: LoRA whose first step goes where full fine-tuning's would.

G = U S Vᵀ is the gradient of the loss for W, of a few batches; A₀ = c V[:r]ᵀ, B₀ = c U[:, r:2r] with c = ⁴√out / √γ
(Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", section 3, theorem 3.1 and eq. 9; γ is 16
as in the authors' code). PEFT multiplies B₀ by singular values of the gradient and leaves A₀ at length 1; files of one
compute the same in the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hosts import AdditiveHost, Host
from ..lowrank import full_precision
from .base import number_problems, register
from .calibrated import CalibratedAdapter
from .shifted import Shifted, ShiftedAdapter


@register("lora-ga")
@dataclass(frozen=True)
class LoRAGA(Shifted):
    """LoRA from the gradient's singular vectors; `lorank.calibrate` has to be called after `adapt`.

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`. Calibrating takes the memory of a gradient for every
    adapted matrix. The base stays untouched (see `Shifted`).
    gamma: how small the factors start, c = ⁴√out / √gamma.
    """

    gamma: float = 16.0

    def problems(self) -> list[str]:
        return super().problems() + number_problems(self, gamma="positive")

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        limit = min(host.shape(layer, part)[-2:])
        return (
            f"LoRA-GA takes 2 x {self.rank} vectors of a gradient that has {limit}" if 2 * self.rank > limit else None
        )

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors for a gradient of the shape of W."""
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        size = W.shape[-2] ** 0.25 / self.gamma**0.5
        return size * V[..., : self.rank, :], size * U[..., self.rank : 2 * self.rank]

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "LoRAGAAdapter":
        return LoRAGAAdapter(self, host, layer, part, device)


class LoRAGAAdapter(CalibratedAdapter, ShiftedAdapter):
    """A and B, and A0 and B0, where they started."""

    spec: LoRAGA  # pyright: ignore[reportIncompatibleVariableOverride]
    needs_gradient = True

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        super().reset_parameters(layer)
        self.start_from(torch.zeros_like(self.A), torch.zeros_like(self.B))  # until it is calibrated

    def rebase(self, layer: nn.Module) -> None:
        """Stay: the gradient was that of the base it was calibrated with, and its update is zero on any."""

    def begin(self, layer: nn.Module) -> None:
        self.watching = True
        weight = self.host.weight(layer, self.part)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        # In the place of ΔW, for its gradient: one zero, that is not stored as often as the matrix has numbers.
        zeros = torch.zeros((), device=weight.device, dtype=dtype).expand(self.host.shape(layer, self.part))
        vars(self)["probe"] = zeros.requires_grad_()

    def watch(self, layer: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        host = self.host
        assert isinstance(host, AdditiveHost), "only these are asked to add to an output"
        return host.add(layer, self.part, y, host.whole(layer, self.part, x, vars(self)["probe"]))

    def watch_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(host, AdditiveHost), "only these are asked to add to an output"
        return host.add(layer, part, y, host.whole(layer, part, x, vars(self)["probe"].mT))

    def watch_weight(self, layer: nn.Module) -> Tensor:
        return self.host.stored(layer, self.part, vars(self)["probe"])

    def problem(self) -> str | None:
        gradient = vars(self)["probe"].grad
        if gradient is None or not gradient.any():
            return "the loss has no gradient for it"
        return None if torch.isfinite(gradient).all() else "its gradient holds NaN or Inf"

    @torch.no_grad()
    def start(self, layer: nn.Module) -> None:
        gradient = vars(self)["probe"].grad
        with full_precision(gradient.device):
            self.start_from(*self.spec.start(gradient.to(torch.promote_types(gradient.dtype, torch.float32))))
        self.calibrated = True

    def end(self) -> None:
        super().end()
        vars(self).pop("probe", None)
