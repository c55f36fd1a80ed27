"""Do the tensors of a file fit the places that a model has for them?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import dtype_name
from .content import is_finite


def tensors_problems(label: str, method: str, needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with a file's tensors in the place of those that a method needs."""
    problems = [f"{label}: the file lacks {name}" for name in needed.keys() - tensors.keys()]
    problems += [f"{label}: the file has {name}, which {method} has not" for name in tensors.keys() - needed]
    for name in (name for name in needed if name in tensors):
        found, shape = tensors[name], tuple(needed[name].shape)
        if tuple(found.shape) != shape:
            problems.append(f"{label}: {name} is {tuple(found.shape)} in the file, the model needs {shape}")
        else:
            problems += value_problems(f"{label}: {name}", found, needed[name].dtype)
    return problems


def value_problems(what: str, tensor: Tensor, dtype: torch.dtype) -> list[str]:
    """Return what is wrong with the values of a file's tensor that is to be kept in a dtype."""
    if not tensor.is_floating_point():
        return [f"{what} is {dtype_name(tensor.dtype)} in the file; it must be floating-point"]
    if not is_finite(tensor):
        return [f"{what} holds NaN or Inf"]
    if not torch.isfinite(tensor.to(dtype)).all():
        return [f"{what} holds numbers that are too large for {dtype_name(dtype)}"]
    return []
