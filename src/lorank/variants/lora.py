"""LoRA: y = W x + (alpha / rank) · B A x, W frozen (Hu et al. 2021, section 4.1, eq. 3).

With `rank_stabilised` the factor is alpha / √rank, which keeps the size of the update when the rank grows
(Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import raise_problems
from ..hosts import Host
from ..lowrank import INITIALISATIONS, initialise
from .base import Spec, dtype_problems, number_problems, on_device_of, register
from .paired import PairAdapter


@dataclass(frozen=True)
class LowRank(Spec):
    """What all methods with an update scale · B A have in common.

    rank: columns of B and rows of A, at least 1.
    alpha: numerator of the scale, alpha / rank.
    dropout: probability with which an element of the update's input is zeroed in training.
    rank_stabilised: scale by alpha / √rank instead.
    dtype: of A and B. None takes float32, or the base's own dtype where that is wider; products always run in
        the dtype of the layer's input.

    Raises AdapterError, naming every field that is wrong.
    """

    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        raise_problems(f"{type(self).__name__} cannot be set up like this", self.problems())

    def problems(self) -> list[str]:
        """Return what is wrong with the fields."""
        wrong = number_problems(self, rank="rank", alpha="factor", dropout="probability", rank_stabilised="flag")
        return wrong + dtype_problems(self.dtype)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        return tensors["A"], tensors["B"]

    def restored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"A": A, "B": B}

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}"


@register("lora")
@dataclass(frozen=True)
class LoRA(LowRank):
    """A low-rank update ΔW = scale · B A of a frozen weight.

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    init: `kaiming` (A uniform in ±1/√in, as the authors' code) or `gaussian` (as the paper says; std 1/rank).
        B starts at zero, so that the adapted model starts as the base. In an embedding A is the zero one.
    """

    init: Literal["kaiming", "gaussian"] = "kaiming"

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.init not in INITIALISATIONS:
            wrong.append(f"init is {self.init!r}; it must be one of {', '.join(INITIALISATIONS)}")
        return wrong

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "LoRAAdapter":
        return LoRAAdapter(self, host, layer, part, device)


def factor_dtype(spec: Spec, weight: Tensor) -> torch.dtype:
    """Return the dtype of A and B: the spec's, or float32, or a wider one of the weight's own."""
    return getattr(spec, "dtype", None) or torch.promote_types(weight.dtype, torch.float32)


class LoRAAdapter(PairAdapter):
    """A (rank, in) and B (out, rank) of one matrix; of a stack of n matrices A (n, rank, in) and B (n, out, rank)."""

    spec: LowRank
    partners = (("A", "B"),)
    outward = ("B",)

    def __init__(self, spec: LowRank, host: Host, layer: nn.Module, part: str, device: torch.device | None = None):
        super().__init__(spec, host, part)
        weight = host.weight(layer, part)
        *stack, out, in_ = host.shape(layer, part)
        dtype = factor_dtype(spec, weight)
        device = device or weight.device
        self.A = nn.Parameter(torch.empty(*stack, spec.rank, in_, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*stack, out, spec.rank, device=device, dtype=dtype))
        self.add_tensors()
        if self.A.device.type != "meta":
            self.reset_parameters(layer)

    def add_tensors(self) -> None:
        """Make what a method has beside A and B, of their dtype and on their device, with no values yet."""

    def reset_parameters(self, layer: nn.Module) -> None:
        weight = self.host.weight(layer, self.part)
        self.A, self.B = on_device_of(self.A, weight), on_device_of(self.B, weight)
        initialise(self.A, self.B, getattr(self.spec, "init", "kaiming"), lookup=self.host.lookup)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def at_start(self, layer: nn.Module) -> bool:
        return self.A.is_meta or not (self.A.detach().any() and self.B.detach().any())

    def largest_change(self) -> float | None:
        # |ΔW| <= |scale| · rank · max|A| · max|B|
        return abs(self.scale) * self.A.shape[-2] * float(self.A.abs().max() * self.B.abs().max())
