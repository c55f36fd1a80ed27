"""The difference of two adapters: how large their updates are, how far apart, and in which directions."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, raise_problems
from ..formats.content import Content, LayerUpdate
from ..names import in_order, label_of
from .factors import Factors, directions_of_rows, inner, norm, similarity, singular, stacked
from .sources import place_of, same_base_problems, trained_whole
from .updates import factors, require_sound


@dataclass(frozen=True)
class DiffRow:
    """Two updates of one matrix. What an adapter does not have is None; of a stack, the similarities are means."""

    label: str
    ranks: tuple[int | None, int | None]
    norms: tuple[float, float]  # Frobenius norms of ΔW; 0 where an adapter leaves the layer alone
    distance: float  # Frobenius norm of the difference
    cosine: float | None  # of the two ΔW as vectors
    # φ(i, i) of the paper's section 7.2 at i = the smaller rank, from 0 (orthogonal) to 1 (the same directions):
    of_A: float | None  # of the right-singular vectors of the factors A, as in the paper's figure 3
    of_inputs: float | None  # of those of ΔW
    of_outputs: float | None  # of the left-singular vectors of ΔW


@dataclass(frozen=True)
class Difference:
    """How two adapters differ, layer by layer."""

    rows: tuple[DiffRow, ...]
    whole: dict[str, float | None]  # what was trained whole and differs: largest difference, None where one has it not
    notes: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[float, float]:
        """The norms of all ΔW together."""
        first, second = (sum(row.norms[i] ** 2 for row in self.rows) ** 0.5 for i in (0, 1))
        return first, second

    @property
    def distance(self) -> float:
        """The norm of the difference of all ΔW together."""
        return sum(row.distance**2 for row in self.rows) ** 0.5

    @property
    def cosine(self) -> float | None:
        """The cosine of all ΔW together as two vectors; None where one is zero."""
        product = sum((row.cosine or 0.0) * row.norms[0] * row.norms[1] for row in self.rows)
        first, second = self.norms
        return product / (first * second) if first and second else None

    def to_json(self) -> dict[str, Any]:
        return {
            "norms": list(self.norms),
            "distance": self.distance,
            "cosine": self.cosine,
            "layers": [asdict(row) for row in self.rows],
            "trained_whole": self.whole,
            "notes": list(self.notes),
        }


def diff(first: Content, second: Content) -> Difference:
    """Return how two adapters differ: norms, distance, cosine and similarity of subspaces of every layer.

    All of it comes from the factors. Where adapters seem to have different bases, that is a note. Raises AdapterError
    for methods that have no low-rank form apart from their base, with the layer's name, and for layers whose shapes
    differ.
    """
    both = {"the first": first, "the second": second}
    for content in both.values():
        require_sound(content, "cannot compare")
    problems: list[str] = []
    rows = []
    for layer in in_order([*first.updates, *second.updates]):
        having = {name: content.updates[layer] for name, content in both.items() if layer in content.updates}
        try:
            _, having = place_of(layer, having)  # with the same parts
        except AdapterError as error:
            problems.append(str(error))
            continue
        for part in dict.fromkeys(part for update in having.values() for part in update.tensors):
            try:
                rows.append(_row(layer, part, *(having.get(name) for name in both)))
            except AdapterError as error:
                problems.append(str(error))
    raise_problems("cannot compare", list(dict.fromkeys(problems)))
    notes = [text.partition("; pass ")[0] for text in same_base_problems(both, False)]
    return Difference(tuple(rows), _differing_whole(first, second), tuple(notes))


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return φ(i, j) of the paper's section 7.2 for two factors A (r, in), as a matrix (r₁, r₂).

    At [i−1, j−1] stands how much of the space of the first i right-singular vectors of one lies in that of the first j
    of the other: ‖U₁^{i}ᵀ U₂^{j}‖² / min(i, j), from 0 to 1. Pass Bᵀ for the output side. Directions that are
    rounding are left out.
    """
    return similarity(directions_of_rows(first.detach().double()), directions_of_rows(second.detach().double()))


def _row(layer: str, part: str, first: LayerUpdate | None, second: LayerUpdate | None) -> DiffRow:
    label = label_of(layer, part)
    a = factors(layer, part, first) if first is not None and part in first.tensors else None
    b = factors(layer, part, second) if second is not None and part in second.tensors else None
    ranks = (a[0].shape[-2] if a is not None else None, b[0].shape[-2] if b is not None else None)
    norms = (norm(*a) if a is not None else 0.0, norm(*b) if b is not None else 0.0)
    if a is None or b is None:
        return DiffRow(label, ranks, norms, max(norms), None, None, None, None)
    shapes = [(*B.shape[:-1], A.shape[-1]) for A, B in (a, b)]
    if shapes[0] != shapes[1]:
        raise AdapterError(f"{label}: ΔW is {shapes[0]} in one adapter, and {shapes[1]} in the other")
    distance = norm(*stacked([a, (b[0], -b[1])]))
    cosine = inner(a, b) / (norms[0] * norms[1]) if norms[0] and norms[1] else None
    return DiffRow(label, ranks, norms, distance, cosine, *_similarities(a, b))


def _similarities(a: Factors, b: Factors) -> list[float | None]:
    """Return φ(i, i) at the smaller rank for the factors A, and for the right and left directions of ΔW."""
    (A1, B1), (A2, B2) = a, b
    found: list[list[float]] = [[], [], []]
    for matrices in zip(*(M.reshape(-1, *M.shape[-2:]) for M in (A1, B1, A2, B2)), strict=True):
        one, other = _directions(*matrices[:2]), _directions(*matrices[2:])
        for values, U1, U2 in zip(found, one, other, strict=True):
            smaller = min(U1.shape[1], U2.shape[1])
            if smaller:
                values.append(float(similarity(U1[:, :smaller], U2[:, :smaller])[-1, -1]))
    return [sum(values) / len(values) if values else None for values in found]


def _directions(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the right-singular vectors of A, and the right and left ones of ΔW, without those that are rounding."""
    U, S, V = singular(A, B)
    kept = 1e-7 * S.max() < S
    return directions_of_rows(A), V[:, kept], U[:, kept]


def _differing_whole(first: Content, second: Content) -> dict[str, float | None]:
    one, other = trained_whole(first), trained_whole(second)
    found: dict[str, float | None] = {}
    for key in dict.fromkeys([*one, *other]):
        name = {"copy": "{}", "bias": "{}.bias", "token": "{} (token {})"}[key[0]].format(*key[1:])
        if key not in one or key not in other or one[key].keys() != other[key].keys():
            found[name] = None
            continue
        pairs = [(tensor, other[key][inside]) for inside, tensor in one[key].items()]
        if any(x.shape != y.shape for x, y in pairs):
            found[name] = None
            continue
        gap = max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)
        if gap or any(not torch.equal(x, y) for x, y in pairs):
            found[name] = gap
    return found
