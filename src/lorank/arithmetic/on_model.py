"""Arithmetic with adapters that are on a model: the result is put on it as an adapter."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from ..errors import AdapterError, raise_problems
from ..formats.content import Content, gather
from ..formats.fitting import fit
from ..planning import name_problems
from ..surgery import only_adapter, remove, require_name, set_active
from ..tree import active_adapters, require_not_folded, require_not_sharded, unwrapped
from .combine import CombinationMethod, combine as combine_contents, require_options
from .reports import Report, warn_of_losses
from .resize import resize as resize_content


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    *,
    method: CombinationMethod = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    whole: str | None = None,
    activate: bool = True,
) -> Report:
    """Put the weighted sum of adapters on the model as an adapter of its own, and return a report.

    weights: {name: weight}, of adapters on the model; they stay. A negative weight takes an adapter's effect away.
    into: the name of the new one, which becomes the only active adapter unless `activate` is False.
    method: "exact" (ranks add up: the same function as the sum of the updates), "svd" (in the largest rank of the
        adapters), "ties", "dare" or "dare-ties"; see `lorank.arithmetic.combine`.
    rank: at most so many, by SVD; the report has the error of every layer.
    density, seed: of "ties" and "dare".
    whole: the adapter whose copies (`train_also`), biases and rows of tokens are taken where adapters have
        different ones.

    Raises AdapterError before anything is changed. Warns when a layer loses more than half of its update.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot combine")
    require_not_sharded(model, "cannot combine")
    if not isinstance(weights, Mapping):
        raise AdapterError(f"cannot combine: the weights are {weights!r}; give {{adapter: weight}}")
    raise_problems("cannot combine", name_problems(model, into))
    for name in weights:
        require_name(model, name, "combine")
    require_options({name: (None, weight) for name, weight in weights.items()}, method, rank, density, whole)
    made, report = combine_contents(
        {name: (gather(model, name), weight) for name, weight in weights.items()},
        method=method,
        rank=rank,
        density=density,
        seed=seed,
        whole=whole,
    )
    fit(model, _by_parts(made), into, activate=activate, allow_other_base=False)
    warn_of_losses(report)
    return report


def resize(
    model: nn.Module,
    name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    into: str | None = None,
) -> Report:
    """Give an adapter another rank, and return a report with the error of every layer.

    name: of the adapter; without it the only one there is.
    rank, energy: one of the two; see `lorank.arithmetic.resize`.
    into: a name for the result, which is not activated; without it, it takes the adapter's place. Its parameters are
        new ones then: an optimiser needs to be made anew.

    Raises AdapterError before anything is changed. Warns when a layer loses more than half of its update.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot resize")
    require_not_sharded(model, "cannot resize")
    chosen = require_name(model, name, "resize") if name is not None else only_adapter(model, "resize")
    if into is not None:
        raise_problems("cannot resize", name_problems(model, into))
    before = gather(model, chosen)
    made, report = resize_content(before, rank, energy=energy)
    if into is not None:
        fit(model, _by_parts(made), into, activate=False, allow_other_base=False)
    else:
        active = tuple(active_adapters(model))
        remove(model, chosen)
        try:
            fit(model, _by_parts(made), chosen, activate=False, allow_other_base=False)
        except BaseException:
            fit(model, _by_parts(before), chosen, activate=False, allow_other_base=True)
            raise
        finally:
            set_active(model, active)
    warn_of_losses(report)
    return report


def _by_parts(content: Content) -> Content:
    """Return a content that says of its parts that they are these, as one from a file does."""
    updates = {name: dataclasses.replace(update, by_parts=True) for name, update in content.updates.items()}
    return dataclasses.replace(content, updates=updates)
