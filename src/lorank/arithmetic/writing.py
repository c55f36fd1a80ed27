"""Write an adapter of which there is no model: what was read from files is combined, and written again."""

import dataclasses
import os
import warnings

from ..errors import AdapterWarning, raise_problems
from ..formats import as_path, write as write_format
from ..formats.content import Content
from .sources import about_of


def write(content: Content, path: str | os.PathLike[str]) -> None:
    """Write an adapter in PEFT's layout, without a model.

    Raises AdapterError for layers that can be written with their model alone.
    """
    problems = [
        f"{layer}: how {', '.join(update.tensors)} lie in a file is known with their model alone; do this on the model "
        "(lorank.load, lorank.combine or lorank.resize, lorank.save)"
        for layer, update in content.updates.items()
        if update.host is None and list(update.tensors) != ["weight"]
        if any(tensors["A"].dim() < 3 for tensors in update.tensors.values())
    ]
    raise_problems("cannot write", problems)
    content = dataclasses.replace(content, about=about_of(content))
    for note in write_format(content, as_path(path), "peft", None):
        warnings.warn(f"{path}: {note}", AdapterWarning, stacklevel=2)
