"""Operations on the meta device that were done before: a model's blocks are alike, and so are their operations."""

from typing import Any

import torch
from torch import Tensor

_Made = tuple[torch.Size, tuple[int, ...], torch.dtype] | None  # shape, strides, dtype of a result


class Repeats:
    """Runs operations on meta tensors; for one on tensors of the same shapes as before it makes the results at once.

    PyTorch works out the shapes in Python, some ten times as slowly.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[_Made], bool]] = {}  # what is made, and whether it is a tuple

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the results of an operation."""
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            tensors = [one for one in results if one is not None]
            if all(isinstance(one, Tensor) and one.is_meta for one in tensors) and not _share(args, tensors):
                made = [None if one is None else (one.shape, one.stride(), one.dtype) for one in results]
                self._known[key] = made, isinstance(result, tuple)
            return result
        made, several = known
        again = tuple(one and torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in made)
        return again if several else again[0]


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the shapes of the results depend on; None where more than new tensors may come of it."""
    if func._schema.is_mutable or any(made.alias_info is not None for made in func._schema.returns):
        return None
    seen = False
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            seen = True
            parts += value.shape, value.stride(), value.dtype
        elif isinstance(value, list):
            parts.append(tuple(value))
        else:
            parts.append((type(value), value))  # 1, 1.0 and True are the same key, and not the same operation
    try:
        hash(key := tuple(parts))
    except TypeError:
        return None
    return key if seen else None


def _share(args: tuple[Any, ...], results: list[Tensor]) -> bool:
    """Tell whether a result lies in the memory of an argument, or of another result."""
    given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
    own = {result.untyped_storage()._cdata for result in results}
    return bool(given & own) or len(own) < len(results)
