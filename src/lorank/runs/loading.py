"""A base with trained adapters on it, found from the adapters themselves."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..formats import Content, load, read
from ..formats.content import outputs_of_head
from ..models import Base, computing, known_labels, load_base, task_of
from ..names import lies_in
from .recipe import Recipe
from .run import RECIPE
from .subject import ABOUT, AdapterSubject, WholeModel


@dataclass
class Loaded:
    """One base in memory and adapters by name, none of them active."""

    base: Base
    name: str  # where the base was loaded from
    about: dict[str, Any]  # of the first adapter: task, columns, labels
    adapters: dict[str, Path]
    abouts: dict[str, dict[str, Any]]  # of each adapter

    @property
    def model(self) -> Any:
        return self.base.model

    def label_names(self) -> list[str]:
        """Return the labels as the base's configuration has them; those that nobody named are numbers."""
        names = self.model.config.id2label
        return [names[i].removeprefix("LABEL_") for i in range(len(names))]


def load_adapted(
    model: str | None,
    adapters: Sequence[str],
    *,
    task: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_other_base: bool = False,
) -> Loaded:
    """Return a base with adapters.

    model: the base; without it, the one that the first adapter was trained on, as its run or its file says.
    adapters: folders of adapters or of runs, each as PATH or NAME=PATH.
    task: of the model; without it, the task that the first adapter was trained for.

    Raises AdapterError when it is not known which base or task is meant, and when adapters do not go together.
    """
    from .prepare import choose_device, choose_dtype

    places = named(adapters)
    contents = {name: read(path) for name, path in places.items()}
    first = next(iter(contents.values()), None)
    about = dict(first.about) if first is not None else {}
    if task not in (None, "causal-lm", "classification", "regression"):
        raise AdapterError(f"task is {task!r}; it must be causal-lm, classification or regression")
    model, of_model = model_of(model) if model is not None else (None, {})
    about = about or of_model
    name = model or (base_of(next(iter(places.values())), first) if first is not None else None)
    if name is None:
        raise AdapterError("which base? Give --model; " + ("the adapter does not say" if places else "or an --adapter"))
    chosen = task or (first.task if first is not None else task_of(name)) or "causal-lm"
    for other, content in contents.items():
        if (content.task or chosen) != chosen or content.about.get("labels") != about.get("labels"):
            raise AdapterError(
                f"adapters {', '.join(contents)} do not go together: '{other}' is for {_purpose(content.about)}, "
                f"the first for {_purpose(about)}"
            )
    changed = about.get("model_options")
    for other, content in contents.items():
        own = computing(content.about.get("model_options"))
        if own != computing(changed):
            raise AdapterError(
                f"adapters {', '.join(contents)} do not go together: '{other}' was trained on a base with "
                f"{own} in its configuration, the first with {computing(changed)}"
            )
    if dtype not in ("auto", "float32", "bfloat16"):
        raise AdapterError(f"dtype is {dtype!r}; it must be auto, float32 or bfloat16")
    where = choose_device(device)
    labels = labels_of(first, name) if first is not None else None
    base = load_base(name, chosen, dtype=choose_dtype(dtype, where), labels=labels, device=where, changed=changed)
    for adapter, path in places.items():
        require_trained_head(base, contents[adapter].copies, f"adapter '{adapter}'")
        load(base.model, path, adapter, activate=False, allow_other_base=allow_other_base)
    return Loaded(base, name, about | {"task": chosen}, places, {key: c.about for key, c in contents.items()})


def require_trained_base(loaded: Loaded) -> None:
    """Raise unless the base can be used without an adapter."""
    if loaded.base.fresh:
        raise AdapterError(
            f"{loaded.name} alone has no trained {', '.join(loaded.base.fresh)}: its answers would be random. Score or "
            "ask its adapters instead"
        )


def require_trained_head(base: Base, copies: Iterable[str], adapter: str) -> None:
    """Raise unless an adapter brings a copy of every module for which the base has no weights."""
    untrained = [module for module in base.fresh if not lies_in(module, copies)]
    if untrained:
        raise AdapterError(f"the base has no weights for {', '.join(untrained)}, and {adapter} brings none")


def labels_of(content: Content, base: str) -> list[str] | None:
    """Return the names of a classifier's labels: the adapter's, or made-up ones where only their number is known.

    None leaves them as the base has them.
    """
    if content.task != "classification" or content.about.get("labels"):
        return content.about.get("labels") or (["LABEL_0"] if content.task == "regression" else None)
    count = outputs_of_head(content)
    return [f"LABEL_{i}" for i in range(count)] if count and count != len(known_labels(base)) else None


def folder_of(adapter: str) -> Path:
    """Return the folder of an adapter, given it or the run that it is the result of."""
    path = Path(adapter).expanduser()
    if (path / WholeModel.kept / ABOUT).is_file():
        raise AdapterError(f"the run {adapter} has trained a whole model, and no adapter: give it as --model {adapter}")
    if (path / RECIPE).is_file():
        if not (path / AdapterSubject.kept).is_dir():
            raise AdapterError(f"the run {adapter} has no adapter yet; go on with lorank train --resume {adapter}")
        return path / AdapterSubject.kept
    return path


def model_of(model: str) -> tuple[str, dict[str, Any]]:
    """Return where a base is, given it or the run that trained all of one, and what it was trained for."""
    path = Path(model).expanduser()
    path = path / WholeModel.kept if (path / WholeModel.kept / ABOUT).is_file() else path
    if not (path / ABOUT).is_file():
        return model, {}
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path / ABOUT} is damaged: {error}") from None
    return str(path), about if isinstance(about, dict) else {}


def base_of(adapter: Path, content: Content) -> str | None:
    """Return the base that an adapter was trained on: from the run that it lies in, or from what its file says."""
    recipe = adapter.parent / RECIPE
    return Recipe.of(str(recipe)).model if recipe.is_file() else content.base_model


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Return adapters by name, each given as PATH or NAME=PATH; without one, by that of their folder, or of their run.

    Raises AdapterError for two of one name.
    """
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if "/" in name or Path(given).exists():  # the sign belongs to the path, as in runs/lr=0.01
            name, equals = "", ""
        folder = folder_of(path if equals else given)
        if not equals:
            resolved = folder.resolve()
            in_run = resolved.name == AdapterSubject.kept and (resolved.parent / RECIPE).is_file()
            name = (resolved.parent if in_run else resolved).name.replace(".", "_")
        if name in found:
            raise AdapterError(f"two adapters are called '{name}'; name them: first=PATH second=PATH")
        found[name] = folder
    return found


def _purpose(about: dict[str, Any]) -> str:
    labels = about.get("labels")
    return f"{about.get('task', 'an unknown task')}" + (f" ({', '.join(labels)})" if labels else "")
