"""Recognise a base by the weights that an adapter sits on: the same, the same in another dtype, or another one.

A hash would only tell equal from unequal. A fingerprint keeps a checksum of all bits of each adapted matrix, and
some of its values: so two bases can be compared through the rounding of a dtype, and a difference can be measured.
"""

import base64
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import dtype_name

SAMPLES = 32  # values kept of each matrix, evenly spread over it
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one matrix."""

    dtype: str  # "bfloat16"
    checksum: int  # of all bits
    samples: Tensor  # (SAMPLES,) float32

    def to_json(self) -> dict[str, Any]:
        samples = base64.b64encode(array("f", self.samples.tolist()).tobytes()).decode()
        return {"dtype": self.dtype, "checksum": self.checksum, "samples": samples}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Fingerprint":
        """Return what `to_json` described; raises ValueError, KeyError or TypeError for anything else."""
        samples = array("f", base64.b64decode(fields["samples"]))
        if not isinstance(getattr(torch, fields["dtype"], None), torch.dtype) or len(samples) != SAMPLES:
            raise ValueError(f"a fingerprint of {len(samples)} samples in {fields['dtype']!r}")
        values = torch.tensor(samples.tolist(), dtype=torch.float32, device="cpu")
        return Fingerprint(fields["dtype"], int(fields["checksum"]), values)


@dataclass(frozen=True)
class Comparison:
    """How a matrix differs from the one that was fingerprinted."""

    same: bool  # no difference, or none that rounding to another dtype does not explain
    dtypes: tuple[str, str]  # then, now
    difference: float  # relative, over the samples


def fingerprint(W: Tensor) -> Fingerprint:
    """Return the fingerprint of a dense matrix (out, in), or of a stack of them."""
    return Fingerprint(dtype_name(W.dtype), _checksum(W), _sample(W))


def compare(then: Fingerprint, W: Tensor) -> Comparison:
    """Compare a matrix with a fingerprint taken earlier.

    In the same dtype every bit counts. In another dtype the samples must be roundings of one value.
    """
    now = fingerprint(W)
    gap = torch.where(then.samples == now.samples, 0.0, (then.samples - now.samples).abs())
    norm = float(torch.linalg.vector_norm(then.samples))
    difference = float(torch.linalg.vector_norm(gap)) / norm if norm else float(gap.max())
    if then.dtype == now.dtype:
        same = then.checksum == now.checksum
    else:
        # Each is off by at most half a unit in the last place of its dtype, and of the coarser one that is at most
        # half its epsilon of the larger value. The absolute term covers float16's subnormal range.
        coarse = max(_epsilon(then.dtype), _epsilon(now.dtype))
        allowed = coarse * torch.maximum(then.samples.abs(), now.samples.abs()) + 6e-8
        same = bool((gap <= allowed).all())
    return Comparison(bool(same), (then.dtype, now.dtype), difference)


def _checksum(W: Tensor) -> int:
    """Return the sum of all bit patterns, each row times its number; whole numbers, so that no order matters."""
    bits = W.detach().view(_BITS[W.element_size()])
    rows = bits.sum(dim=-1, dtype=torch.int64).flatten()
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def _sample(W: Tensor) -> Tensor:
    # Multiples of two irrational numbers, modulo 1, spread evenly over rows and columns of any shape.
    count = torch.arange(1, SAMPLES + 1, dtype=torch.float64, device="cpu")
    number, columns_ = W.shape[:-1].numel(), W.shape[-1]
    rows = (count * 0.6180339887498949 % 1 * number).long()
    columns = (count * 0.7548776662466927 % 1 * columns_).long()
    index = [*torch.unravel_index(rows, W.shape[:-1]), columns]
    return W.detach()[tuple(i.to(W.device) for i in index)].float().cpu()


def _epsilon(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps
