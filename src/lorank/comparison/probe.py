"""What a method costs, measured in a process of its own: the time and memory of a step, and of a forward pass.

    python -m lorank.comparison.probe RECIPE STEPS PASSES

prints one line of JSON. Its process trains nothing else, so that its peak is the method's.
"""

import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError
from ..merging import merge
from ..prefixes import special_tokens
from ..runs.prepare import Prepared, prepare, seed_everything
from ..runs.recipe import Recipe
from ..runs.run import peak_memory
from ..runs.subject import ADAPTER
from ..surgery import remove
from ..tasks.base import Tensors, evaluating, to_device
from ..training import RankBudget, train
from ..variants import AdaLoRA


def measure(recipe: Recipe, steps: int, passes: int) -> dict[str, Any]:
    """Return what so many training steps and forward passes on held-out examples take.

    step: seconds of each step but the first. memory: bytes at the peak of these steps: of the process, or of the
    allocator on a GPU. latency: seconds of a forward pass of the adapted model, merged where the method merges, and
    of the base, one after the other: a pair each pass.
    """
    prepared = prepare(recipe)
    inference = [baseline.inference() for baseline in prepared.plan.baselines] or ["none added once merged"]
    seed_everything(recipe.seed)
    step, memory = _steps(prepared, steps)
    size = sum(parameter.numel() for parameter in prepared.subject.parameters().values())
    return {
        "trainable_parameters": size,
        "step": step,
        "memory": memory,
        "latency": _passes(prepared, passes, inference),
        "inference": inference,
    }


def _steps(prepared: Prepared, steps: int) -> tuple[list[float], int]:
    model, device = prepared.model, prepared.device
    examples, task = prepared.train, prepared.task
    batches = (
        to_device(task.collate([examples[i] for i in numbers]), device) for numbers in prepared.order.from_batch(0)
    )
    # Steps enough to be timed, whatever the run has.
    total = max(steps + 1, prepared.config.steps or 0)
    config = dataclasses.replace(prepared.config, steps=total)
    budget = RankBudget(model, total, ADAPTER) if isinstance(prepared.plan.spec, AdaLoRA) else None

    def loss(batch: Tensors) -> tuple[torch.Tensor, int]:
        summed, weight = task.loss(model, batch)
        return summed if budget is None else summed + weight * budget.penalty(), weight

    found: list[float] = []
    model.train()
    began = time.perf_counter()
    for step in train(prepared.subject.parameters(), loss, batches, config):
        if budget is not None:
            budget.update(step.index)
        _wait(device)
        found.append(time.perf_counter() - began)
        if step.index == 1:  # the optimiser's moments are there from now on
            _forget_peak(device)
        if step.index > steps:
            break
        began = time.perf_counter()
    return found[1:], _peak(device)


def _passes(prepared: Prepared, passes: int, inference: list[str]) -> list[tuple[float, float]]:
    """Return pairs of seconds: of the adapted model, and of its base. What cannot be merged says so in `inference`."""
    examples = (prepared.held_out or prepared.train)[: prepared.recipe.batch_size]
    task, device = prepared.task, prepared.device
    whole = prepared.plan.whole
    base = copy.deepcopy(prepared.model)
    if not whole:
        remove(base, ADAPTER)
    special = None if whole else special_tokens(prepared.model)
    if not whole and all(baseline.merges for baseline in prepared.plan.baselines):
        try:
            merge(prepared.model, ADAPTER)
        except AdapterError as error:
            reason = str(error).replace("\n", " ")
            inference[:] = [f"not merged, which this adapter cannot be: {reason}"]
    inputs = to_device(task.collate(examples), device)
    task.surround(None, ())
    plain = to_device(task.collate(examples), device)
    task.surround(special, ())

    def timed(run: Callable[[], object]) -> float:
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - began

    found = []
    with evaluating(prepared.model), evaluating(base):
        for number in range(passes + 2):
            pair = timed(lambda: task.loss(prepared.model, inputs)), timed(lambda: task.loss(base, plain))
            if number > 1:
                found.append(pair)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    """Count the peak of memory from here on, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")


def _peak(device: torch.device) -> int:
    status = Path("/proc/self/status")
    if device.type != "cuda" and status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return peak_memory(device)


def overhead(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return how many times as long the first of a pair takes as the second: the median of the ratios, and an interval.

    The interval is between two of the ratios themselves, so that it holds their true median at 95 %; between the lowest
    and the highest where there are fewer than six, which hold it less often.
    """
    ratios = sorted(first / second for first, second in pairs)
    count, left_out = len(ratios), 0
    # At most 2.5 % of all ways in which so many ratios fall around their true median have so few of them on a side.
    while 40 * sum(math.comb(count, below) for below in range(left_out + 2)) <= 2**count:
        left_out += 1
    return statistics.median(ratios), ratios[left_out], ratios[-1 - left_out]


if __name__ == "__main__":
    print(json.dumps(measure(Recipe.of(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
