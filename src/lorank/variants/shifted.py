"""What methods have in common that start LoRA from other factors than zero: ΔW = scale · (B A − B₀ A₀).

Their papers take scale · B₀ A₀ out of the base, W − scale · B₀ A₀, so that the model starts as it was. Here the base
stays as it is, and the update takes it away: the same W + ΔW, with adapters that can be switched and files that fit
anybody's copy of the base. As a file for others the update is LoRA of twice the rank: A over A₀, and B beside −B₀.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..hosts import Host
from ..lowrank import full_precision
from .lora import LoRAAdapter, LowRank


@dataclass(frozen=True)
class Shifted(LowRank):
    """LoRA that starts from factors B₀ A₀ of its own choice, with the base untouched."""

    @property
    def factor_rank(self) -> int:
        return 2 * self.rank

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        A = torch.cat([tensors["A"], tensors["A0"]], dim=-2)
        return A, torch.cat([tensors["B"], -tensors["B0"]], dim=-1)

    def restored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if A.shape[-2] != self.factor_rank or B.shape[-1] != self.factor_rank:
            raise AdapterError(f"{type(self).__name__} of rank {self.rank} has factors of rank {self.factor_rank}")
        A, A0 = A.split(self.rank, dim=-2)
        B, B0 = B.split(self.rank, dim=-1)
        return {"A": A.clone(), "B": B.clone(), "A0": A0.clone(), "B0": -B0}

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        limit = min(host.shape(layer, part)[-2:])
        if self.rank > limit:
            return f"{type(self).__name__} takes rank {self.rank} out of its matrix, which has {limit}"
        return None

    @abstractmethod
    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return A₀ (..., rank, in) and B₀ (..., out, rank) for a matrix W (..., out, in) in float32 or float64."""

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "ShiftedAdapter":
        return ShiftedAdapter(self, host, layer, part, device)

    def __str__(self) -> str:
        return f"{self.variant}, {super().__str__()}"


class ShiftedAdapter(LoRAAdapter):
    """A and B as LoRA has them, and A0 and B0, where they started."""

    spec: Shifted  # pyright: ignore[reportIncompatibleVariableOverride]
    partners = ()  # none of the factors is zero
    A0: Tensor
    B0: Tensor

    def add_tensors(self) -> None:
        self.register_buffer("A0", torch.empty_like(self.A))
        self.register_buffer("B0", torch.empty_like(self.B))

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        W = self.host.matrix(layer, self.part)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        with full_precision(W.device):
            self.start_from(*self.spec.start(W))

    def rebase(self, layer: nn.Module) -> None:
        self.reset_parameters(layer)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Take factors for the start, in which the update is zero."""
        for name, start in (("A", A), ("B", B)):
            own = self._parameters[name]
            assert own is not None, "both are there"
            values = start.to(own.dtype).clone(memory_format=torch.contiguous_format)
            if own.is_meta:
                self._parameters[name] = nn.Parameter(values.clone())
            else:
                own.copy_(values)  # an optimiser may have it already
            self._buffers[f"{name}0"] = values

    def pair(self) -> tuple[Tensor, Tensor]:
        # (B − B₀) A + B₀ (A − A₀): at the start of zeros, with no large numbers after.
        return torch.cat([self.A, self.A - self.A0], dim=-2), torch.cat([self.B - self.B0, self.B0], dim=-1)

    def at_start(self, layer: nn.Module) -> bool:
        return self.A.is_meta or (torch.equal(self.A, self.A0) and torch.equal(self.B, self.B0))

    def largest_change(self) -> None:
        return None


def balanced(U: Tensor, S: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B with scale · B A = U S Vᵀ, each with the root of the singular values.

    U (..., out, rank), S (..., rank), V (..., rank, in). Of a negative scale A has the sign.
    """
    root = (S / abs(scale)).sqrt()
    A = root[..., :, None] * V
    return (A if scale > 0 else -A), U * root[..., None, :]
