"""What tests of several hosts use."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def wide() -> Iterator[None]:
    """Make and compute everything in float64, in which no error is small."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
