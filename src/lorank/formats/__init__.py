"""Adapter files: one module a format, with the three functions of `Format`.

Importing the folder makes every module in it known that has them; they are tried in the order of their names.
"""

import importlib
import json
import os
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..errors import AdapterError, AdapterWarning, enumerate_names, raise_problems
from ..names import Names
from ..planning import Plan, warn
from ..surgery import only_adapter, require_name
from ..tree import require_not_folded, unwrapped
from . import lorank
from .content import Content, Given, LayerUpdate, as_json, gather
from .fitting import fit


class Format(Protocol):
    """What a module of this folder must have to be a format."""

    NATIVE: tuple[str, ...]  # methods that the format has itself; others are written as LoRA, and `write` here says so
    WRITES: bool  # whether it can be written

    def detect(self, path: Path) -> bool:
        """Tell whether a path is an adapter in this format, by its content."""
        ...

    def read(self, path: Path, names: Names | None, given: Given) -> Content:
        """Read an adapter for a model with these module names, or for none."""
        ...

    def write(self, content: Content, path: Path, model: nn.Module | None) -> list[str]:
        """Write an adapter, of a model where it is known; return what the file says in another way than the adapter.

        Raises AdapterError, which lists all that the format cannot hold, before anything is written.
        """
        ...

    def to_be_told(self, content: Content) -> Given:
        """Return what a reader has to be told of the file that is written of an adapter."""
        ...


FORMATS: dict[str, Format] = {}

for _found in pkgutil.iter_modules(__path__):
    _module: Any = importlib.import_module(f"{__name__}.{_found.name}")
    if hasattr(_module, "detect"):
        FORMATS[_found.name] = _module

