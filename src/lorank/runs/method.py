"""The methods that a recipe asks for, as specs; and the data that some have to see before they can be trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..baselines import BASELINES, Baseline
from ..calibrating import calibrate, calibrated_leaves
from ..data import Example, Order
from ..errors import AdapterError, did_you_mean, enumerate_names
from ..planning import Plan
from ..tasks import Task
from ..tasks.base import to_device
from ..variants import METHODS, Spec
from .recipe import SHARED, Recipe, options_of


def methods_of(recipe: Recipe) -> list[Spec | Baseline]:
    """Return the specs that a recipe describes; raises AdapterError for what its methods do not have."""
    kinds: list[Any] = [{**METHODS, **BASELINES}[method] for method in recipe.method.split("+")]
    options = {method.variant: options_of(method) for method in kinds}
    for name in recipe.method_options:
        if not any(name in own for own in options.values()):
            known = [option for own in options.values() for option in own]
            hint = did_you_mean(name, known) if known else "it has none"
            raise AdapterError(f"method_options: {recipe.method} has no option '{name}'; {hint}")
    updates = [method for method in kinds if issubclass(method, Spec)]
    if not updates:
        _refuse_shared(recipe, kinds)
    made: list[Spec | Baseline] = [_spec_of(recipe, method) for method in updates]
    for method in kinds:
        if not issubclass(method, Spec):
            given = {name: value for name, value in recipe.method_options.items() if name in options[method.variant]}
            made.append(method(**given))
    return made


def special_tokens_around(recipe: Recipe) -> int:
    """Return how many special tokens a recipe's methods put around every prompt."""
    return sum(method.around() for method in methods_of(recipe) if isinstance(method, Baseline))


def _spec_of(recipe: Recipe, method: type[Spec]) -> Spec:
    """Return the spec of updates that a recipe describes."""
    known = {field.name: field.default for field in dataclasses.fields(method)}
    given = _shared(recipe)
    if unknown := [name for name in given if name not in known]:
        raise AdapterError(f"{method.variant} has no {unknown[0]}; it has {', '.join(known)}")
    own = options_of(method)
    given |= {name: value for name, value in recipe.method_options.items() if name in own}
    rank = given.get("rank", known["rank"])
    if "alpha" in known:
        given.setdefault("alpha", 2.0 * rank)
    try:
        return method(**given)
    except TypeError as error:
        raise AdapterError(f"method_options cannot be used: {error}") from None


def _shared(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says of the fields that methods of updates share."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    given = {name: getattr(recipe, name) for name in SHARED}
    return {name: value for name, value in given.items() if value is not None and value != defaults[name]}


def _refuse_shared(recipe: Recipe, kinds: Sequence[type[Baseline]]) -> None:
    """Raise AdapterError for keys that say something of updates, where there are none."""
    given = [*_shared(recipe), *(name for name in ("ranks", "alphas", "tie") if getattr(recipe, name))]
    given += ["lora_plus"] if recipe.lora_plus != 1 else []
    given += ["targets"] if any(not target.startswith("!") for target in targets_of(recipe, []) or []) else []
    if given:
        own = [option for method in kinds for option in options_of(method)]
        has = f"; it has {', '.join(own)} (method_options)" if own else ""
        raise AdapterError(f"{recipe.method} has no {enumerate_names(given)}{has}")


def targets_of(recipe: Recipe, methods: Sequence[Spec | Baseline]) -> list[str] | None:
    """Return the targets for `adapt`; baselines alone have places of their own, and take the default for none."""
    default = dataclasses.fields(Recipe)[[field.name for field in dataclasses.fields(Recipe)].index("targets")]
    assert callable(default.default_factory), "a list"
    alone = not any(isinstance(method, Spec) for method in methods)
    return None if alone and recipe.targets == default.default_factory() else recipe.targets


def show_data(
    recipe: Recipe, plan: Plan, model: Any, task: Task, examples: Sequence[Example], order: Order, device: torch.device
) -> tuple[Plan, list[str]]:
    """Run the first batches for a method that starts from data; return the plan as it is then, and remarks."""
    if not calibrated_leaves(model, plan.adapter):
        return plan, []
    batches = []
    for numbers in order.from_batch(0):
        if len(batches) == recipe.calibrate:
            break
        batches.append(to_device(task.collate([examples[i] for i in numbers]), device))
    model.eval()  # the same every time: a run that is resumed does it again
    ranks = calibrate(model, lambda batch: task.loss(model, batch), batches, plan.adapter, mask=_tokens)
    leaves = calibrated_leaves(model, plan.adapter)
    places = tuple(dataclasses.replace(place, spec=leaves[place.label][1].spec) for place in plan.places)
    dealt = f", ranks {min(ranks.values())} to {max(ranks.values())}" if len(set(ranks.values())) > 1 else ""
    seen = f"{type(plan.spec).__name__} started from {len(batches)} batches of the training data{dealt}"
    return dataclasses.replace(plan, places=places), [seen]


def _tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return batch["attention_mask"]
