"""TIES and DARE: combinations of updates of which most numbers are left out. They work on ΔW itself.

TIES (Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4.2): of each ΔW the
largest numbers stay (trim), each place gets the sign of the sum of what stays there (elect), and the mean of what
stays with that sign (disjoint merge). DARE (Yu et al. 2023, "Language Models are Super Mario", section 3.1): numbers
are dropped at random, and the others divided by the probability of staying.

Both are about the numbers of ΔW. On the factors A and B, where PEFT's `ties` and `dare_linear` apply them, the result
is no sparse or sign-consistent ΔW: B A mixes all numbers again. What the papers say of whole models is done here for
each matrix: the largest numbers are those of the matrix.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def trimmed(W: Tensor, density: float) -> Tensor:
    """Return W (..., out, in) with its largest numbers, so large a share of those of each matrix, and zeros."""
    flat = W.flatten(-2)  # (..., out · in)
    kept = round(density * flat.shape[-1])
    if kept >= flat.shape[-1]:
        return W
    index = flat.abs().topk(kept, sorted=False).indices
    return torch.zeros_like(flat).scatter_(-1, index, flat.gather(-1, index)).view_as(W)


def dropped(W: Tensor, density: float, seed: int, label: str) -> Tensor:
    """Return W with each number kept with a probability and divided by it; the label is of the matrix and adapter."""
    # A generator of its own for every matrix, so that what is dropped in one does not depend on which others there are.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}".encode()))
    kept = torch.rand(W.shape, generator=generator, dtype=torch.float32) < density
    return W * kept.to(W.device) / density


def elected(updates: Sequence[Tensor]) -> Tensor:
    """Return, at each place, the mean of the numbers that have the sign of the sum of all there."""
    sign = torch.stack([W.sign() for W in updates])
    chosen = torch.stack(list(updates)).sum(dim=0).sign()
    agreeing = (sign == chosen) & (chosen != 0)
    total = sum((W * agrees for W, agrees in zip(updates, agreeing, strict=True)), torch.zeros_like(updates[0]))
    return total / agreeing.sum(dim=0).clamp(min=1)


def combined_dense(updates: Sequence[Tensor], method: str, density: float, seed: int, label: str) -> Tensor:
    """Return the combination of weighted updates ΔW by `ties`, `dare` or `dare-ties` (dropped, then elected)."""
    if method == "ties":
        return elected([trimmed(W, density) for W in updates])
    thinned = [dropped(W, density, seed, f"{label}/{i}") for i, W in enumerate(updates)]
    return elected(thinned) if method == "dare-ties" else torch.stack(thinned).sum(dim=0)
