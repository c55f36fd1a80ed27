"""Resizing: the same update with another rank, as well as that rank can hold it."""

import zlib

import torch

from ..errors import AdapterError
from ..formats.content import Content
from .factors import Factors, require_rank_or_energy, truncated
from .reports import Report, Row
from .updates import all_factors, dtype_of, label_of, rebuilt, require_sound, with_updates


def resize(content: Content, rank: int | None = None, *, energy: float | None = None) -> tuple[Content, Report]:
    """Return an adapter whose updates have another rank, and the error of each.

    rank: of every layer. A lower one keeps the directions with the largest singular values: there is no better
        approximation (Eckart and Young 1936). A higher one is exact; the new rows of A are random, the new columns
        of B zero, as of a new adapter, so that they train.
    energy: instead, the share of the squared singular values that every layer keeps, with the lowest rank that
        does: 0.95 is a relative error of at most √0.05 = 22 %.

    What was trained beside the updates stays as it is. Raises AdapterError for methods that have no low-rank form
    apart from their base, with the layer's name.
    """
    require_sound(content, "cannot resize")
    require_rank_or_energy(rank, energy)
    if not content.updates:
        raise AdapterError("cannot resize: it has no low-rank update")
    made: dict[str, dict[str, Factors]] = {}
    rows = []
    for layer, part, update, (A, B) in all_factors(content, "cannot resize"):
        found = truncated(A, B, rank, energy)
        pair = found.A, found.B
        if rank is not None and found.rank < rank:
            seed = zlib.crc32(label_of(layer, part).encode())  # the same file every time
            pair = _widened(*pair, rank, update.lookup, torch.Generator().manual_seed(seed))
        made.setdefault(layer, {})[part] = pair
        rows.append(Row(label_of(layer, part), pair[0].shape[-2], found.norm, found.error))
    updates = {layer: rebuilt(content.updates[layer], made[layer], dtype_of(content.updates[layer])) for layer in made}
    title = f"resized to rank {rank}" if rank is not None else f"resized to {energy:.6g} of the energy"
    return with_updates(content, updates), Report(title, tuple(rows))


def _widened(A: torch.Tensor, B: torch.Tensor, rank: int, lookup: bool, generator: torch.Generator) -> Factors:
    """Return factors of a higher rank with the same product.

    One side is zero, and the other is not: of a new adapter's two sides, the one that starts at random.
    """
    missing = rank - A.shape[-2]
    below, beside = (*A.shape[:-2], missing, A.shape[-1]), (*B.shape[:-1], missing)
    if lookup:
        return torch.cat([A, A.new_zeros(below)], dim=-2), torch.cat([B, _random(beside, B, 1.0, generator)], dim=-1)
    size = (1 / A.shape[-1]) ** 0.5
    return torch.cat([A, _random(below, A, size, generator)], dim=-2), torch.cat([B, B.new_zeros(beside)], dim=-1)


def _random(shape: tuple[int, ...], like: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    return (2 * torch.rand(shape, generator=generator, dtype=like.dtype) - 1).mul(size).to(like.device)
