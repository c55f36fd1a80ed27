"""Saving and loading is the identity in PEFT's layout: every method, over shapes, ranks, scales and dtypes."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import lorank
from lorank.variants import METHODS

from .. import models

SIZES = st.integers(8, 20)


def spec_of(method: str, rank: int, alpha: float, dtype: torch.dtype | None) -> Any:
    if method == "vera":
        return lorank.VeRA(rank=rank, dtype=dtype)
    options: dict[str, Any] = {}
    if method == "adalora":
        options, alpha = {"target_rank": 1}, abs(alpha)
    return METHODS[method](rank=rank, alpha=alpha, dtype=dtype, **options)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("method", sorted(METHODS))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 1.0, 3.0, 16.0, -2.0]),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float64]),
)
def test_what_was_saved_comes_back_to_the_bit(
    method: str, data: st.DataObject, rank: int, alpha: float, dtype: torch.dtype | None
) -> None:
    inputs, hidden, channels = data.draw(SIZES), data.draw(SIZES), data.draw(st.integers(8, 12))
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.Linear(hidden, 12)]
    if method != "eva":  # which cannot see what a convolution multiplies
        layers += [nn.Unflatten(1, (1, 12)), nn.Conv1d(1, channels, 10)]
    base = nn.Sequential(*layers)
    model, x = copy.deepcopy(base), torch.randn(64, inputs)
    targets = [name for name, layer in base.named_modules() if hasattr(layer, "weight")]
    lorank.adapt(model, spec_of(method, rank, alpha, dtype), targets)
    if method in ("eva", "lora-ga"):
        lorank.calibrate(model, lambda x: model(x).square().sum(), [x])
    models.disturb(model, size=0.5)
    saved = {key: p.detach() for key, p in lorank.adapter_parameters(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        lorank.save(model, folder)
        first = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        fresh = copy.deepcopy(base)
        lorank.load(fresh, folder)
        lorank.save(fresh, folder)
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == first
    loaded = {key: p.detach() for key, p in lorank.adapter_parameters(fresh).items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) and loaded[key].dtype == saved[key].dtype for key in saved)
    assert torch.equal(fresh(x), model(x))
