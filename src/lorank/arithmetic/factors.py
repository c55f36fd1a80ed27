"""Updates ΔW = B A by their factors: norms, products, singular values and truncation, without forming ΔW.

Shapes as in `lorank.lowrank`, A (r, in) and B (out, r), or with the number of matrices of a stack in front. Where
ΔW is not needed, the cost is that of matrices with r columns: a QR decomposition of each factor leaves all that
matters in a core of r × r numbers. Everything is computed in float64.
"""

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError

Factors = tuple[Tensor, Tensor]  # A (..., r, in), B (..., out, r), with ΔW = B A

# Singular values below this share of what the factors could make are rounding: nothing of ΔW is in them.
_ROUNDING = 1e-13
_ROUNDING_OF_DENSE = 1e-13  # likewise, of the squares of those that a Gram matrix gives


@dataclass(frozen=True)
class Truncated:
    """The nearest update of a lower rank (Eckart and Young 1936), with its factors balanced."""

    A: Tensor  # (..., rank, in)
    B: Tensor  # (..., out, rank)
    norm: float  # Frobenius norm of ΔW before; of a stack, of all its matrices together
    error: float  # Frobenius norm of what was lost, over `norm`; 0 where there was nothing to lose

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def require_rank_or_energy(rank: int | None, energy: float | None) -> None:
    """Raise AdapterError unless exactly one of a rank and a share of energy is given, and makes sense."""
    if (rank is None) == (energy is None):
        raise AdapterError("give either a rank, or the share of energy to keep")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank is {rank!r}; it must be a whole number of at least 1")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r}; it must be a share above 0, up to 1")


def stacked(pieces: list[Factors]) -> Factors:
    """Return the factors of a sum of updates: each A below the one before, each B beside it."""
    return torch.cat([A for A, _ in pieces], dim=-2), torch.cat([B for _, B in pieces], dim=-1)


def trainable(A: Tensor, B: Tensor, rank: int, label: str, lookup: bool = False) -> Factors:
    """Return factors of a rank, at least their own, with the same product, of which every direction can train.

    Where a row of A and its column of B are both zero, neither would ever get a gradient. Of these one side becomes
    random: that of a new adapter's two sides which starts so. It depends on the label alone: the same file every time.
    """
    missing = rank - A.shape[-2]
    A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    dead = ~(A.any(dim=-1) | B.any(dim=-2))  # (..., rank)
    generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
    side = B if lookup else A
    fresh = (2 * torch.rand(side.shape, generator=generator, dtype=side.dtype) - 1).to(side.device)
    if lookup:
        return A, torch.where(dead[..., None, :], fresh, B)
    return torch.where(dead[..., None], fresh / A.shape[-1] ** 0.5, A), B


def inner(first: Factors, second: Factors) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩, the sum of the products of their numbers."""
    (A1, B1), (A2, B2) = first, second
    return float(((B1.mT @ B2) * (A1 @ A2.mT)).sum())


def core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_B, C and Q_A with B A = Q_B C Q_Aᵀ, where the columns of Q_A and Q_B are orthonormal."""
    Q_A, R_A = torch.linalg.qr(A.mT)
    Q_B, R_B = torch.linalg.qr(B)
    return Q_B, R_B @ R_A.mT, Q_A


def norm(A: Tensor, B: Tensor) -> float:
    """Return the Frobenius norm of B A. A difference of nearly equal updates keeps its digits."""
    return float(torch.linalg.vector_norm(core(A, B)[1]))


def singular(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (..., out, k), S (..., k) and V (..., in, k) with B A = U diag(S) Vᵀ; what is rounding in S is 0."""
    Q_B, C, Q_A = core(A, B)
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    floor = _ROUNDING * torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B)
    return Q_B @ U, S.where(floor[..., None] < S, 0.0), Q_A @ Vh.mT


def truncated(A: Tensor, B: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the best approximation of B A of a rank, or of the lowest rank that keeps a share of its energy.

    Energy is the sum of the squares of the singular values: a share e of it is a relative error of √(1 − e). All
    matrices of a stack get one rank, and the share is that of all of them together.
    """
    U, S, V = singular(A, B)
    chosen = _chosen(S.square(), rank, energy)
    root = S[..., :chosen].sqrt()
    made = V[..., :chosen].mT * root[..., None], U[..., :chosen] * root[..., None, :]
    return Truncated(*made, float(S.norm()), _lost(S.square(), chosen))


def truncated_dense(W: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the best approximation of a dense ΔW (..., out, in) of a rank, or of a share of its energy.

    By the eigenvectors of the smaller of W Wᵀ and Wᵀ W, several times faster than an SVD of W. In float64 this tells
    singular values apart down to a share of 1e-7 of the largest.
    """
    wide = W.shape[-2] <= W.shape[-1]
    M = W.double() if wide else W.double().mT  # (..., short, long)
    squares, vectors = torch.linalg.eigh(M @ M.mT)
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
    squares = squares.where(squares > _ROUNDING_OF_DENSE * squares.max(), 0.0)
    chosen = _chosen(squares, rank, energy)
    short = vectors[..., :chosen]  # (..., short, rank)
    long = short.mT @ M  # (..., rank, long): singular values times the other side's directions
    sizes = torch.linalg.vector_norm(long, dim=-1)
    root = torch.where(squares[..., :chosen] > 0, sizes, 0.0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    first, second = short * root[..., None, :], long * inverse[..., None]  # (..., short, rank), (..., rank, long)
    A, B = (second, first) if wide else (first.mT, second.mT)
    return Truncated(A, B, float(squares.sum().sqrt()), _lost(squares, chosen))


def _chosen(squares: Tensor, rank: int | None, energy: float | None) -> int:
    """Return the rank to keep of squared singular values (..., k), which fall along the last dimension."""
    if rank is not None:
        return min(rank, squares.shape[-1])
    assert energy is not None, "one of the two is given"
    of_rank = squares.reshape(-1, squares.shape[-1]).sum(dim=0).cumsum(dim=0)
    wanted = energy * float(of_rank[-1]) * (1 - 1e-12)  # or rounding would ask for one more
    return max(int((of_rank < wanted).sum()) + 1, 1) if float(of_rank[-1]) else 1


def _lost(squares: Tensor, rank: int) -> float:
    total = float(squares.sum())
    return (float(squares[..., rank:].sum()) / total) ** 0.5 if total else 0.0


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return φ(i, j) of the paper's section 7.2 for the directions of two adapters, as a matrix (k₁, k₂).

    first, second: orthonormal columns (n, k), the most important first. The number at [i−1, j−1] is
    ‖U₁^{i}ᵀ U₂^{j}‖² / min(i, j): from 0, where the space of the first i directions of one is orthogonal to that of
    the first j of the other, to 1, where one lies in the other.
    """
    squares = (first.mT @ second).square()
    i, j = (torch.arange(1, n + 1, dtype=squares.dtype, device=squares.device) for n in squares.shape[-2:])
    return squares.cumsum(dim=-2).cumsum(dim=-1) / torch.minimum(i[:, None], j[None, :])


def directions_of_rows(A: Tensor) -> Tensor:
    """Return the right-singular vectors of A (r, in) as columns (in, k), of which none is rounding."""
    Q, R = torch.linalg.qr(A.mT)
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    return (Q @ U)[:, _ROUNDING * S.max() < S] if float(S.max()) else Q[:, :0]
