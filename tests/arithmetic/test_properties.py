"""Properties of arithmetic for adapters of any size, rank and scale, against dense matrices in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from lorank import arithmetic
from lorank.formats.content import Content
from lorank.variants import LoHa

from .. import models
from .dense import adapter, close, deltas, random_content, weighted

sizes = st.integers(1, 12)
weights = st.floats(0.05, 20).flatmap(lambda size: st.sampled_from([size, -size]))
seeds = st.integers(0, 2**20)


@st.composite
def adapters(draw: st.DrawFn, count: int = 2) -> list[Content]:
    """Draw adapters of one base, each with some of its layers and a rank of its own."""
    shapes = {name: (draw(sizes), draw(sizes)) for name in ("x", "y", "z")}
    found = []
    for _ in range(count):
        layers = draw(st.sets(st.sampled_from(["x", "y", "z"]), min_size=1))
        own = {name: shapes[name] for name in sorted(layers)}
        found.append(random_content(own, draw(st.integers(1, 6)), draw(seeds), draw(weights)))
    return found


@settings(max_examples=60, deadline=None)
@given(adapters(3), st.tuples(weights, weights, weights))
def test_a_combination_is_exact(found: list[Content], factors: tuple[float, float, float]) -> None:
    named = {str(i): pair for i, pair in enumerate(zip(found, factors, strict=True))}
    made, report = arithmetic.combine(named)
    assert close(deltas(made), weighted(*named.values()), 1e-12)
    assert report.error == 0


@settings(max_examples=60, deadline=None)
@given(adapters(), weights, weights, st.integers(1, 8))
def test_the_error_is_what_the_singular_values_left_out(
    found: list[Content], first: float, second: float, rank: int
) -> None:
    named = {"a": (found[0], first), "b": (found[1], second)}
    made, report = arithmetic.combine(named, rank=rank)
    for label, W in weighted(*named.values()).items():
        row = next(row for row in report.rows if row.label == label)
        S = torch.linalg.svdvals(W)
        assert row.norm == pytest.approx(float(S.norm()), rel=1e-9)
        assert row.error * row.norm == pytest.approx(float(S[rank:].norm()), abs=1e-9 * row.norm)
        lost = float((deltas(made)[label] - W).norm())
        assert lost == pytest.approx(row.error * row.norm, abs=1e-9 * row.norm)


@settings(max_examples=60, deadline=None)
@given(adapters(1), st.floats(0.01, 1))
def test_energy_is_kept_by_the_lowest_rank_that_can(found: list[Content], energy: float) -> None:
    made, report = arithmetic.resize(found[0], energy=energy)
    for row in report.rows:
        squares = torch.linalg.svdvals(deltas(found[0])[row.label]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert float(shares[row.rank - 1]) >= energy - 1e-9
        assert row.rank == 1 or float(shares[row.rank - 2]) < energy + 1e-9
        assert made.updates[row.label].spec.rank == row.rank


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_a_difference_is_symmetric_and_obeys_the_triangle(found: list[Content]) -> None:
    first, second = arithmetic.diff(*found), arithmetic.diff(*reversed(found))
    assert first.norms == pytest.approx(second.norms[::-1])
    assert first.distance == pytest.approx(second.distance)
    by_label = {row.label: row for row in second.rows}
    for row in first.rows:
        other = by_label[row.label]
        assert row.norms == pytest.approx(other.norms[::-1])
        assert abs(row.norms[0] - row.norms[1]) - 1e-9 <= row.distance <= sum(row.norms) + 1e-9
        for value, opposite in zip(
            (row.cosine, row.of_A, row.of_inputs, row.of_outputs),
            (other.cosine, other.of_A, other.of_inputs, other.of_outputs),
            strict=True,
        ):
            assert (value is None) == (opposite is None)
            assert value is None or value == pytest.approx(opposite, abs=1e-9)
            assert value is None or -1 - 1e-9 <= value <= 1 + 1e-9


@settings(max_examples=60, deadline=None)
@given(adapters(1), weights, weights)
def test_negation_takes_away_what_was_added(found: list[Content], weight: float, factor: float) -> None:
    a = found[0]
    made, report = arithmetic.combine({"a": (a, weight), "not": (arithmetic.negate(a), weight)}, rank=1)
    for label, W in deltas(a).items():
        size = abs(weight) * float(W.norm())
        assert float(deltas(made)[label].norm()) <= 1e-12 * size
    assert report.error == 0
    scaled = deltas(arithmetic.scaled(a, factor))
    assert close(scaled, {label: factor * W for label, W in deltas(a).items()}, 1e-12)


class Counted(LoHa):
    """LoHa that counts how often its factors are formed."""

    calls = 0

    def low_rank(self, tensors: Any, shape: Any = None) -> tuple[Tensor, Tensor]:
        Counted.calls += 1
        return super().low_rank(tensors, shape)


@pytest.mark.parametrize(
    "work",
    [
        lambda a: arithmetic.resize(a, 3),
        lambda a: arithmetic.scaled(a, 2),
        lambda a: arithmetic.combine({"a": (a, 1)}),
        lambda a: arithmetic.combine({"a": (a, 1)}, method="ties", density=0.5),
        lambda a: arithmetic.diff(a, random_content({"other": (3, 2)}, 1, 1)),
    ],
)
def test_factors_are_formed_once(work: Any) -> None:
    a = adapter(models.llama(), ["q_proj", "v_proj"], Counted(rank=2))
    Counted.calls = 0
    work(a)
    assert Counted.calls == 4
