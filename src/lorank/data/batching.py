"""Which examples make which batch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_POOL = 50  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Order:
    """An endless order of batches: every pass takes each example once, shuffled anew, in batches of like length.

    Neighbours in length share a batch, so that little is spent on padding; the batches themselves come in random
    order. The order is a function of the seed and the lengths alone, so that it can begin anywhere.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int

    @property
    def per_pass(self) -> int:
        """Batches in one pass over the examples."""
        return -(-len(self.lengths) // self.batch_size)

    def from_batch(self, start: int = 0) -> Iterator[list[int]]:
        """Yield lists of example numbers, beginning with batch number `start`, from 0; without end."""
        for number in itertools.count(start // self.per_pass):
            skipped = start % self.per_pass if number == start // self.per_pass else 0
            yield from self._one_pass(number)[skipped:]

    def _one_pass(self, number: int) -> list[list[int]]:
        generator = torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + number)
        shuffled = torch.randperm(len(self.lengths), generator=generator, device="cpu").tolist()
        size = _POOL * self.batch_size
        batches = []
        for begin in range(0, len(shuffled), size):
            pool = sorted(shuffled[begin : begin + size], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        order = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
        return [batches[i] for i in order]


def in_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches of like length over all examples once, the longest first: what evaluation reads."""
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
