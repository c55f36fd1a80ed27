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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What is read to set a module up, to print it, or to tie it, and not to compute with it.
_SETTING_UP = re.compile(
    r"__init__|__setstate__|__repr__|extra_repr|_?_?(re)?(set|init|tie|resize|load|prune)_.*|(re)?_?initiali[sz]e.*"
)
_METADATA = frozenset(
    {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_meta"}
)
_ASKING = frozenset({"isinstance", "hasattr", "getattr", "type", "id", "len"})
# A source in which none of these occurs reads no weight, and hands no layer on to what might.
_WORTH_PARSING = re.compile(r"\.(weight|bias)\b|[(,=]\s*\w+(\.\w+|\[\w+\])+\s*[,)]")

_Path = tuple[str, ...]


def read_without_call(name: str, modules: Callable[[str], nn.Module], below: str | None = None) -> frozenset[str]:
    """Return which of "weight" and "bias" of the layer `name` a module above it reads; `modules` gives it by name.

    A layer that is handed on to a function counts as read, for what the function does with it is not known.
    below: the name of a module around the layer, or the layer's own; it and what lies in it are not asked. Then only
        what is read for certain counts.
    """
    found: set[str] = set()
    components = name.split(".") if name else []
    for length in range(len((below or name).split(".")) if components else 0):
        above = type(modules(".".join(components[:length])))
        path = components[length:]
        found.update(attribute for *read, attribute in weights_read(above) if _fits(read, path))
        if below is None and any(_fits(handed_on, path) for handed_on in layers_handed_on(above)):
            found.update(("weight", "bias"))
    return frozenset(found)


def _fits(read: Sequence[str], path: Sequence[str]) -> bool:
    return len(read) == len(path) and all(r in (p, "*") for r, p in zip(read, path, strict=True))


def weights_read(cls: type) -> frozenset[_Path]:
    """Return the paths of weights and biases that methods of a class read: ("self_attn", "out_proj", "weight").

    "*" stands for any member of a list. A class without source reads nothing that could be known.
    """
    return frozenset(path for owner in _owners(cls) for path in _of(owner).read)


def layers_handed_on(cls: type) -> frozenset[_Path]:
    """Return the paths of whatever lies below a module that methods of its class give to functions as an argument."""
    return frozenset(path for owner in _owners(cls) for path in _of(owner).handed_on)


@functools.cache
def _owners(cls: type) -> tuple[type, ...]:
    return tuple(c for c in cls.__mro__ if c not in (nn.Module, object) and "carries_adapters" not in vars(c))


@dataclass
class _Paths:
    read: set[_Path] = field(default_factory=set)
    handed_on: set[_Path] = field(default_factory=set)


@functools.cache
def _of(owner: type) -> _Paths:
    paths = _Paths()
    for name, member in vars(owner).items():
        if not _SETTING_UP.fullmatch(name):
            for function in _functions(member):
                _add_paths(function, paths)
    return paths


def _functions(member: Any, depth: int = 3) -> Iterator[types.FunctionType]:
    """Yield the functions behind a member of a class: of a property, and those that a decorator has wrapped."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    function = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
    if isinstance(function, types.FunctionType):
        yield function
        if depth:  # a decorator that does not say what it wraps holds it all the same
            for cell in function.__closure__ or ():
                yield from _functions(_content(cell), depth - 1)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _add_paths(method: Callable[..., object], paths: _Paths) -> None:
    """Add what one method reads and hands on."""
    try:
        source = inspect.getsource(method)
        if not _WORTH_PARSING.search(source):
            return
        function = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, TypeError, SyntaxError):
        return
    if not isinstance(function, ast.FunctionDef) or not (function.args.posonlyargs + function.args.args):
        return
    known = _Known(function)
    skipped: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            skipped.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            skipped.update(id(argument) for argument in node.args)
        elif isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            paths.handed_on.update(path for argument in arguments for path in known.paths(argument) if path)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            skipped.update(map(id, [node.left, *node.comparators]))
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or id(node) in skipped:
            continue
        if node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load):
            paths.read.update((*path, node.attr) for path in known.paths(node.value) if path)


class _Known:
    """What the names in a method stand for: the module itself, and what lies below it at some path."""

    def __init__(self, function: ast.FunctionDef):
        first = (function.args.posonlyargs + function.args.args)[0].arg
        self.names: dict[str, set[_Path]] = {first: {()}}
        before = -1
        while before != sum(map(len, self.names.values())):  # a name may stand for what another stands for
            before = sum(map(len, self.names.values()))
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        self._assign(target, node.value)
                elif isinstance(node, ast.NamedExpr):
                    self._assign(node.target, node.value)
                elif isinstance(node, ast.For | ast.comprehension):
                    self._iterate(node.target, node.iter)

    def paths(self, node: ast.expr) -> set[_Path]:
        """Return the paths below the module of what an expression like `self.a.b[i]` may be."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*above, node.attr) for above in self.paths(node.value) if len(above) < 8}
        if isinstance(node, ast.Subscript):
            above = self.paths(node.value) - {()}
            return above if isinstance(node.slice, ast.Slice) else _members(above)
        return set()

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self._assign(one, its)
        else:
            self._stands_for(target, self.paths(value))

    def _iterate(self, target: ast.expr, over: ast.expr) -> None:
        """Let a target stand for the members of a list, also in `enumerate`, `zip`, `reversed` and `items`."""
        if not isinstance(over, ast.Call):
            self._stands_for(target, _members(self.paths(over)))
            return
        called = over.func.id if isinstance(over.func, ast.Name) else getattr(over.func, "attr", "")
        if called in ("items", "values") and isinstance(over.func, ast.Attribute):
            member = target.elts[-1] if isinstance(target, ast.Tuple) and called == "items" else target
            self._stands_for(member, _members(self.paths(over.func.value)))
        elif called == "enumerate" and isinstance(target, ast.Tuple) and over.args:
            self._iterate(target.elts[-1], over.args[0])
        elif called == "zip" and isinstance(target, ast.Tuple):
            for one, its in zip(target.elts, over.args, strict=False):
                self._iterate(one, its)
        elif called in ("reversed", "list", "tuple") and over.args:
            self._iterate(target, over.args[0])

    def _stands_for(self, target: ast.expr, paths: Iterable[_Path]) -> None:
        if isinstance(target, ast.Name) and paths:
            self.names.setdefault(target.id, set()).update(paths)


def _members(paths: set[_Path]) -> set[_Path]:
    return {(*path, "*") for path in paths if path and len(path) < 8}
