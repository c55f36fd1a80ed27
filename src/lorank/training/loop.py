"""The training loop: a generator of optimiser steps. Logging, evaluation and saving are the caller's own code."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, AdapterWarning, DivergedError, raise_problems
from ..idle import idle_experts, is_idle
from ..surgery import AdapterParameters
from .groups import by_pace
from .state import TrainState

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class TrainConfig:
    """How to optimise. Raises AdapterError, naming every field that is wrong.

    steps: optimiser steps; None takes one pass over the batches. With more steps than batches they are read again.
    learning_rate: the highest value of the schedule.
    schedule: `constant`, or falling to 0 in a `linear` or `cosine` way after the warm-up.
    warmup: steps in which the rate rises linearly from 0.
    weight_decay, betas, epsilon: of AdamW (Loshchilov & Hutter 2019).
    clip: largest norm of the gradient; None for no limit.
    accumulate: batches whose gradients make one step.
    lora_plus: how many times as fast B learns as A (LoRA+); see `parameter_groups`.
    """

    steps: int | None = None
    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    accumulate: int = 1
    lora_plus: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            problems.append(f"steps is {self.steps}; it must be a whole number of at least 1, or None for one pass")
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            problems.append(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.schedule not in ("constant", "linear", "cosine"):
            problems.append(f"schedule is {self.schedule!r}; it must be constant, linear or cosine")
        if self.schedule != "constant" and self.steps is None:
            problems.append(f"a {self.schedule} schedule needs `steps`, to know where it ends")
        if not isinstance(self.warmup, int) or self.warmup < 0 or (self.steps is not None and self.warmup > self.steps):
            problems.append(f"warmup is {self.warmup}; it must lie between 0 and steps")
        if not (self.weight_decay >= 0 and self.epsilon >= 0):
            problems.append(f"weight_decay is {self.weight_decay} and epsilon {self.epsilon}; neither may be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas are {self.betas}; they must be two numbers in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            problems.append(f"clip is {self.clip}; it must be above 0, or None")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            problems.append(f"accumulate is {self.accumulate}; it must be a whole number of at least 1")
        if not 0 < self.lora_plus < math.inf:
            problems.append(f"lora_plus is {self.lora_plus}; it must be above 0")
        raise_problems("TrainConfig cannot be set up like this", problems)

    def rate(self, index: int) -> float:
        """Return the learning rate of a step; the first has index 1."""
        if index <= self.warmup:
            return self.learning_rate * index / (self.warmup + 1)
        if self.schedule == "constant" or self.steps is None:
            return self.learning_rate
        done = (index - 1 - self.warmup) / max(1, self.steps - self.warmup)  # 0 at the first step after the warm-up
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Step:
    """One optimiser step. Its tensors stay on the device of the loss."""

    index: int  # from 1
    loss: Tensor  # 0-dim, the mean over the step's batches, weighted
    grad_norm: Tensor  # 0-dim, before clipping
    learning_rate: float
    weight: float  # what the step's batches weigh together: their trained tokens, or their number


def train(
    parameters: Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    loss: Callable[[Batch], Tensor | tuple[Tensor, Any]],
    batches: Iterable[Batch],
    config: TrainConfig | None = None,
    *,
    state: TrainState | None = None,
) -> Iterator[Step]:
    """Optimise `parameters` on `loss(batch)` with AdamW, yielding after every optimiser step.

    parameters: the parameters, or a mapping by their names, from which experts of a mixture are known: one that saw
        no token goes without a gradient.
    loss: returns the batch's mean loss, or (summed loss, weight), such as the sum over the trained tokens and
        their number. With the pair, accumulating gradients gives exactly the step of the one large batch;
        with means, each batch counts alike.
    batches: read again from the start when `config.steps` needs more, unless it is an iterator.
    state: kept current, to be stored by the caller; of one that was stored, the training goes on with the step after
        it and up to `config.steps`, and `batches` are those that follow.

    The caller owns the loop: `break` stops early, whatever is in the body runs between steps.

        model.train()
        for step in lorank.train(lorank.adapter_parameters(model), loss, batches, config):
            if step.index % 100 == 0:
                print(step.index, float(step.loss))

    Raises AdapterError when the loss or a gradient is not finite, before the optimiser moves anything; when a
    parameter has no gradient after the first backward pass, or none has one after a later one.
    """
    config = config or TrainConfig()
    if isinstance(parameters, nn.Module):
        raise AdapterError("cannot train: give parameters, such as lorank.adapter_parameters(model), not the model")
    trained = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
    names = [str(name) for name in parameters] if isinstance(parameters, Mapping) else []
    if not trained:
        raise AdapterError("cannot train: there are no parameters to train")
    paced = [(trained, 1.0)]
    if config.lora_plus != 1:
        if not isinstance(parameters, AdapterParameters):
            raise AdapterError("cannot train: lora_plus needs what lorank.adapter_parameters(model) returns, as it is")
        paced = by_pace(parameters, config.lora_plus)
    optimiser = torch.optim.AdamW(
        [{"params": group} for group, _ in paced],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in trained),
    )
    state = state or TrainState()
    state.attach(optimiser, [parameter for group, _ in paced for parameter in group])
    first = state.step + 1
    for index, group in enumerate(_groups(batches, config, state.step), start=first):
        optimiser.zero_grad(set_to_none=True)  # here and not after the step, so that the caller can look at them
        mean, weight = _backward(group, loss, trained, index)
        _require_gradients(trained, names, every_one=index == first)
        limit = math.inf if config.clip is None else config.clip
        norm = nn.utils.clip_grad_norm_(trained, limit)
        if not torch.isfinite(norm):
            raise DivergedError(
                f"the gradient of step {index} is {float(norm)} though its loss is {float(mean):g}; this step has "
                "changed nothing. Look for a square root or a logarithm of 0 in the model or the loss"
            )
        rate = config.rate(index)
        for parameter_group, (_, times) in zip(optimiser.param_groups, paced, strict=True):
            parameter_group["lr"] = rate * times
        optimiser.step()
        state.step = index
        yield Step(index, mean, norm, rate, weight)


def _backward(
    group: list[Batch], loss: Callable[[Batch], Tensor | tuple[Tensor, Any]], trained: list[nn.Parameter], index: int
) -> tuple[Tensor, float]:
    """Accumulate the gradients of a group of batches and divide them by what the batches weigh together."""
    total: Tensor | None = None
    weight = 0.0
    for batch in group:
        value = loss(batch)
        summed, count = value if isinstance(value, tuple) else (value, 1)
        if not isinstance(summed, Tensor) or summed.numel() != 1:
            shape = tuple(summed.shape) if isinstance(summed, Tensor) else type(summed).__name__
            raise AdapterError(f"loss(batch) must return one number, or (sum, weight); it returned {shape}")
        if not summed.requires_grad:
            raise AdapterError(
                f"the loss of step {index} does not depend on any trainable parameter: is the adapter active, the "
                "forward outside torch.no_grad, and gradient checkpointing used with use_reentrant=False?"
            )
        if not torch.isfinite(summed):
            raise DivergedError(
                f"the loss of step {index} is {float(summed.detach())}; this step has changed nothing. Lower "
                "the learning rate, look at the batch, or train in float32"
            )
        summed.backward()
        total = summed.detach() if total is None else total + summed.detach()
        weight += float(count)
    assert total is not None, "a group has at least one batch"
    if not 0 < weight < math.inf:
        raise AdapterError(f"the batches of step {index} weigh {weight:g}: there is nothing to train on in them")
    if weight != 1:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= weight
    return total / weight, weight


def _groups(batches: Iterable[Batch], config: TrainConfig, made: int = 0) -> Iterator[list[Batch]]:
    """Yield the batches of each step after `made` ones; a pass that ends within a step makes a smaller one."""
    while config.steps is None or made < config.steps:
        group: list[Batch] = []
        made_before = made
        for batch in batches:
            group.append(batch)
            if len(group) == config.accumulate:
                yield group
                group, made = [], made + 1
                if made == config.steps:
                    return
        if group:
            yield group
            made += 1
        if made == made_before:
            if made == 0:
                raise AdapterError("cannot train: there are no batches")
            if config.steps is not None:  # an iterator, and it is used up
                warnings.warn(f"the batches ran out after {made} of {config.steps} steps", AdapterWarning, stacklevel=3)
            return
        if config.steps is None:
            return


def _require_gradients(trained: list[nn.Parameter], names: list[str], every_one: bool) -> None:
    without = [tuple(parameter.shape) for parameter in trained if parameter.grad is None]
    if without and names:
        lacking = {name for name, parameter in zip(names, trained, strict=True) if parameter.grad is None}
        idle = idle_experts(lacking, names)
        every_one = every_one and not all(is_idle(name, idle) for name in lacking)
    if len(without) == len(trained) or (every_one and without):
        raise AdapterError(
            f"{len(without)} of {len(trained)} parameters have no gradient after the backward pass (shapes "
            f"{', '.join(map(str, without[:4]))}...): is their adapter active? lorank.check(model, name) names them"
            + ("" if names else "; for experts that may see no token, give train the parameters with their names")
        )
