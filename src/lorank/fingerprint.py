"""Recognise a base by the weights that an adapter sits on: the same, the same in another dtype, or another one.

A hash would only tell equal from unequal. A fingerprint keeps some values of each adapted matrix, so that two
bases can be compared through the rounding of a dtype, and a real difference can be measured.
"""

import base64
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 32  # values kept of each matrix, evenly spread over it


@dataclass(frozen=True)
class Fingerprint:
    """Samples of one matrix and the dtype they were rounded to."""

    dtype: str  # "bfloat16"
    samples: Tensor  # (SAMPLES,) float32

    def to_json(self) -> dict[str, str]:
        return {"dtype": self.dtype, "samples": base64.b64encode(array("f", self.samples.tolist()).tobytes()).decode()}

    @staticmethod
    def from_json(fields: dict[str, str]) -> "Fingerprint":
        samples = array("f", base64.b64decode(fields["samples"]))
        if not isinstance(getattr(torch, fields["dtype"], None), torch.dtype) or len(samples) != SAMPLES:
            raise ValueError(f"a fingerprint of {len(samples)} samples in {fields['dtype']!r}")
        return Fingerprint(fields["dtype"], torch.tensor(samples.tolist(), dtype=torch.float32, device="cpu"))


@dataclass(frozen=True)
class Comparison:
    """How a matrix differs from the one that was fingerprinted."""

    same: bool  # no difference that rounding to the coarser of the two dtypes does not explain
    dtypes: tuple[str, str]  # then, now
    difference: float  # relative, over the samples


def fingerprint(W: Tensor) -> Fingerprint:
    """Return the fingerprint of a dense matrix."""
    return Fingerprint(str(W.dtype).removeprefix("torch."), _sample(W))


def compare(then: Fingerprint, W: Tensor) -> Comparison:
    """Compare a matrix with a fingerprint taken earlier."""
    now = fingerprint(W)
    gap = (then.samples - now.samples).abs()
    coarse = max(_epsilon(then.dtype), _epsilon(now.dtype))
    # Both are roundings of one value: each is off by at most half a unit in the last place of its dtype. The
    # absolute term covers float16's subnormal range.
    size = torch.maximum(then.samples.abs(), now.samples.abs())
    allowed = coarse * size + (6e-8 if coarse > _epsilon("float32") else 0.0) if then.dtype != now.dtype else 0 * size
    norm = float(torch.linalg.vector_norm(then.samples))
    difference = float(torch.linalg.vector_norm(gap)) / norm if norm else float(gap.max())
    same = then.samples.shape == now.samples.shape and bool((gap <= allowed).all())
    return Comparison(same, (then.dtype, now.dtype), difference)


def _sample(W: Tensor) -> Tensor:
    # Multiples of two irrational numbers, modulo 1, spread evenly over rows and columns of any shape.
    count = torch.arange(1, SAMPLES + 1, dtype=torch.float64, device="cpu")
    rows = (count * 0.6180339887498949 % 1 * W.shape[0]).long()
    columns = (count * 0.7548776662466927 % 1 * W.shape[1]).long()
    return W.detach()[rows.to(W.device), columns.to(W.device)].float().cpu()


def _epsilon(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps
