"""Running a copy of a module in its place, rounded to the dtypes that the module has."""

import functools
from typing import Any, cast

import torch
from torch import nn


def run_copy(layer: nn.Module, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a copy of a layer, with its parameters rounded to the dtypes of the layer's own where they are wider.

    Its forward alone: hooks are the layer's, and have run.
    """
    narrower = {}
    for name, parameter in copy.named_parameters():
        path, _, key = name.rpartition(".")
        own = layer.get_submodule(path)._parameters.get(key)  # None when it was parametrised since
        if own is not None and parameter.dtype != own.dtype:
            narrower[name] = own.dtype
    forward = functools.partial(type(copy).forward, copy)
    if not narrower:
        return forward(*args, **kwargs)

    def rounded(*args: Any) -> Any:
        parameters = {f"copy.{name}": copy.get_parameter(name).to(dtype) for name, dtype in narrower.items()}
        return torch.func.functional_call(_Forward(copy), parameters, args, kwargs)

    if torch.compiler.is_compiling():  # which makes no modules, and no hooks that a model adds for one call
        parameters = {name: copy.get_parameter(name).to(dtype) for name, dtype in narrower.items()}
        return torch.func.functional_call(copy, parameters, args, kwargs)
    if not (getattr(copy, "gradient_checkpointing", False) and copy.training and torch.is_grad_enabled()):
        return rounded(*args)
    return cast(Any, copy)._gradient_checkpointing_func(functools.partial(_unchecked, copy, rounded), *args)


def _unchecked(copy: Any, run: Any, *args: Any) -> Any:
    """Run without the copy's own gradient checkpointing, which would run it again without rounding."""
    copy.gradient_checkpointing = False
    try:
        return run(*args)
    finally:
        copy.gradient_checkpointing = True


class _Forward(nn.Module):
    """Calls the forward of a module's class, and nothing that is done around it."""

    def __init__(self, copy: nn.Module) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.copy).forward(self.copy, *args, **kwargs)
