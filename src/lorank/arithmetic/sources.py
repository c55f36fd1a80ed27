"""Several adapters that are to become one: whether they go together, and what they have beside their updates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, enumerate_names
from ..fingerprint import Comparison, compare_fingerprints
from ..formats.content import Content, LayerUpdate
from ..formats.pairs import pair_of
from ..hosts import FusedHost
from ..names import label_of
from .updates import plain_spec

Contents = Mapping[str, Content]


def same_base_problems(contents: Contents, allow_other_base: bool) -> list[str]:
    """Return why adapters cannot be told to have one base: by the fingerprints of the layers they share, or by name."""
    if allow_other_base:
        return []
    problems, named = [], list(contents.items())
    for i, (name, content) in enumerate(named):
        for other, second in named[i + 1 :]:
            compared = _compared(content, second)
            different = {label: found for label, found in compared.items() if not found.same}
            if different:
                label, worst = max(different.items(), key=lambda item: item[1].difference)
                problems.append(
                    f"{name} and {other} were trained on different bases, in {len(different)} of {len(compared)} "
                    f"matrices that both adapt (most in {label}, by {worst.difference:.2%} of its sampled values); "
                    "pass allow_other_base=True to combine them all the same"
                )
            elif not compared and content.base_model and second.base_model not in (None, content.base_model):
                problems.append(
                    f"{name} names {content.base_model} as its base, {other} names {second.base_model}, and no "
                    "fingerprints tell that they are the same; pass allow_other_base=True if they are"
                )
    return problems


def _compared(first: Content, second: Content) -> dict[str, Comparison]:
    return {
        label_of(layer, part): compare_fingerprints(then, second.updates[layer].fingerprints[part])
        for layer in first.updates.keys() & second.updates.keys()
        for part, then in first.updates[layer].fingerprints.items()
        if part in second.updates[layer].fingerprints
    }


def place_of(layer: str, updates: Mapping[str, LayerUpdate]) -> tuple[LayerUpdate, dict[str, LayerUpdate]]:
    """Return an update without tensors for a layer that several adapters change, and theirs, with the same parts.

    Raises AdapterError where they do not change the same kind of layer.
    """
    kinds = {"weight" in update.tensors for update in updates.values()}
    if len(kinds) > 1:
        updates = {name: _whole(layer, name, update) for name, update in updates.items()}
    first, *rest = updates.values()
    for name, update in list(updates.items())[1:]:
        wrong = update.lookup != first.lookup or update.groups != first.groups
        wrong |= any(update.shapes[part] != shape for part, shape in first.shapes.items() if part in update.shapes)
        if wrong:
            raise AdapterError(f"{layer}: {name} adapts another kind of layer than the others")
    place = dataclasses.replace(first, tensors={}, specs={}, by_parts=any(u.by_parts for u in updates.values()))
    for update in rest:
        place.host = place.host or update.host
        place.shapes = update.shapes | place.shapes
        place.matrices = update.matrices | place.matrices
        place.fingerprints = update.fingerprints | place.fingerprints
    return place, dict(updates)


def _whole(layer: str, name: str, update: LayerUpdate) -> LayerUpdate:
    """Return an update of parts as one of the whole layer, for which its rows must be known."""
    if "weight" in update.tensors:
        return update
    if not isinstance(update.host, FusedHost):
        raise AdapterError(
            f"{layer}: {name} adapts {enumerate_names(update.tensors)} of it, and another adapter all of it; which "
            "rows these parts have is known on their model alone (lorank.combine)"
        )
    pair = pair_of(layer, update)
    shape = next(iter(update.shapes.values()), None)
    return LayerUpdate(
        dataclasses.replace(plain_spec(pair.rank, update.spec), alpha=pair.scale * pair.rank),
        {"weight": {"A": pair.A, "B": pair.B}},
        host=update.host.base,
        shapes={"weight": shape} if shape is not None else {},
        matrices={"weight": (pair.B.shape[0], pair.A.shape[1])},
        fingerprints=update.fingerprints,
    )


def tied_of(contents: Contents, problems: list[str]) -> dict[str, Any]:
    """Return the layers that mirror others; every adapter that changes one of the two must have them so."""
    tied = {layer: tie for content in contents.values() for layer, tie in content.tied.items()}
    for layer, tie in tied.items():
        for name, content in contents.items():
            concerned = {layer, tie.source} & (content.updates.keys() | content.tied.keys())
            if concerned and content.tied.get(layer) != tie:
                problems.append(
                    f"{layer} has the update of {tie.source} in one adapter, and {name} changes "
                    f"{enumerate_names(sorted(concerned))} by itself"
                )
    return tied


def trained_whole(content: Content) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Return what an adapter trained whole, {(kind, its name): its tensors}; each row of a token counts by itself."""
    found: dict[tuple[str, ...], dict[str, Tensor]] = {
        ("copy", name): dict(tensors) for name, tensors in content.copies.items()
    }
    found |= {("bias", name): {"bias": bias} for name, bias in content.biases.items()}
    for name, (ids, rows) in content.tokens.items():
        found |= {("token", name, str(i)): {"row": row} for i, row in zip(ids, rows, strict=True)}
    return found


