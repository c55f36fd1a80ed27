"""Factors of a matrix that is read with other sizes.

loralib's convolution computes (B A).view(weight.shape) with factors that are cut to r · kernel and in · kernel, so that
the rows of B A are not the outputs. Ours has a row for each output. One is the other exactly, at a higher rank.
"""

import math

import torch
from torch import Tensor


def reshaped(A: Tensor, B: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return factors A' and B' of B A with its numbers in rows of another length: B' A' = (B A).view(rows, columns).

    A (r, in) and B (out, r) become A' (n · r, columns) and B' (rows, n · r): every product B' A' is one of B A with
    zeros added. n is the product of the two lengths, each over their greatest common divisor. Factors that came out of
    this function go back to what they were.
    """
    smaller = _restored(A, B, columns)
    return smaller if smaller is not None else _spread(A, B, columns)


def blocks(before: int, after: int) -> int:
    """Return by what `reshaped` multiplies the rank when rows of one length become rows of another."""
    common = math.gcd(before, after)
    return before // common * (after // common)


def _spread(A: Tensor, B: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return A' and B' with a block of r rows for each place of a piece in the old rows and in the new ones."""
    rank, before = A.shape
    size = math.gcd(before, columns)  # of the pieces of which both old and new rows consist
    old, new = before // size, columns // size
    pieces = A.unflatten(1, (old, size))  # (r, old, size)
    wide = A.new_zeros(new, old, rank, new, size)
    for place in range(new):
        wide[place, :, :, place] = pieces.transpose(0, 1)
    # Pieces are numbered through the whole matrix: a piece has a row and a place before, and others after.
    number = torch.arange(B.shape[0] * old, device="cpu")
    tall = B.new_zeros(B.shape[0] * old // new, new, old, rank)
    tall[number // new, number % new, number % old] = B[number // old]
    return wide.flatten(3).flatten(0, 2), tall.flatten(1)


def _restored(A: Tensor, B: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Return the factors that `_spread` made these of; None when it did not."""
    size = math.gcd(A.shape[1], columns)
    old, new = A.shape[1] // size, columns // size
    rank, more = divmod(A.shape[0], old * new)
    if old * new == 1 or more or not rank:
        return None
    pieces = A.view(old, new, rank, old, size)[0, :, :, 0]  # (new, r, size)
    first = torch.arange(B.shape[0] * old // new, device="cpu") * new  # the first piece of every row there was
    smaller = (
        pieces.transpose(0, 1).flatten(1).contiguous(),
        B.view(B.shape[0], old, new, rank)[first // old, first % old, 0].contiguous(),
    )
    again = _spread(*smaller, A.shape[1])
    return smaller if torch.equal(again[0], A) and torch.equal(again[1], B) else None
