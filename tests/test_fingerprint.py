"""Bases are recognised through dtypes, and told apart by a single bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lorank.fingerprint import Fingerprint, compare, fingerprint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (64, 64)])
def test_a_single_changed_bit_is_another_base(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    W = torch.randn(shape).to(dtype)
    then = fingerprint(W)
    assert compare(then, W.clone()).same
    assert compare(then, W.T.contiguous().T).same  # how it lies in memory does not count
    changed = W.clone()
    changed.view(-1)[-1] += torch.finfo(dtype).eps * 4
    assert not compare(then, changed).same


def test_swapped_rows_are_another_base() -> None:
    W = torch.randn(40, 7)
    assert not compare(fingerprint(W), W[torch.randperm(40)]).same


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-6, 4), st.sampled_from(list(itertools.permutations(DTYPES, 2))))
def test_roundings_of_one_matrix_are_the_same_base(
    seed: int, magnitude: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    torch.manual_seed(seed)
    W = torch.randn(20, 30, dtype=torch.float64) * 10**magnitude
    comparison = compare(fingerprint(W.to(dtypes[0])), W.to(dtypes[1]))
    assert comparison.same
    assert comparison.dtypes == tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_more_than_rounding_is_another_base(coarse: torch.dtype) -> None:
    W = torch.rand(50, 50) + 1
    changed = W * (1 + 2 * torch.finfo(coarse).eps)
    comparison = compare(fingerprint(W), changed.to(coarse))
    assert not comparison.same
    assert comparison.difference == pytest.approx(2 * torch.finfo(coarse).eps, rel=0.5)


def test_it_survives_json() -> None:
    W = torch.randn(9, 5).bfloat16()
    again = Fingerprint.from_json(fingerprint(W).to_json())
    assert compare(again, W).same
    for damage in ({"samples": "AAAA"}, {"dtype": "foo"}, {"dtype": "nn"}, {"checksum": "x"}):
        with pytest.raises((ValueError, TypeError)):
            Fingerprint.from_json(fingerprint(W).to_json() | damage)
