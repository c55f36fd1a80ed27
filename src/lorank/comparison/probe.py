"""What a method costs, measured in a process of its own: the time and memory of a step, and of a forward pass.

    python -m lorank.comparison.probe RECIPE STEPS PASSES

prints one line of JSON. Its process trains nothing else, so that its peak is the method's.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..merging import merge
from ..prefixes import special_tokens
from ..runs.prepare import Prepared, prepare, seed_everything
from ..runs.recipe import Recipe
from ..runs.run import peak_memory
from ..runs.subject import ADAPTER
from ..surgery import remove
from ..tasks.base import evaluating, to_device
from ..training import train


def measure(recipe: Recipe, steps: int, passes: int) -> dict[str, Any]:
    """Return what so many training steps and forward passes on held-out examples take.

    step: seconds of each step but the first. memory: bytes at the peak of these steps: of the process, or of the
    allocator on a GPU. latency: seconds of a forward pass of the adapted model, merged where the method merges, and
    of the base, one after the other: a pair each pass.
    """
    prepared = prepare(recipe)
    seed_everything(recipe.seed)
    step, memory = _steps(prepared, steps)
    size = sum(parameter.numel() for parameter in prepared.subject.parameters().values())
    return {
        "trainable_parameters": size,
        "step": step,
        "memory": memory,
        "latency": _passes(prepared, passes),
        "inference": [baseline.inference() for baseline in prepared.plan.baselines] or ["none added once merged"],
    }


def _steps(prepared: Prepared, steps: int) -> tuple[list[float], int]:
    model, device = prepared.model, prepared.device
    examples, task = prepared.train, prepared.task
    batches = (
        to_device(task.collate([examples[i] for i in numbers]), device) for numbers in prepared.order.from_batch(0)
    )
    found: list[float] = []
    model.train()
    began = time.perf_counter()
    trained = train(prepared.subject.parameters(), lambda batch: task.loss(model, batch), batches, prepared.config)
    for step in trained:
        _wait(device)
        found.append(time.perf_counter() - began)
        if step.index == 1:  # the optimiser's moments are there from now on
            _forget_peak(device)
        if step.index > steps:
            break
        began = time.perf_counter()
    return found[1:], _peak(device)


def _passes(prepared: Prepared, passes: int) -> list[tuple[float, float]]:
    """Return pairs of seconds: of the adapted model, and of its base."""
    examples = (prepared.held_out or prepared.train)[: prepared.recipe.batch_size]
    task, device = prepared.task, prepared.device
    whole = prepared.plan.whole
    base = copy.deepcopy(prepared.model)
    if not whole:
        remove(base, ADAPTER)
    special = None if whole else special_tokens(prepared.model)
    if not whole and all(baseline.merges for baseline in prepared.plan.baselines):
        merge(prepared.model, ADAPTER)
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


def overhead(pairs: list[tuple[float, float]]) -> float:
    """Return how many times as long the first of a pair takes as the second: the median of the ratios."""
    return statistics.median(first / second for first, second in pairs)


if __name__ == "__main__":
    print(json.dumps(measure(Recipe.of(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
