"""What tests of several hosts check with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank import LoRA

from .. import models


def adapt(model: nn.Module, targets: Any, **options: Any) -> lorank.Plan:
    """Adapt a model with an adapter that has an effect, of the size of the weights."""
    plan = lorank.adapt(model, LoRA(rank=2, alpha=2, **options), targets)
    models.disturb(model, size=0.5)
    return plan


def assert_near(found: Any, expected: Any) -> None:
    """Check that float64 numbers agree up to their rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Return a list that grows with every call of a function of PyTorch."""
    calls: list[str] = []
    original = getattr(torch, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, name, call)
    return calls


def check_layer(
    model: nn.Module,
    targets: Any,
    run: Callable[[nn.Module], torch.Tensor],
    rank: int = 2,
    size: float = 0.5,
    **options: Any,
) -> lorank.Plan:
    """Check that an adapter has an effect, that all of it trains, and that it computes the same when it is merged."""
    plan = lorank.adapt(model, LoRA(rank=rank, alpha=rank), targets, **options)
    models.disturb(model, size=size)
    y = run(model)
    y.square().sum().backward()
    lorank.check(model, moved=True)
    with lorank.disabled(model):
        assert not torch.allclose(run(model), y, atol=1e-3)
    lorank.merge(model)
    torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-4)
    return plan
