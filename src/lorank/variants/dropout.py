"""An update of which the input has dropout, whichever way the layer computes with it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts import Host
from .base import Update


class WithDropout(Update):
    """An update with the spec's dropout of the layer's input."""

    def __init__(self, spec: Any, host: Host, part: str):
        super().__init__()
        self.spec, self.host, self.part = spec, host, part
        self.scale: float = spec.scale
        self.dropout = nn.Dropout(spec.dropout)

    def dropped(self, x: Tensor) -> Tensor:
        """Return the layer's input with dropout, unless that is indices."""
        return self.dropout(x) if x.is_floating_point() else x

    def dropped_lookup(self, z: Tensor) -> Tensor:
        """Return what was looked up, (..., n), with dropout; of another host it is as it was.

        The input is one-hot there: dropping its only non-zero element drops the whole row of a token.
        """
        if self.host.lookup and self.training and self.spec.dropout:
            return z * F.dropout(z.new_ones(*z.shape[:-1], 1), self.spec.dropout)
        return z

    def dropped_features(self, A: Tensor) -> Tensor:
        """Return a matrix (..., n, in) with dropout of its columns, for layers that read W + ΔW.

        Nothing is known there of the layer's input but that it meets them: a column dropped is a feature dropped, of
        all inputs of this call.
        """
        if self.training and self.spec.dropout:
            return A * F.dropout(A.new_ones(*A.shape[:-2], 1, A.shape[-1]), self.spec.dropout)
        return A
