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

from .errors import dtype_name, enumerate_names

SAMPLES = 32  # values kept of each matrix, evenly spread over it
# Packing to two bits moves weights by a third of their size, to four by a tenth; unrelated ones are 1.4 apart.
_REPACKED = 0.5
_SAME_PACKING = 0.01  # bitsandbytes rounds its scales to bfloat16 when it first runs on a CPU
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one matrix."""

    dtype: str  # "bfloat16", or how it was packed: "nf4 of bitsandbytes"
    checksum: int | None  # of all bits; None when only the samples were taken
    samples: Tensor  # (SAMPLES,) float32

    def to_json(self) -> dict[str, Any]:
        samples = base64.b64encode(array("f", self.samples.tolist()).tobytes()).decode()
        return {"dtype": self.dtype, "checksum": self.checksum, "samples": samples}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Fingerprint":
        """Return what `to_json` described; raises ValueError, KeyError or TypeError for anything else."""
        samples = array("f", base64.b64decode(fields["samples"]))
        named = isinstance(fields["dtype"], str) and (_is_dtype(fields["dtype"]) or " of " in fields["dtype"])
        if not named or len(samples) != SAMPLES:
            raise ValueError(f"a fingerprint of {len(samples)} samples in {fields['dtype']!r}")
        values = torch.tensor(samples.tolist(), dtype=torch.float32, device="cpu")
        return Fingerprint(fields["dtype"], int(fields["checksum"]), values)


@dataclass(frozen=True)
class Comparison:
    """How a matrix differs from the one that was fingerprinted."""

    same: bool  # no difference, or none that rounding to another dtype, or packing, does not explain
    dtypes: tuple[str, str]  # then, now
    difference: float  # relative, over the samples

    @property
    def repacked(self) -> bool:
        """Whether the same base was packed by a quantiser then or is now, and not in the same way."""
        return self.dtypes[0] != self.dtypes[1] and not all(map(_is_dtype, self.dtypes))


def fingerprint(W: Tensor, stored_as: str | None = None, samples_alone: bool = False) -> Fingerprint:
    """Return the fingerprint of a dense matrix (out, in), or of a stack of them.

    stored_as: how a quantiser packed it, when W was unpacked for this.
    samples_alone: leave out the checksum, which has to read all of W.
    """
    return Fingerprint(stored_as or dtype_name(W.dtype), None if samples_alone else _checksum(W), _sample(W))


def compare(then: Fingerprint, W: Tensor, stored_as: str | None = None) -> Comparison:
    """Compare a matrix with a fingerprint taken earlier, as `compare_fingerprints` does."""
    return compare_fingerprints(then, fingerprint(W, stored_as, samples_alone=then.checksum is None))


def compare_fingerprints(then: Fingerprint, now: Fingerprint) -> Comparison:
    """Compare two fingerprints of what may be the same matrix.

    In the same dtype every bit counts, where both have a checksum. In another dtype the samples must be roundings of
    one value. Where one of the two is packed, they must only be much nearer to each other than two unrelated matrices
    are: `difference` says how near they are.
    """
    whole = then.checksum is not None and now.checksum is not None
    gap = torch.where(then.samples == now.samples, 0.0, (then.samples - now.samples).abs())
    norm = float(torch.linalg.vector_norm(then.samples))
    difference = float(torch.linalg.vector_norm(gap)) / norm if norm else float(gap.max())
    if then.dtype == now.dtype and whole and then.checksum == now.checksum:
        same = True
    elif then.dtype == now.dtype and not _is_dtype(now.dtype):
        same = difference < _SAME_PACKING
    elif then.dtype == now.dtype and whole:
        same = False
    elif _is_dtype(then.dtype) and _is_dtype(now.dtype):
        # Each is off by at most half a unit in the last place of its dtype, and of the coarser one that is at most
        # half its epsilon of the larger value. The absolute term covers float16's subnormal range.
        # Samples alone cannot tell in which dtypes a matrix was in between.
        between = [] if whole else ["bfloat16"]
        coarse = max(_epsilon(name) for name in [then.dtype, now.dtype, *between])
        allowed = coarse * torch.maximum(then.samples.abs(), now.samples.abs()) + 6e-8
        same = bool((gap <= allowed).all())
    else:
        same = difference < _REPACKED
    return Comparison(bool(same), (then.dtype, now.dtype), difference)


def other_base(
    compared: dict[str, Comparison], allow_other_base: bool, remarks: list[str], action: str = "load"
) -> list[str]:
    """Return a problem for another base; add a remark for the same base in another dtype."""
    different = {label: c for label, c in compared.items() if not c.same}
    if different:
        label, worst = max(different.items(), key=lambda item: item[1].difference)
        then = "saved" if action == "load" else "trained"
        text = (
            f"the base differs from the one this adapter was {then} on, in {len(different)} of {len(compared)} adapted "
            f"matrices (most in {label}, by {worst.difference:.2%} of its sampled values)"
        )
        if not allow_other_base:
            return [f"{text}; pass allow_other_base=True to {action} it all the same"]
        remarks.append(text)
        return []
    changed = {c.dtypes for c in compared.values() if c.dtypes[0] != c.dtypes[1]}
    if changed:
        pairs = enumerate_names(f"{then} then, {now} now" for then, now in sorted(changed))
        text = f"the base is the one this adapter was saved on in another dtype ({pairs})"
        label, worst = max(compared.items(), key=lambda item: item[1].difference * item[1].repacked)
        if worst.repacked:
            text += f"; most in {label}, by {worst.difference:.2%} of its sampled values"
        remarks.append(text)
    return []


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


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