def take_whole(
    result: Content, contents: Contents, weights: Mapping[str, float], whole: str | None, problems: list[str]
) -> list[str]:
    """Put what the adapters trained whole into the result, and return notes on it.

    They are values, and not updates that could be weighted and added. Where adapters have different ones, it is those
    of the adapter `whole`; without it, that is a problem.
    """
    found: dict[tuple[str, ...], dict[str, dict[str, Tensor]]] = {}
    for name, content in contents.items():
        for key, tensors in trained_whole(content).items():
            found.setdefault(key, {})[name] = tensors
    chosen: dict[tuple[str, ...], dict[str, Tensor]] = {}
    disputed: dict[tuple[str, ...], list[str]] = {}
    unweighted: dict[str, list[str]] = {}
    for key, by_name in found.items():
        names = list(by_name)
        if whole in by_name:
            owner = str(whole)
        elif all(_equal(by_name[names[0]], by_name[name]) for name in names[1:]):
            owner = names[0]
        else:
            disputed.setdefault(tuple(names), []).append(_described(key))
            continue
        chosen[key] = by_name[owner]
        if len(contents) > 1 or weights[owner] != 1:
            unweighted.setdefault(owner, []).append(_described(key))
    for names, keys in disputed.items():
        problems.append(
            f"{enumerate_names(keys, 4)} differ in {' and '.join(names)}. They were trained whole: values that cannot "
            f"be weighted and added without their base. whole={names[0]!r} takes those of {names[0]}"
        )
    _fill(result, chosen)
    return [
        f"trained whole, taken from {owner} as they are, whatever its weight: {enumerate_names(keys, 4)}"
        for owner, keys in unweighted.items()
    ]


def _fill(result: Content, chosen: Mapping[tuple[str, ...], dict[str, Tensor]]) -> None:
    tokens: dict[str, dict[int, Tensor]] = {}
    result.copies, result.biases = {}, {}
    for (kind, name, *token), tensors in chosen.items():
        if kind == "copy":
            result.copies[name] = tensors
        elif kind == "bias":
            result.biases[name] = tensors["bias"]
        else:
            tokens.setdefault(name, {})[int(token[0])] = tensors["row"]
    result.tokens = {
        name: (sorted(rows), torch.stack([rows[i] for i in sorted(rows)])) for name, rows in tokens.items()
    }


def _described(key: Sequence[str]) -> str:
    kind, name, *token = key
    return name if kind == "copy" else f"{name}.bias" if kind == "bias" else f"{name} (token {token[0]})"


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.shape == second[key].shape and torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


def take_base(result: Content, contents: Contents, problems: list[str]) -> None:
    """Put tensors of the base that came along into the result; they must be the same in all."""
    result.base = {}
    for content in contents.values():
        for key, tensor in content.base.items():
            if not _equal({key: result.base.setdefault(key, tensor)}, {key: tensor}):
                problems.append(f"the files bring the base's {key}, and it differs between them: other bases")


def take_about(result: Content, contents: Contents, whole: str | None) -> list[str]:
    """Put what the makers wrote of the adapters into the result, as far as they agree, and return notes."""
    abouts = {name: about_of(content) for name, content in contents.items()}
    first = next(iter(abouts.values()))
    keys = dict.fromkeys(key for about in abouts.values() for key in about)
    agreed = [key for key in keys if all(key in about and about[key] == first.get(key) for about in abouts.values())]
    result.about = dict(abouts[whole]) if whole is not None else {key: first[key] for key in agreed}
    result.task = result.about.get("task")
    bases = {content.base_model for content in contents.values()} - {None}
    result.base_model = bases.pop() if len(bases) == 1 else None
    lost = [key for key in keys if key not in result.about]
    return [f"the adapters differ in what they say of {enumerate_names(lost)}: left out"] if lost else []


def about_of(content: Content) -> dict[str, Any]:
    """Return what is known of an adapter, with its task, which not every format keeps by itself."""
    return {**({"task": content.task} if content.task else {}), **content.about}
