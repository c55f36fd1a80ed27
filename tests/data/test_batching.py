"""Batches: every pass takes each example once, in an order that can begin anywhere."""

import itertools
import random

from hypothesis import given, settings, strategies as st

from lorank.data import Order, in_order

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=300)


def taken(order: Order, count: int, start: int = 0) -> list[list[int]]:
    return list(itertools.islice(order.from_batch(start), count))


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    """Return how many tokens of padding the batches need."""
    return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_pass_takes_each_example_once(lengths: list[int], size: int, seed: int) -> None:
    order = Order(lengths, size, seed)
    batches = taken(order, 3 * order.per_pass)
    for number in range(3):
        one_pass = batches[number * order.per_pass : (number + 1) * order.per_pass]
        assert sorted(itertools.chain(*one_pass)) == list(range(len(lengths)))
        assert sorted(map(len, one_pass), reverse=True)[:-1] == [size] * (order.per_pass - 1)


@given(LENGTHS, st.integers(1, 9), st.data())
@settings(max_examples=80, deadline=None)
def test_it_can_begin_anywhere(lengths: list[int], size: int, data: st.DataObject) -> None:
    order = Order(lengths, size, 7)
    all_batches = taken(order, 4 * order.per_pass)
    start = data.draw(st.integers(0, 3 * order.per_pass))
    assert taken(order, order.per_pass, start) == all_batches[start : start + order.per_pass]


def test_it_can_begin_at_every_batch_of_three_passes() -> None:
    order = Order([i % 13 + 1 for i in range(230)], 2, 0)  # more than one pool of 50 batches
    all_batches = taken(order, 4 * order.per_pass)
    for start in range(3 * order.per_pass + 1):
        assert taken(order, 5, start) == all_batches[start : start + 5]


def test_passes_and_seeds_differ() -> None:
    lengths = [i % 7 + 1 for i in range(64)]
    passes = [taken(Order(lengths, 4, seed), 16, start) for seed in (0, 1) for start in (0, 16)]
    assert all(a != b for a, b in itertools.combinations(passes, 2))
    assert taken(Order(lengths, 4, 0), 16) == passes[0]


def test_like_lengths_share_a_batch() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 200) for _ in range(400)]
    shuffled = draw.sample(range(400), 400)
    at_random = [shuffled[i : i + 8] for i in range(0, 400, 8)]
    assert padding(lengths, taken(Order(lengths, 8, 0), 50)) < padding(lengths, at_random) / 10


def test_long_and_short_batches_come_mixed() -> None:
    lengths = list(range(1, 401))
    longest = [max(lengths[i] for i in batch) for batch in taken(Order(lengths, 8, 0), 50)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    assert min(longest[:10]) < 200 < max(longest[:10])


@given(LENGTHS, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_evaluation_reads_each_example_once_the_longest_first(lengths: list[int], size: int) -> None:
    batches = in_order(lengths, size)
    flat = list(itertools.chain(*batches))
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])
