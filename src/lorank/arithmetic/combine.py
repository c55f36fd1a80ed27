"""Combination of adapters: a weighted sum of their updates, exactly or in a lower rank, by TIES, or by DARE."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from ..errors import AdapterError, raise_problems
from ..formats.content import Content, LayerUpdate
from ..names import in_order, label_of
from ..variants import LoRA
from .factors import Factors, norm, require_rank_or_energy, stacked, trainable, truncated, truncated_dense
from .reports import Report, Row, enumerate_weights
from .sources import place_of, same_base_problems, take_about, take_base, take_whole, tied_of
from .sparse import combined_dense
from .updates import dtype_of, factors, most_common, rebuilt, require_sound

CombinationMethod = Literal["exact", "svd", "ties", "dare", "dare-ties"]
_USUAL_DENSITY = {"ties": "its paper keeps 0.2", "dare": "its paper keeps 0.1 to 0.5", "dare-ties": "0.5, say"}


def combine(
    contents: Mapping[str, tuple[Content, float]],
    *,
    method: CombinationMethod = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    whole: str | None = None,
    allow_other_base: bool = False,
) -> tuple[Content, Report]:
    """Return one adapter for several, {name: (adapter, weight)}, and a report with the error of every layer.

    method: "exact" is the sum of weight · ΔW, with A stacked and B side by side: ranks add up. "svd" is the same sum
        in the largest rank that the layer has in any of them. "ties", "dare" and "dare-ties" are as in `sparse.py`: on
        ΔW, which is formed layer by layer, and brought to a rank afterwards. A weight multiplies an update before
        any of this, so that a negative one votes for the opposite sign.
    rank: at most so many; what does not fit is lost, and reported. Without it, all of it with "exact", and the
        largest rank of the layer's adapters with the others.
    density: the share of numbers that "ties" keeps, or with which probability "dare" keeps each.
    seed: of what "dare" drops.
    whole: the adapter whose modules, biases and rows of tokens that were trained whole are taken where adapters
        have different ones; these are values, not updates. Without it, that is an error.
    allow_other_base: combine adapters although they were trained on different weights.

    A layer that only some of the adapters have is combined from these. Raises AdapterError, which lists all that is
    wrong: different bases, layers of different shapes, methods without a low-rank form.
    """
    require_options(contents, method, rank, density, whole)
    adapters = {name: content for name, (content, _) in contents.items()}
    weights = {name: float(weight) for name, (_, weight) in contents.items()}
    for name, content in adapters.items():
        require_sound(content, "cannot combine", name)
    problems = same_base_problems(adapters, allow_other_base)
    result = Content(LoRA())
    result.tied = tied_of(adapters, problems)
    places, updates = _places(adapters, problems)
    take_base(result, adapters, problems)
    notes = take_about(result, adapters, whole)
    notes += take_whole(result, adapters, weights, whole, problems)
    rows = []
    for layer, place in places.items():
        made: dict[str, Factors] = {}
        for part in dict.fromkeys(part for update in updates[layer].values() for part in update.tensors):
            pieces = _pieces(layer, part, updates[layer], weights, problems)
            if not problems:  # else there is nothing to do but to find the others
                made[part], row = _combined(pieces, label_of(layer, part), place.lookup, method, rank, density, seed)
                rows.append(row)
        if not problems:
            result.updates[layer] = rebuilt(place, made, dtype_of(*updates[layer].values()))
    raise_problems("cannot combine", problems)
    result.spec = most_common(result)
    if result.biases:
        result.bias = "adapted" if result.biases.keys() <= result.updates.keys() else "all"
    how = {"exact": "exactly", "svd": "by SVD"}.get(method, f"by {method.upper()}, density {density}")
    result.remarks = [f"{name}: {remark}" for name, content in adapters.items() for remark in content.remarks]
    title = f"combined {enumerate_weights(list(weights.items()))} {'by SVD' if rank and method == 'exact' else how}"
    return result, Report(title, tuple(rows), tuple(notes))


def require_options(
    contents: Mapping[str, tuple[object, float]], method: str, rank: int | None, density: float | None, whole: object
) -> None:
    """Raise AdapterError, which lists what is wrong with the arguments of `combine`."""
    problems = [] if contents else ["there is no adapter"]
    for name, (_, weight) in contents.items():
        usable = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight
        if not usable:
            problems.append(f"the weight of {name} is {weight!r}; it must be a finite number other than 0")
    if method not in get_args(CombinationMethod):
        problems.append(f"method is {method!r}; it must be one of {', '.join(get_args(CombinationMethod))}")
    elif method in _USUAL_DENSITY and not (isinstance(density, int | float) and 0 < density <= 1):
        problems.append(
            f"density is {density!r}; {method} needs the share of numbers to keep, above 0 and up to 1 "
            f"({_USUAL_DENSITY[method]})"
        )
    elif method not in _USUAL_DENSITY and density is not None:
        problems.append(f"density is {density!r}, and {method} leaves out no numbers")
    if rank is not None:
        try:
            require_rank_or_energy(rank, None)
        except AdapterError as error:
            problems.append(str(error))
    if whole is not None and whole not in contents:
        problems.append(f"whole is {whole!r}, which is none of {', '.join(contents)}")
    raise_problems("cannot combine", problems)


def _places(
    adapters: Mapping[str, Content], problems: list[str]
) -> tuple[dict[str, LayerUpdate], dict[str, dict[str, LayerUpdate]]]:
    """Return, by layer, an update without tensors, and the updates of all adapters that change it, with equal parts."""
    places: dict[str, LayerUpdate] = {}
    found: dict[str, dict[str, LayerUpdate]] = {}
    for layer in in_order(layer for content in adapters.values() for layer in content.updates):
        having = {name: content.updates[layer] for name, content in adapters.items() if layer in content.updates}
        try:
            places[layer], found[layer] = place_of(layer, having)
        except AdapterError as error:
            problems.append(str(error))
    return places, found


def _pieces(
    layer: str, part: str, updates: Mapping[str, LayerUpdate], weights: Mapping[str, float], problems: list[str]
) -> list[Factors]:
    """Return the factors of each adapter's weighted update of a part, of which both take half of the weight."""
    pieces: dict[str, Factors] = {}
    for name, update in updates.items():
        if part not in update.tensors:
            continue
        try:
            A, B = factors(layer, part, update)
        except AdapterError as error:
            problems.append(f"{name}: {error}")
            continue
        size = abs(weights[name]) ** 0.5
        pieces[name] = A * size, B * math.copysign(size, weights[name])
    shapes = {name: (*B.shape[:-1], A.shape[-1]) for name, (A, B) in pieces.items()}
    for name, shape in shapes.items():
        first, expected = next(iter(shapes.items()))
        if shape != expected:
            problems.append(f"{label_of(layer, part)}: ΔW is {expected} in {first}, and {shape} in {name}")
    return list(pieces.values())


def _combined(
    pieces: list[Factors], label: str, lookup: bool, method: str, rank: int | None, density: float | None, seed: int
) -> tuple[Factors, Row]:
    """Return the factors of a combination, and what they lack of it."""
    largest = max(A.shape[-2] for A, _ in pieces)
    if method in ("exact", "svd"):
        A, B = stacked(pieces)
        wanted = rank if rank is not None else largest if method == "svd" else A.shape[-2]
        if wanted >= A.shape[-2]:
            return (A, B), Row(label, A.shape[-2], norm(A, B), 0.0)
        found = truncated(A, B, wanted)
    else:
        assert density is not None, "required above"
        # In float32: an embedding's ΔW has as many numbers as the embedding.
        updates = [(B @ A).to(torch.float32) for A, B in pieces]
        found = truncated_dense(combined_dense(updates, method, density, seed, label), rank or largest)
    return trainable(found.A, found.B, found.rank, label, lookup), Row(label, found.rank, found.norm, found.error)
