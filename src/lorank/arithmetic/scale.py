"""Scaling and negation of an adapter: ΔW times a number."""

import dataclasses
import math
from typing import Literal

from ..errors import AdapterError, raise_problems
from ..formats.content import Content, LayerUpdate
from ..formats.pairs import beyond_pairs
from ..variants import LoRA
from .updates import all_pairs, plain_spec, require_sound, with_updates

Whole = Literal["keep", "drop"]


def scaled(content: Content, factor: float, *, whole: Whole | None = None) -> Content:
    """Return an adapter with every ΔW multiplied by a number; a negative one turns the update round.

    whole: what becomes of modules, biases and rows of tokens that were trained whole. They are values and no
        updates, so that without their base they cannot be scaled: "keep" leaves them as they are, "drop" leaves them
        out, and None raises AdapterError where there are any.

    Exact: the size goes into alpha, and only the sign into B. Every method with a low-rank form becomes LoRA; raises
    AdapterError for the others, with the layer's name.
    """
    require_sound(content, "cannot scale")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or not factor:
        raise AdapterError(f"cannot scale: the factor is {factor!r}; it must be a finite number other than 0")
    if whole not in (None, "keep", "drop"):
        raise AdapterError(f"cannot scale: whole is {whole!r}; it must be 'keep' or 'drop'")
    if whole is None:
        hint = "values, which cannot be scaled without their base; whole='keep' leaves them, 'drop' leaves them out"
        raise_problems("cannot scale", [f"{problem}: {hint}" for problem in beyond_pairs(content)])
    if not content.updates:
        raise AdapterError("cannot scale: it has no low-rank update")
    updates: dict[str, LayerUpdate] = {}
    for layer, part, update, (A, B) in all_pairs(content, "cannot scale"):
        made = updates.setdefault(layer, dataclasses.replace(update, specs={}, tensors={}))
        before = update.spec_of(part)
        base = before if type(before) is LoRA else plain_spec(A.shape[-2], before)
        alpha = base.alpha * abs(factor) * (1.0 if base is before else before.scale)
        spec = dataclasses.replace(base, alpha=alpha)
        if not made.tensors:
            made.spec = spec
        elif spec != made.spec:
            made.specs[part] = spec
        made.tensors[part] = {"A": A, "B": -B if factor < 0 else B}
    result = with_updates(content, updates)
    if whole == "drop":
        result = dataclasses.replace(result, copies={}, biases={}, tokens={}, bias="none")
    return result


def negate(content: Content, *, whole: Whole | None = None) -> Content:
    """Return the adapter with every ΔW turned round, as `scaled` with −1: added to the other, nothing is left."""
    return scaled(content, -1.0, whole=whole)
