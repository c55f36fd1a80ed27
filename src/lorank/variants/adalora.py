"""AdaLoRA: ΔW = scale · B diag(E) A, like a singular value decomposition, whose least important ranks are dropped.

(Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3.1, eq. 3; B, E
and A are its P, Λ and Q.) All layers start with `rank`; `lorank.RankBudget`, called after every step, sets the E of the
least important triplets to zero until `target_rank` a layer are left on average, and gives the penalty that keeps B and
A near to orthonormal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Host
from .base import Spec, number_problems, on_device_of, register
from .lora import LoRAAdapter, LowRank


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """A decomposed update with a budget of ranks for all layers together; see `lorank.RankBudget`.

    rank: that every layer starts with.
    alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    target_rank: that a layer has at the end, on average.
    warmup: share of all steps before the first rank is dropped.
    settle: share of all steps after the last rank was dropped.
    interval: steps between two times that ranks are dropped.
    beta1, beta2: of the running means of importance and of its uncertainty, in (0, 1) (eq. 9 and 10).
    orthogonality: weight of the penalty ‖BᵀB − 1‖ + ‖AAᵀ − 1‖ (eq. 4).
    """

    rank: int = 12
    target_rank: int = 8
    warmup: float = 0.1
    settle: float = 0.3
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def problems(self) -> list[str]:
        wrong = super().problems()
        wrong += number_problems(self, target_rank="rank", interval="rank", warmup="probability", settle="probability")
        wrong += number_problems(self, beta1="share", beta2="share", orthogonality="not negative")
        if not wrong:
            if self.alpha < 0:
                wrong.append(f"alpha is {self.alpha}; it must be above 0: the signs are E's")
            if self.target_rank > self.rank:
                wrong.append(f"target_rank is {self.target_rank}, above the rank {self.rank} that layers start with")
            if self.warmup + self.settle >= 1:
                wrong.append(f"warmup {self.warmup} and settle {self.settle} leave no steps to drop ranks in")
        return wrong

    def overridden(self, **values: Any) -> "Spec":
        """Return the spec with another rank for one layer, which ends with no more than it starts with."""
        rank = values.get("rank", self.rank)
        return super().overridden(**values, target_rank=min(self.target_rank, rank))

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "AdaLoRAAdapter":
        return AdaLoRAAdapter(self, host, layer, part, device)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        return tensors["E"][..., :, None] * tensors["A"], tensors["B"]

    def __str__(self) -> str:
        return f"AdaLoRA, {super().__str__()}, to {self.target_rank}"


class AdaLoRAAdapter(LoRAAdapter):
    """A (rank, in), E (rank,) and B (out, rank); of a stack of n matrices each with n in front."""

    spec: AdaLoRA  # pyright: ignore[reportIncompatibleVariableOverride]
    partners = (("A", "B", "E"),)

    def add_tensors(self) -> None:
        self.E = nn.Parameter(torch.empty_like(self.A[..., 0]))

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        weight = self.host.weight(layer, self.part)
        for name in ("A", "B", "E"):
            setattr(self, name, on_device_of(getattr(self, name), weight))
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        nn.init.zeros_(self.E)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.E[..., :, None] * self.A, self.B

    def at_start(self, layer: nn.Module) -> bool:
        return self.E.is_meta or not self.E.detach().any()

    def largest_change(self) -> None:
        return None
