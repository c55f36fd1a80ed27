"""LoKr: ΔW = scale · C ⊗ D, the Kronecker product of two small matrices, each of which may be low-rank.

(Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter"; LyCORIS has it as LoKr, Yeh et al.
2023, section 3.) With out = out₁ · out₂ and in = in₁ · in₂, C is (out₁, in₁) and D (out₂, in₂). The divisors are those
nearest to the root, the smaller first, or those of `factor`; of a convolution in is that of the channels, and D has the
kernel too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..hosts import ConvHost, Host
from .base import number_problems, register
from .dense import DenseAdapter
from .lora import LowRank


@register("lokr")
@dataclass(frozen=True)
class LoKr(LowRank):
    """An update that is the Kronecker product of two matrices.

    rank: of the factors' own factors: C = C_B C_A, D = D_B D_A. Where it is at least half of a factor's larger side
        the factor is a matrix of its own, as C is unless `decompose_both`.
    alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    factor: about how large C is; -1 for about the root of the sides.
    decompose_both: C may be low-rank too.
    """

    bounded = False

    factor: int = -1
    decompose_both: bool = False

    def problems(self) -> list[str]:
        wrong = super().problems() + number_problems(self, decompose_both="flag")
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or (self.factor < 1 and self.factor != -1):
            wrong.append(f"factor is {self.factor!r}; it must be a whole number of at least 1, or -1")
        return wrong

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        return "LoKr would form the whole update of an embedding for every lookup" if host.lookup else None

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "LoKrAdapter":
        return LoKrAdapter(self, host, layer, part, device)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        C, D = factors(tensors)
        if "DA" in tensors:  # C ⊗ D_B D_A = (C ⊗ D_B)(1 ⊗ D_A)
            A, B = _kron(_eye_like(C, C.shape[-1]), tensors["DA"]), _kron(C, tensors["DB"])
        else:
            W = _kron(C, D)
            out, in_ = W.shape[-2:]
            A, B = (_eye_like(C, in_), W) if in_ < out else (W, _eye_like(C, out))
        return A, B

    def restored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        raise AdapterError("LoKr cannot be told from the factors of its product")

    def __str__(self) -> str:
        return f"LoKr, {super().__str__()}"


class LoKrAdapter(DenseAdapter):
    """C (out₁, in₁), or CA (rank, in₁) and CB (out₁, rank); D (out₂, in₂ · kernel), or DA and DB likewise."""

    outward = ("CB", "DB")  # a factor that is a matrix of its own is on both sides

    def shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        spec = self.spec
        *stack, out, in_ = self.host.shape(layer, self.part)
        kernel = self.host.own(layer, self.part).shape[2:].numel() if isinstance(self.host, ConvHost) else 1
        (out1, out2), (in1, in2) = divided(out, spec.factor), divided(in_ // kernel, spec.factor)
        found: dict[str, tuple[int, ...]] = {}
        for name, rows, columns, wide, may_split in (
            ("C", out1, in1, in1, spec.decompose_both),
            ("D", out2, in2 * kernel, in2, True),
        ):
            if may_split and spec.rank < max(rows, wide) / 2:
                found |= {f"{name}A": (*stack, spec.rank, columns), f"{name}B": (*stack, rows, spec.rank)}
            else:
                found[name] = (*stack, rows, columns)
        return found

    @property
    def partners(self) -> tuple[tuple[str, ...], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (tuple(self._parameters),)

    def initialise(self) -> None:
        # As in PEFT: C, or the one of its factors that comes last, starts at zero.
        for name, parameter in self.named_parameters():
            if name in ("C", "CB"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter.flatten(0, -2), a=5**0.5)

    def product(self) -> Tensor:
        return self.scale * _kron(*factors(self.tensors()))

    def at_start(self, layer: nn.Module) -> bool:
        return any(p.is_meta or not p.detach().any() for p in self.parameters())


def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return C and D of an adapter's tensors."""
    C, D = (tensors[n] if n in tensors else tensors[f"{n}B"] @ tensors[f"{n}A"] for n in ("C", "D"))
    return C, D


def divided(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers with the product `size`: `factor` and the other where it divides, else the smaller first.

    The smaller is the largest divisor that is at most `factor`, or the root of the size; so PEFT and LyCORIS choose.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = int(size**0.5) if factor == -1 else min(factor, int(size**0.5))
    small = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return small, size // small


def _kron(C: Tensor, D: Tensor) -> Tensor:
    """Return C ⊗ D of matrices, or of each pair of two stacks of them."""
    return torch.einsum("...ij,...kl->...ikjl", C, D).flatten(-4, -3).flatten(-2)


def _eye_like(C: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=C.dtype, device=C.device).expand(*C.shape[:-2], size, size)
