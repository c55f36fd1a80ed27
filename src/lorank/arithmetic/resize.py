"""Resizing: the same update with another rank, as well as that rank can hold it."""

from ..errors import AdapterError
from ..formats.content import Content
from ..names import label_of
from .factors import Factors, require_rank_or_energy, trainable, truncated
from .reports import Report, Row
from .updates import all_pairs, dtype_of, rebuilt, require_sound, unscaled, with_updates


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
    for layer, part, update, pair in all_pairs(content, "cannot resize"):
        label = label_of(layer, part)
        found = truncated(*unscaled(pair, update.spec_of(part).scale), rank, energy)
        wanted = found.rank if rank is None else rank
        made.setdefault(layer, {})[part] = trainable(found.A, found.B, wanted, label, update.lookup)
        rows.append(Row(label, wanted, found.norm, found.error))
    updates = {layer: rebuilt(content.updates[layer], made[layer], dtype_of(content.updates[layer])) for layer in made}
    title = f"resized to rank {rank}" if rank is not None else f"resized to {energy:.6g} of the energy"
    return with_updates(content, updates), Report(title, tuple(rows))
