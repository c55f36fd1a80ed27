"""Operations on the meta device that were done before: a model's blocks are alike, and so are their operations."""

from typing import Any

import torch
from torch import Tensor

_Made = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]  # (shape, strides, dtype) of each result


class Repeats:
    """Runs operations on meta tensors; for one on tensors of the same shapes as before it makes the results at once.

    PyTorch works out the shapes in Python, some ten times as slowly.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[_Made, bool]] = {}  # what is made, and whether it is a tuple

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the results of an operation."""
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            if all(isinstance(one, Tensor) and one.is_meta for one in results) and not _share(args, results):
                self._known[key] = tuple((t.shape, t.stride(), t.dtype) for t in results), isinstance(result, tuple)
            return result
        made, several = known
        tensors = tuple(torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in made)
        return tensors if several else tensors[0]


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


def _share(args: tuple[Any, ...], results: tuple[Tensor, ...]) -> bool:
    """Tell whether a result lies in the memory of an argument, or of another result."""
    given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
    own = {result.untyped_storage()._cdata for result in results}
    return bool(given & own) or len(own) < len(results)
