"""An arm of a comparison: a method with its settings, as keys over the recipe that all arms share."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterError, did_you_mean, raise_problems
from ..extras import require
from ..runs.method import methods_of
from ..runs.recipe import BASELINES, METHODS, Recipe

# Keys that say something of a method, and nothing to another.
_OF_METHOD = (
    *("method_options", "rank", "alpha", "dropout", "rank_stabilised", "init", "ranks", "alphas", "tie"),
    *("targets", "learning_rate", "lora_plus"),
)
_ARM = re.compile(r"([^{}\s]+)\s*(\{.*\})?", re.DOTALL)
_EXAMPLE = "give names such as lora, or adapter-h{size: 16}"


@dataclass(frozen=True)
class Arm:
    """One of the methods that are compared."""

    label: str  # as it was given: "adapter-h{size: 16}"
    keys: dict[str, Any] = field(default_factory=dict)  # of the recipe

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.+-]+", "-", self.label.replace("!", "not-")).strip("-")

    def recipe(self, shared: Recipe, **changes: Any) -> Recipe:
        """Return the shared recipe with the arm's own keys; what only the shared method has is left out."""
        base = {name: getattr(shared, name) for name in Recipe.names()}
        if self.keys["method"] != shared.method:
            base |= {name: _default(name) for name in _OF_METHOD}
            if "lora" in str(self.keys["method"]).split("+"):  # with something beside it
                base |= {name: getattr(shared, name) for name in ("rank", "alpha", "targets")}
        return Recipe(**{**base, **self.keys, **changes})


def arms_of(text: str, shared: Recipe) -> list[Arm]:
    """Return the arms that "lora,adapter-h{size: 16},full{learning_rate: 2e-5}" names.

    What stands in braces are keys of the recipe, or options of the method. Raises AdapterError, with every problem.
    """
    yaml = require("yaml", "reading methods")
    found: list[Arm] = []
    problems = []
    for word in _words(text):
        match = _ARM.fullmatch(word)
        if match is None:
            problems.append(f"'{word}' is no method; {_EXAMPLE}")
            continue
        try:
            name, settings = match[1], yaml.safe_load(match[2] or "{}")
        except yaml.YAMLError as error:
            problems.append(f"'{word}' is no YAML in its braces ({getattr(error, 'problem', error)}); {_EXAMPLE}")
            continue
        empty = [key for key, value in settings.items() if value is None or not isinstance(key, str)]
        if empty:
            problems.append(f"'{word}' gives {empty[0]} no value; {_EXAMPLE}")
            continue
        unknown = [part for part in name.split("+") if part not in METHODS + BASELINES]
        if unknown:
            problems.append(f"there is no method '{unknown[0]}'; {did_you_mean(unknown[0], METHODS + BASELINES)}")
            continue
        keys = {key: value for key, value in settings.items() if key in Recipe.names()}
        options = {key: value for key, value in settings.items() if key not in keys}
        arm = Arm(word, {**keys, "method": name, **({"method_options": options} if options else {})})
        try:
            methods_of(arm.recipe(shared))
        except AdapterError as error:
            problems.append(f"{word}: {error}")
        found.append(arm)
    folders = [arm.folder for arm in found]
    alike = [arm for arm in found if folders.count(arm.folder) > 1]
    if alike and all(arm.keys == alike[0].keys for arm in alike):
        problems.append(f"'{alike[0].label}' is named twice")
    elif alike:
        problems.append(f"{' and '.join(arm.label for arm in alike)} would have the same folder, {alike[0].folder}")
    if not found and not problems:
        problems.append("no method was named")
    raise_problems("cannot compare these methods", problems)
    return found


def _words(text: str) -> list[str]:
    """Return what stands between commas, but for those in braces or brackets."""
    words, depth = [""], 0
    for sign in text:
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and depth <= 0:
            words.append("")
        else:
            words[-1] += sign
    return [word.strip() for word in words if word.strip()]


def _default(name: str) -> Any:
    one = next(one for one in dataclasses.fields(Recipe) if one.name == name)
    return one.default if one.default is not dataclasses.MISSING else one.default_factory()  # type: ignore[misc]
