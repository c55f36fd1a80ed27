"""The method that a recipe asks for, as a spec; and the data that it has to see before it can be trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..calibrating import calibrate, calibrated_leaves
from ..data import Example, Order
from ..errors import AdapterError, did_you_mean
from ..planning import Plan
from ..tasks import Task
from ..tasks.base import to_device
from ..variants import METHODS, Spec
from .recipe import SHARED, Recipe, options_of


def spec_of(recipe: Recipe) -> Spec:
    """Return the spec that a recipe describes; raises AdapterError for what its method does not have."""
    method = METHODS[recipe.method]
    known = {field.name: field.default for field in dataclasses.fields(method)}
    given: dict[str, Any] = {}
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for name in SHARED:
        value = getattr(recipe, name)
        if value is None or value == defaults[name]:
            continue
        if name not in known:
            raise AdapterError(f"{recipe.method} has no {name}; it has {', '.join(known)}")
        given[name] = value
    own = options_of(method)
    for name, value in recipe.method_options.items():
        if name not in own:
            hint = did_you_mean(name, own) if own else "it has none"
            raise AdapterError(f"method_options: {recipe.method} has no option '{name}'; {hint}")
        given[name] = value
    rank = given.get("rank", known["rank"])
    if "alpha" in known:
        given.setdefault("alpha", 2.0 * rank)
    try:
        return method(**given)
    except TypeError as error:
        raise AdapterError(f"method_options cannot be used: {error}") from None


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
