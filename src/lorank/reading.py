"""Which layers' weights does a module read without calling the layer? It is found in the source of its class.

Mamba multiplies with `self.dt_proj.weight`, PyTorch's encoder layer hands `self.linear1.weight` to a kernel, and some
models multiply with their embedding's weight as an output head. An adapter that only ran when its layer is called would
have no effect there. A layer that is found here lets W + ΔW be read. Finding one too many does no harm.
"""

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator

from torch import nn

# What is read to set a module up, to print it, or to tie it, and not to compute with it.
_SETTING_UP = re.compile(
    r"__init__|__setstate__|__repr__|extra_repr|_?_?(re)?(set|init|tie|resize|load|prune)_.*|(re)?_?init.*"
)
_METADATA = frozenset(
    {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_meta"}
)
_ASKING = frozenset({"isinstance", "hasattr", "getattr", "type", "id", "len"})


def read_without_call(name: str, modules: Callable[[str], nn.Module], below: str | None = None) -> frozenset[str]:
    """Return which of "weight" and "bias" of the layer `name` a module above it reads; `modules` gives it by name.

    below: the name of a module around the layer, or the layer's own; it and what lies in it are not asked.
    """
    found: set[str] = set()
    components = name.split(".") if name else []
    for length in range(len((below or name).split(".")) if components else 0):
        above = modules(".".join(components[:length]))
        path = components[length:]
        for *read, attribute in weights_read(type(above)):
            if len(read) == len(path) and all(r in (p, "*") for r, p in zip(read, path, strict=True)):
                found.add(attribute)
    return frozenset(found)


@functools.cache
def weights_read(cls: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Return the paths of weights and biases that methods of a class read: ("self_attn", "out_proj", "weight").

    "*" stands for any member of a list. A class without source reads nothing that could be known.
    """
    found: set[tuple[str, ...]] = set()
    for owner in cls.__mro__:
        if owner in (nn.Module, object) or not issubclass(owner, nn.Module) or "carries_adapters" in vars(owner):
            continue
        for name, method in vars(owner).items():
            if isinstance(method, types.FunctionType) and not _SETTING_UP.fullmatch(name):
                found.update(_reads(method))
    return frozenset(found)


def _reads(method: Callable[..., object]) -> Iterator[tuple[str, ...]]:
    try:
        source = inspect.getsource(inspect.unwrap(method))
        if ".weight" not in source and ".bias" not in source:
            return
        function = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return
    skipped: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            skipped.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            skipped.update(id(argument) for argument in node.args)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            skipped.update(map(id, [node.left, *node.comparators]))
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and id(node) not in skipped:
                yield (*path, node.attr)


def _path(node: ast.expr) -> tuple[str, ...]:
    """Return the path of `self.a.b[i]` below self; nothing for what is no such path, and for self alone."""
    if isinstance(node, ast.Attribute):
        above = _path(node.value)
        is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        return (*above, node.attr) if above or is_self else ()
    if isinstance(node, ast.Subscript):
        above = _path(node.value)
        return (*above, "*") if above else ()
    return ()
