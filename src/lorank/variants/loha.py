"""LoHa: ΔW = scale · (B₁ A₁) ⊙ (B₂ A₂), the elementwise product of two low-rank matrices, of rank up to r².

(Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
proposition 1; LyCORIS has it as LoHa, Yeh et al. 2023, section 3.) Exactly the same as LoRA of rank r²: row i of its B
is the Kronecker product of the rows i of B₁ and B₂, and column j of its A that of the columns j of A₁ and A₂.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..hosts import Host
from .base import register
from .dense import DenseAdapter
from .lora import LowRank


@register("loha")
@dataclass(frozen=True)
class LoHa(LowRank):
    """An update that is the elementwise product of two low-rank ones.

    rank: of each of the two; that of their product is up to its square.
    alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    """

    bounded = False

    @property
    def factor_rank(self) -> int:
        return self.rank**2

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        return "LoHa would form the whole update of an embedding for every lookup" if host.lookup else None

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "LoHaAdapter":
        return LoHaAdapter(self, host, layer, part, device)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        A1, B1, A2, B2 = (tensors[name] for name in ("A1", "B1", "A2", "B2"))
        A = torch.einsum("...ri,...si->...rsi", A1, A2).flatten(-3, -2)
        return A, torch.einsum("...or,...os->...ors", B1, B2).flatten(-2)

    def restored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        raise AdapterError("LoHa cannot be told from the factors of its product")

    def __str__(self) -> str:
        return f"LoHa, {super().__str__()}"


class LoHaAdapter(DenseAdapter):
    """A1 and A2 (rank, in), B1 and B2 (out, rank); of a stack of n matrices each with n in front."""

    partners = (("A1", "B1", "A2", "B2"),)
    outward = ("B1", "B2")
    A1: Tensor
    B1: Tensor
    A2: Tensor
    B2: Tensor

    def shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        *stack, out, in_ = self.host.shape(layer, self.part)
        down, up = (*stack, self.spec.rank, in_), (*stack, out, self.spec.rank)
        return {"A1": down, "B1": up, "A2": down, "B2": up}

    def initialise(self) -> None:
        # As in PEFT: the rows of every factor uniform in ±1/√(their length), and one of the four zero.
        for factor in (self.A1, self.B1, self.B2):
            nn.init.kaiming_uniform_(factor.flatten(0, -2), a=5**0.5)
        nn.init.zeros_(self.A2)

    def product(self) -> Tensor:
        return self.scale * ((self.B1 @ self.A1) * (self.B2 @ self.A2))

    def at_start(self, layer: nn.Module) -> bool:
        return any(p.is_meta or not p.detach().any() for p in self.parameters())
