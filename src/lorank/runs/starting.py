"""Starting a run from an adapter that was trained before, as the paper starts MRPC, RTE and STS-B from MNLI."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..calibrating import calibrated_leaves
from ..errors import AdapterError, enumerate_names, raise_problems
from ..formats import Content, read
from ..formats.fitting import fit
from ..names import label_of, lies_in
from ..planning import Plan
from ..surgery import adapter_parameters, remove
from ..tokens import TokenRows
from ..tree import entries
from ..variants import Adapter, Spec, Update

_SOURCE = "start"  # the name of the other adapter, as long as it is on the model


def start_from(source: str, model: nn.Module, plan: Plan, about: Mapping[str, Any]) -> list[str]:
    """Put the values of a saved adapter into the one that `plan` made; return remarks.

    source: folder of an adapter, or of a run.
    about: what the new adapter is for, as `Task.about` says it.

    Every trained tensor of the one must have its counterpart in the other, of the same shape and with the same scale.
    Trained copies, such as a classifier's head, are taken where both are for the same labels, and start anew where they
    are not. Raises AdapterError, with every problem, before anything is changed.
    """
    from .loading import folder_of  # which imports what prepares a run, and that imports this

    if plan.whole:
        raise AdapterError("full training has no adapter that could start from one; give a trained model as the model")
    if calibrated_leaves(model, plan.adapter):
        raise AdapterError(f"{type(plan.spec).__name__} starts from data, and cannot start from an adapter too")
    folder = folder_of(source)
    content = read(folder, model)
    same_head = (content.task, content.about.get("labels")) == (about.get("task"), about.get("labels"))
    left = [] if same_head else sorted(content.copies.keys() - set(plan.arranged))
    for copy in left:
        del content.copies[copy]
    try:
        fit(model, content, _SOURCE, activate=False, allow_other_base=False)
    except AdapterError as error:
        raise AdapterError(f"cannot start from {source}: {error}") from None
    try:
        given, own = _values(model, _SOURCE), _values(model, plan.adapter)
        anew = [copy for copy in plan.copies if not any(lies_in(name, [copy]) for name in given)]
        wanted = {name: value for name, value in own.items() if not any(lies_in(name, [copy]) for copy in anew)}
        raise_problems(
            f"cannot start from {source}",
            _differences(given, wanted) + _other_scales(model, plan.adapter) + _other_baselines(content, plan),
        )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(given[name])
            _take_frozen(model, plan.adapter)
    finally:
        remove(model, _SOURCE)
    taken = f"{len(wanted)} tensors start from {source}"
    if not anew:
        return [taken]
    labels = content.about.get("labels")
    trained = f"trained for {', '.join(map(str, labels))}" if labels else f"for {content.task or 'another task'}"
    return [f"{taken}; {', '.join(anew)} starts anew" + (f", as the other is {trained}" if left else "")]


def _values(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by a name that is the same for all adapters: layer and factor."""
    marker = f"adapters.{adapter}."
    return {name.replace(marker, "", 1): value for name, value in adapter_parameters(model, adapter).items()}


def _take_frozen(model: nn.Module, adapter: str) -> None:
    """Take what the updates have beside their parameters and do not train, as LoRA-FA's A and where PiSSA started."""
    source = entries(model, _SOURCE)
    for layer, (_, entry) in entries(model, adapter).items():
        if layer in source and isinstance(entry, Adapter):
            given = dict(source[layer][1].named_buffers())
            for name, buffer in entry.named_buffers():
                buffer.copy_(given[name])


def _differences(given: Mapping[str, nn.Parameter], wanted: Mapping[str, nn.Parameter]) -> list[str]:
    problems = []
    if missing := sorted(wanted.keys() - given.keys()):
        problems.append(f"it has no {enumerate_names(missing, 3)}, which this recipe trains")
    if unknown := sorted(given.keys() - wanted.keys()):
        problems.append(f"it has {enumerate_names(unknown, 3)}, which this recipe does not train")
    shapes = [
        f"{name} is {tuple(given[name].shape)} in it and {tuple(value.shape)} here"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    return problems + shapes[:3] + ([f"{len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])


def _other_scales(model: nn.Module, adapter: str) -> list[str]:
    """Return a problem where the scale of an update is another: its factors would make another update then."""
    methods = {spec.variant for spec in _specs(model, _SOURCE).values()} ^ {
        spec.variant for spec in _specs(model, adapter).values()
    }
    if methods:
        return [
            f"one of the two is {' and '.join(sorted(methods))}: the same numbers make another update in another method"
        ]
    before, now = _scales(model, _SOURCE), _scales(model, adapter)
    other = [place for place in before.keys() & now.keys() if before[place] != now[place]]
    if not other:
        return []
    first = min(other)
    return [f"its scale is {before[first]:g} on {first} and this recipe's {now[first]:g}: give the same alpha and rank"]


def _other_baselines(content: Content, plan: Plan) -> list[str]:
    """Return a problem where what runs beside the layers was asked for otherwise: its values would mean another."""
    own = {baseline.variant: baseline for baseline in plan.baselines}
    other = [one for one in content.baselines if own.get(one.variant) != one]
    return [f"it has {one}, and this recipe {own.get(one.variant, 'has none')}" for one in other]


def _scales(model: nn.Module, adapter: str) -> dict[str, float]:
    """Return the scale of each update by its place."""
    return {place: spec.scale for place, spec in _specs(model, adapter).items()}


def _specs(model: nn.Module, adapter: str) -> dict[str, Spec]:
    """Return the spec of each update by its place; rows of tokens have none."""
    found: dict[str, Spec] = {}
    for layer, (_, entry) in entries(model, adapter).items():
        for leaf in entry.leaves() if isinstance(entry, Adapter) else ():
            if isinstance(leaf, Update) and not isinstance(leaf, TokenRows):
                found[label_of(layer, leaf.part)] = leaf.spec
    return found
