"""Which layers' weights does a module read without calling the layer? It is found in the source of its class.

Mamba multiplies with `self.dt_proj.weight`, PyTorch's encoder layer hands `self.linear1.weight` to a kernel, and some
models multiply with their embedding's weight as an output head. An adapter that only ran when its layer is called would
have no effect there. A layer that is found here lets W + ΔW be read.
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
_ATTRIBUTES = ("weight", "bias")
# A source in which none of these occurs reads no weight, and hands no layer on to what might.
_WORTH_PARSING = re.compile(r"\.(weight|bias)\b|[(,=]\s*\w+(\.\w+|\[\w+\])*\s*[,)]")

_Path = tuple[str, ...]  # below what a function was given; "*" stands for any member of a list


def read_without_call(name: str, modules: Callable[[str], nn.Module], below: str | None = None) -> frozenset[str]:
    """Return which of "weight" and "bias" of the layer `name` a module above it reads; `modules` gives it by name.

    A module that hands the layer on to another module, or to a function, reads what that one does.
    below: the name of a module around the layer, or the layer's own; it and what lies in it are not asked.
    """
    found: set[str] = set()
    components = name.split(".") if name else []
    for length in range(len((below or name).split(".")) if components else 0):
        above = modules(".".join(components[:length]))
        path = components[length:]
        found.update(attribute for *read, attribute in weights_read(type(above)) if _fits(read, path))
        for start, given, source in _handed_on_below(type(above)):
            if start[0] in (path[0], "*") and _fits(start, path[: len(start)]):
                found |= source.read_by_receiver(given, path[len(start) :], above)
    return frozenset(found)


@functools.cache
def weights_read(cls: type) -> frozenset[_Path]:
    """Return the paths of weights and biases that methods of a class read: ("self_attn", "out_proj", "weight").

    A class without source reads nothing that could be known.
    """
    found = ((source.parameters[0], source.read) for source in _methods(cls))
    return frozenset(path[1:] for first, read in found for path in read if path[0] == first and len(path) > 2)


@functools.cache
def _handed_on_below(cls: type) -> tuple[tuple[_Path, "_HandedOn", "_Source"], ...]:
    """Return what methods of a class hand on of what lies below their module, with its path."""
    return tuple(
        (given.path[1:], given, source)
        for source in _methods(cls)
        for given in source.handed_on
        if given.path[0] == source.parameters[0] and len(given.path) > 1
    )


def _methods(cls: type) -> Iterator["_Source"]:
    """Yield the sources of a class's methods, with those it inherits."""
    for owner in cls.__mro__:
        if owner not in (nn.Module, object) and "carries_adapters" not in vars(owner):
            yield from _methods_of(owner)


@functools.cache
def _methods_of(owner: type) -> tuple["_Source", ...]:
    members = [member for name, member in vars(owner).items() if not _SETTING_UP.fullmatch(name)]
    return tuple(_source(function) for member in members for function in _functions(member))


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


@dataclass(frozen=True)
class _HandedOn:
    """Something that a function gives to another as an argument."""

    path: _Path  # of what is given
    to: Any  # a path below what the function was given itself, or a function that it knows
    argument: int | str


