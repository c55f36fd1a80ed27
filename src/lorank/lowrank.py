"""Arithmetic on plain matrices: initialise, multiply out, stack into blocks and split again.

Shapes, everywhere in lorank: W, ΔW (out, in) · A (rank, in) · B (out, rank) · ΔW = scale · B @ A. A stack of matrices
has their number in front of each of these.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

INITIALISATIONS = ("kaiming", "gaussian")


def initialise(A: Tensor, B: Tensor, method: str, lookup: bool = False) -> None:
    """Fill A (..., rank, in) and B (..., out, rank) in place so that B @ A = 0.

    `kaiming` is what the authors' code does: A ~ U(±1/√in), B = 0. `gaussian` is the paper's section 4.1,
    which gives no standard deviation; 1/rank is the one PEFT takes. With `lookup` (an embedding, whose input
    is one-hot) the authors' code starts the other way round, A = 0 and B ~ N(0, 1): a row of A is only
    trained when its token occurs, so it is A that has to be the neutral one.
    """
    if lookup:
        nn.init.zeros_(A)
        nn.init.normal_(B)
        return
    if method == "kaiming":
        nn.init.kaiming_uniform_(A.flatten(0, -2), a=5**0.5)
    else:
        nn.init.normal_(A, std=1 / A.shape[-2])
    nn.init.zeros_(B)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtypes that are written, whatever autocast says outside; the meta device has none to say."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes that are written, whatever autocast or a TF32 switch says outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with without_autocast(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def delta(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ΔW = scale · B @ A, (out, in), formed in float32 (float64 when a factor is)."""
    with full_precision(A.device):
        return product(A, B, scale)


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return scale · B @ A, (out, in), in float32 or wider, in the precision that is set for matrix products."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with without_autocast(A.device):
        return scale * (B.to(dtype) @ A.to(dtype))


def stack_blocks(blocks: Sequence[tuple[Tensor, Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """Join updates of disjoint rows of one matrix into one exact low-rank update of all of it.

    `blocks` holds (A (r, in), B (rows_i, r), index (rows_i,)); returns A (Σr, in) and B (rows, Σr), where B is
    zero outside each block's own rows and columns.
    """
    A = torch.cat([a for a, _, _ in blocks])
    widest = functools.reduce(torch.promote_types, (b.dtype for _, b, _ in blocks))
    B = A.new_zeros(rows, A.shape[0], dtype=widest)
    column = 0
    for a, b, index in blocks:
        B[index, column : column + a.shape[0]] = b.to(widest)
        column += a.shape[0]
    return A, B


def split_blocks(A: Tensor, B: Tensor, indices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
    """Undo `stack_blocks` for blocks of equal rank; None when B is not exactly of that form."""
    rank, rest = divmod(A.shape[0], len(indices))
    if rest:
        return None
    outside = B.clone()
    blocks = []
    for i, index in enumerate(indices):
        columns = slice(i * rank, (i + 1) * rank)
        blocks.append((A[columns].clone(), B[index, columns].clone()))
        outside[index, columns] = 0
    return None if outside.any() else blocks
