"""calibrate: run a few batches for methods whose factors start from data (EVA, LoRA-GA)."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .errors import AdapterError, enumerate_names, raise_problems
from .names import label_of
from .surgery import adapter_parameters, named_or_active, set_active
from .tree import adapted_layers, entries, require_not_folded, unwrapped
from .variants import Adapter, CalibratedAdapter, EVAAdapter, deal_ranks

Batch = TypeVar("Batch")


def calibrate(
    model: nn.Module,
    loss: Callable[[Batch], Tensor | tuple[Tensor, Any] | None],
    batches: Iterable[Batch],
    name: str | None = None,
    *,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, int]:
    """Let an adapter see its data, and return the rank of each of its matrices, {label: rank}.

    To be called after `adapt` and before an optimiser is made: the adapter's parameters are new ones afterwards. The
    model computes with its base alone meanwhile, in the train or eval mode that it is in, and computes the same as its
    base afterwards. Without a name it is the active adapter that starts from data; others rest meanwhile.

    loss: runs the model on a batch. What it returns is differentiated for LoRA-GA, as `train` does it; for EVA it does
        not matter.
    batches: a few, read once: EVA needs more inputs of each layer than its rank, LoRA-GA a gradient.
    mask: returns which tokens of a batch count for EVA, (rows, tokens), so that padding does not.

    Raises AdapterError when there is nothing to calibrate, when no name tells which of several, for layers that did not
    run, and values that are not finite; then nothing has changed.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot calibrate")
    candidates = named_or_active(model, name, "calibrate")
    names = [candidate for candidate in candidates if calibrated_leaves(model, candidate)]
    if not names:
        raise AdapterError(f"cannot calibrate: {enumerate_names(candidates)} starts from no data; it is ready to train")
    if len(names) > 1:
        raise AdapterError(f"cannot calibrate: {enumerate_names(names)} start from data; name one at a time")
    found = calibrated_leaves(model, names[0])
    before = {id(layer): layer.adapters.active for layer in adapted_layers(model).values()}
    gradient = any(leaf.needs_gradient for _, leaf in found.values())
    gradients = [(p, p.grad) for p in adapter_parameters(model, names[0]).values()]  # heads and biases too
    count = 0
    try:
        set_active(model, (names[0],))
        for parameter, _ in gradients:
            parameter.grad = None
        for layer, leaf in found.values():
            leaf.begin(layer)
        with torch.set_grad_enabled(gradient):
            for batch in batches:
                counted = None if mask is None else mask(batch).bool()
                for _, leaf in found.values():
                    vars(leaf)["mask"] = counted
                value = loss(batch)
                if gradient:
                    _backward(value)
                count += 1
        if not count:
            raise AdapterError("cannot calibrate: there are no batches")
        reasons = {label: leaf.problem() for label, (_, leaf) in found.items()}
        raise_problems("cannot calibrate", [f"{label}: {reason}" for label, reason in reasons.items() if reason])
        deal_ranks([leaf for _, leaf in found.values() if isinstance(leaf, EVAAdapter)])
        for layer, leaf in found.values():
            leaf.start(layer)
    finally:
        for _, leaf in found.values():
            leaf.end()
        for parameter, gradient_before in gradients:
            parameter.grad = gradient_before
        for layer in adapted_layers(model).values():
            layer.adapters.activate(before.get(id(layer), ()))
    return {label: leaf.spec.rank for label, (_, leaf) in found.items()}


def calibrated_leaves(model: nn.Module, name: str) -> dict[str, tuple[Adapted, CalibratedAdapter]]:
    """Return {label: (layer, adapter)} of all matrices of an adapter that start from data."""
    return {
        label_of(layer_name, leaf.part): (layer, leaf)
        for layer_name, (layer, entry) in entries(model, name).items()
        for leaf in (entry.leaves() if isinstance(entry, Adapter) else ())
        if isinstance(leaf, CalibratedAdapter)
    }


def _backward(value: Any) -> None:
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise AdapterError("cannot calibrate: loss(batch) must return the loss, of which a gradient can be taken")
    if not torch.isfinite(value):
        raise AdapterError(f"cannot calibrate: the loss of a batch is {float(value.detach())}")
    value.backward()
