"""What merging did to each tensor, measured on the weights that were written."""

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import AdapterWarning, dtype_name
from .fingerprint import Comparison

# A layer that loses more than this share of its update to rounding is worth a warning.
_LOUD_ERROR = 0.5


@dataclass(frozen=True)
class MergeRow:
    """What merging did to one matrix or bias."""

    label: str  # "h.0.attn.c_attn[q]"
    dtype: torch.dtype  # of what was written
    update_norm: float  # Frobenius norm of what was to be added
    relative_error: float  # norm of what rounding to the dtype changed, over update_norm; 0 where nothing was added
    unpacked: str | None = None  # how the base was quantised before: "nf4 of bitsandbytes"
    base: Comparison | None = None  # with the base the adapter was trained on, where that is another
    base_error: float = 0.0  # norm of the difference between the two bases, over update_norm; from samples


@dataclass(frozen=True)
class MergeReport:
    """What merging did, measured on the rounded weights. Printing it shows the worst layers."""

    adapters: tuple[str, ...]
    rows: tuple[MergeRow, ...]
    copies: tuple[str, ...]  # modules that were replaced by the adapter's copy

    @property
    def worst(self) -> MergeRow | None:
        """The row with the largest relative error."""
        return max(self.rows, key=lambda row: row.relative_error, default=None)

    @property
    def other_base(self) -> str | None:
        """How the base differs from the one the adapter was trained on; None when it does not."""
        rows = [row for row in self.rows if row.base is not None]
        if not rows:
            return None
        worst = max(rows, key=lambda row: row.base_error)
        assert worst.base is not None
        then, now = worst.base.dtypes
        how = f"{then} then, {now} now" if then != now else "other weights"
        return (
            f"merged into another base than the adapter was trained on ({how}): {len(rows)} of {len(self.rows)} "
            f"tensors differ, most {worst.label}, by {worst.base.difference:.2%} of its weights, which is "
            f"{worst.base_error:.3g} times its update (sampled). The merged model is not the one that was trained: "
            "compare its outputs"
        )

    def __str__(self) -> str:
        lines = [f"merged {', '.join(self.adapters)} into {len(self.rows)} tensors, computed in float32, rounded once"]
        if self.copies:
            lines.append(f"replaced by the adapter's copy: {', '.join(self.copies)}")
        for kind, count in Counter(row.unpacked for row in self.rows if row.unpacked).items():
            lines.append(f"unpacked: {count} tensors from {kind}")
        if self.other_base:
            lines.append(self.other_base)
        if self.rows:
            ordered = sorted(self.rows, key=lambda row: -row.relative_error)
            lines.append("relative error of the update after rounding, worst first:")
            for row in ordered[:5]:
                tensor = f"{row.label} ({dtype_name(row.dtype)}, update norm {row.update_norm:.3g})"
                lines.append(f"  {row.relative_error:9.2e}  {tensor}")
            if len(ordered) > 5:
                lines.append(
                    f"  and {len(ordered) - 5} more, the median {ordered[len(ordered) // 2].relative_error:.2e}"
                )
        return "\n".join(lines)


def warn_of_losses(report: MergeReport) -> None:
    """Warn when a layer lost more than half of its update, and when its base is not the one it was trained on."""
    if report.other_base:
        warnings.warn(report.other_base, AdapterWarning, stacklevel=3)
    worst = report.worst
    if worst is not None and worst.relative_error > _LOUD_ERROR:
        warnings.warn(
            f"rounding to {dtype_name(worst.dtype)} lost {worst.relative_error:.0%} of the update of {worst.label}; "
            "merge into a float32 base, or keep the adapter unmerged",
            AdapterWarning,
            stacklevel=3,
        )


def measured(label: str, before: Tensor, update: Tensor, after: Tensor) -> MergeRow:
    """Return the row of a tensor that was `before + update` and was rounded to `after`."""
    norm = float(torch.linalg.vector_norm(update))
    lost = float(torch.linalg.vector_norm(wide(after) - before - update))
    return MergeRow(label, after.dtype, norm, lost / norm if norm else 0.0)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which updates are added: float32, or wider."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