@dataclass
class _Source:
    """What a function reads of its parameters. Paths begin with the parameter's name."""

    parameters: list[str] = field(default_factory=lambda: [""])
    read: set[_Path] = field(default_factory=set)
    handed_on: list[_HandedOn] = field(default_factory=list)

    def reads(self, parameter: str, path: Sequence[str], module: nn.Module | None, depth: int) -> set[str]:
        """Return which attributes are read of what lies at a path below a parameter.

        module: what the first parameter is, where that is known.
        """
        whole = (parameter, *path)
        found = {attribute for *read, attribute in self.read if _fits(read, whole)}
        for given in self.handed_on:
            if _fits(given.path, whole[: len(given.path)]):
                found |= self.read_by_receiver(given, whole[len(given.path) :], module, depth)
        return found

    def read_by_receiver(
        self, given: _HandedOn, path: Sequence[str], module: nn.Module | None, depth: int = 3
    ) -> set[str]:
        """Return which attributes a function that is called here reads of what lies at a path below an argument."""
        if not depth:
            return set()
        source, receiver = self._receiver(given.to, module)
        named = source.parameter(given.argument, is_method=receiver is not None)
        return set() if named is None else source.reads(named, path, receiver, depth - 1)

    def parameter(self, argument: int | str, is_method: bool) -> str | None:
        """Return the name of the parameter that takes an argument of a call."""
        if isinstance(argument, str):
            return argument if argument in self.parameters else None
        position = argument + is_method
        return self.parameters[position] if position < len(self.parameters) else None

    def _receiver(self, to: Any, module: Any) -> tuple["_Source", nn.Module | None]:
        """Return the source of what is called, and the module of which it is a method."""
        if isinstance(to, types.FunctionType):
            return _source(to), None
        if module is None or to[0] != self.parameters[0]:
            return _Source(), None
        method: Any = getattr(type(module), to[1], None) if len(to) == 2 else None
        if not isinstance(method, types.FunctionType):
            for component in to[1:]:
                inside = {} if module is None else module._modules
                module = next(iter(inside.values()), None) if component == "*" else inside.get(component)
            method = None if module is None else _forward_of(type(module))
        return (_Source(), None) if method is None else (_source(inspect.unwrap(method)), module)


def _forward_of(cls: type[nn.Module]) -> Callable[..., object] | None:
    owners = (vars(c) for c in cls.__mro__ if "carries_adapters" not in vars(c))
    return next((members["forward"] for members in owners if "forward" in members), None)


def _fits(read: Sequence[str], path: Sequence[str]) -> bool:
    return len(read) == len(path) and all(r in (p, "*") for r, p in zip(read, path, strict=True))


@functools.cache
def _source(function: Callable[..., object]) -> _Source:
    try:
        text = inspect.getsource(function)
        parsed = ast.parse(textwrap.dedent(text)).body[0] if _WORTH_PARSING.search(text) else None
    except (OSError, TypeError, SyntaxError):
        return _Source()
    if not isinstance(parsed, ast.FunctionDef):
        return _Source()
    given = parsed.args
    source = _Source([argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)] or [""])
    known = _Known(parsed, source.parameters)
    skipped: set[int] = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            skipped.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            skipped.update(id(argument) for argument in node.args)
        elif isinstance(node, ast.Call):
            source.handed_on += _handed_on(node, known, function)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            skipped.update(map(id, [node.left, *node.comparators]))
    for node in ast.walk(parsed):
        if not isinstance(node, ast.Attribute) or id(node) in skipped:
            continue
        if node.attr in _ATTRIBUTES and isinstance(node.ctx, ast.Load):
            source.read.update((*path, node.attr) for path in known.paths(node.value))
    return source


def _handed_on(call: ast.Call, known: "_Known", function: Callable[..., object]) -> Iterator[_HandedOn]:
    named = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None]
    given = [(n, path) for n, value in (*enumerate(call.args), *named) for path in known.paths(value)]
    if not given:
        return
    receivers: list[Any] = [path for path in known.paths(call.func) if len(path) > 1]
    if isinstance(call.func, ast.Name):
        found = getattr(function, "__globals__", {}).get(call.func.id)
        receivers += [found] if isinstance(found, types.FunctionType) else []
    yield from (_HandedOn(path, to, n) for n, path in given for to in receivers)


class _Known:
    """What the names in a function stand for: what it was given, and what lies below that at some path."""

    def __init__(self, function: ast.FunctionDef, parameters: Sequence[str]):
        self.names: dict[str, set[_Path]] = {name: {(name,)} for name in parameters}
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
        """Return the paths of what an expression like `self.a.b[i]` may be."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*above, node.attr) for above in self.paths(node.value) if len(above) < 9}
        if isinstance(node, ast.Subscript):
            above = self.paths(node.value)
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
    return {(*path, "*") for path in paths if len(path) < 9}