__all__ = ["FORMATS", "Content", "Format", "Given", "LayerUpdate", "detect", "load", "read", "save"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter in a file format: by default PEFT's, of which `path` is a directory.

    format: one of `lorank.formats.FORMATS`. Without one it is PEFT's, or lorank's own for what that cannot hold:
        adapters without an update of a matrix (BitFit, top-k), those that run beside the layers, and prefixes. Warns
        of what had to be written in another way, such as scales that were folded into B because the format has one
        for all layers.

    An adapter that is there already is replaced in one step, other files stay; a failure leaves the old ones
    whole. The bytes depend on the adapter and its base alone. Without a name it is the only adapter, or
    the only active one. `about` is kept in the file beside lorank's own account of the adapter: any values that
    JSON has, such as the names of labels; `lorank.formats.read` returns it.

    Raises AdapterError for values that are not finite, for what JSON has not, and when the files cannot be written.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot save")
    if format is not None and format not in FORMATS:
        raise AdapterError(f"cannot save: unknown format '{format}'; known are {', '.join(writable())}")
    chosen = require_name(model, name, "save") if name is not None else only_adapter(model, "save")
    target = as_path(path)
    content = gather(model, chosen)
    content.about = json.loads(as_json(about or {}))
    for note in write(content, target, format or format_for(content), model):
        warnings.warn(f"{target}: {note}", AdapterWarning, stacklevel=2)


def write(content: Content, path: Path, format: str, model: nn.Module | None) -> list[str]:
    """Write an adapter in a format; return what the file says in another way than the adapter, method included."""
    if format != "lorank":
        problems = [f"{baseline} runs beside the layers" for baseline in content.baselines]
        if format == "peft" and content.landmarks:
            problems.append("it has no update of a matrix, without which PEFT loads nothing and knows no base")
        own = lorank.TENSORS
        problems += [f"{path} has an adapter in lorank's own format ({own})"] if (path / own).is_file() else []
        raise_problems(f"cannot write it in the format '{format}'", problems)
    notes = FORMATS[format].write(content, path, model)
    others: dict[str, list[str]] = {}  # layers, by method
    for name, update in content.updates.items():
        for method in {update.spec_of(part).variant for part in update.tensors} - {*FORMATS[format].NATIVE}:
            others.setdefault(method, []).append(name)
    return [
        f"{method} written as LoRA, which computes the same: {enumerate_names(layers, 3)}"
        for method, layers in sorted(others.items())
    ] + notes


def format_for(content: Content) -> str:
    """Return the format in which an adapter is saved when none is named: PEFT's where that can hold it."""
    return "peft" if content.updates and not content.inserted else "lorank"


def writable() -> list[str]:
    """Return the formats that can be written."""
    return [name for name, module in FORMATS.items() if module.WRITES]


def detect(path: Path) -> str | None:
    """Return the format of an adapter, told by what it holds; None for what is none, or not there."""
    return next((name for name, module in FORMATS.items() if module.detect(path)), None)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    activate: bool = True,
    allow_other_base: bool = False,
    allow_pickle: bool = False,
    alpha: float | None = None,
    parts: Sequence[str] = (),
) -> Plan:
    """Put an adapter from a file on the model, freeze the base, and return what was loaded.

    path: a directory in PEFT's layout, or the safetensors file in it; or a file in another format of this folder,
        which is told by what it holds.
    name: what the adapter is called here; file formats do not store names.
    activate: make it the only active adapter; False leaves the active ones as they are.
    allow_other_base: load although the adapted weights differ from those the adapter was saved on. The same
        base in another dtype needs no permission; it warns.
    allow_pickle: open a file that is a pickle (`adapter_model.bin`, loralib's `.pt`), with PyTorch's `weights_only`.
    alpha: of a file that does not store it (loralib's); refused for one that does.
    parts: of a file that does not say which parts of a fused projection it adapts (loralib's): ("q", "v"), or their
        numbers, ("0", "2"), where the model's order of them is not known. Refused for other files.

    Every tensor of the file must find its place and every place its tensor. Raises AdapterError, which lists
    every problem, before anything is changed: missing or unexpected keys, wrong shapes, NaN or Inf, another
    base, a damaged file, settings that lorank does not know how to honour.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot load")
    source = as_path(path)
    chosen = _detect(source)
    try:
        content = chosen.read(source, Names(model), Given(allow_pickle, alpha, tuple(parts)))
        loaded = fit(model, content, name, activate=activate, allow_other_base=allow_other_base)
    except AdapterError as error:
        raise AdapterError(f"cannot load {source}: {error}") from None
    warn(loaded)
    return loaded


def read(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    allow_pickle: bool = False,
    alpha: float | None = None,
    parts: Sequence[str] = (),
) -> Content:
    """Return what an adapter file says; of the model, which may be on the meta device, only the names are used.

    Without a model, parts of a fused projection come as one pair of factors of the whole layer. What is doubtful
    about the file stands in the content's `problems`, and what only the model could tell in `needs_model`. Raises
    AdapterError for what is no adapter file, or damaged.
    """
    source = as_path(path)
    chosen = _detect(source)
    try:
        return chosen.read(
            source, None if model is None else Names(unwrapped(model)), Given(allow_pickle, alpha, tuple(parts))
        )
    except AdapterError as error:
        raise AdapterError(f"cannot read {source}: {error}") from None


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ expanded; raises AdapterError for what no file system takes."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{path!r} is no path: {error}") from None
    return expanded


def _detect(path: Path) -> Format:
    if not path.exists():
        raise AdapterError(f"cannot load {path}: there is no such file or directory (lorank reads local files only)")
    if not path.is_file() and not path.is_dir():
        raise AdapterError(f"cannot load {path}: it is no regular file, and reading it might never end")
    found = detect(path)
    if found is not None:
        return FORMATS[found]
    inside = sorted(str(found.parent) for found in path.glob("*/adapter_config.json")) if path.is_dir() else []
    hint = f"; there are adapters in {enumerate_names(inside)}" if inside else ""
    raise AdapterError(
        f"cannot load {path}: it is no adapter in a format that lorank reads ({', '.join(FORMATS)}){hint}"
    )
