"""What arithmetic did to each matrix."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AdapterWarning

_LOUD_ERROR = 0.5  # a layer of which more than this share is lost is worth a warning


@dataclass(frozen=True)
class Row:
    """What became of one matrix, or of one stack of them."""

    label: str  # "h.0.attn.c_attn[q]"
    rank: int  # of the result
    norm: float  # Frobenius norm of the ΔW that was asked for
    error: float  # Frobenius norm of what the result's rank could not hold, over `norm`; 0 where it holds everything


@dataclass(frozen=True)
class Report:
    """What arithmetic did. Printing it shows the layers that lost most."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # what else is to be known of the result

    @property
    def worst(self) -> Row | None:
        """The row with the largest relative error."""
        return max(self.rows, key=lambda row: row.error, default=None)

    @property
    def error(self) -> float:
        """The relative error of all ΔW together."""
        total = sum(row.norm**2 for row in self.rows)
        return (sum((row.norm * row.error) ** 2 for row in self.rows) / total) ** 0.5 if total else 0.0

    def __str__(self) -> str:
        ranks = sorted({row.rank for row in self.rows})
        of_rank = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
        lines = [f"{self.title}: {len(self.rows)} matrices{of_rank}"]
        ordered = sorted(self.rows, key=lambda row: -row.error)
        if self.error:
            lines.append(f"relative error of ΔW {self.error:.2e}, by layer, worst first:")
            lines += [f"  {row.error:9.2e}  {row.label} (rank {row.rank}, norm {row.norm:.3g})" for row in ordered[:5]]
            if len(ordered) > 5:
                lines.append(f"  and {len(ordered) - 5} more, the median {ordered[len(ordered) // 2].error:.2e}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "error": self.error,
            "layers": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def warn_of_losses(report: Report, stacklevel: int = 3) -> None:
    """Warn when a layer lost more than half of its update."""
    worst = report.worst
    if worst is not None and worst.error > _LOUD_ERROR:
        warnings.warn(
            f"rank {worst.rank} holds {1 - worst.error**2:.0%} of the energy of ΔW of {worst.label}, a relative error "
            f"of {worst.error:.0%}; a higher rank keeps more",
            AdapterWarning,
            stacklevel=stacklevel,
        )


def enumerate_weights(weights: Sequence[tuple[str, float]]) -> str:
    """Return adapters with their weights as `0.7 a + 0.3 b - 0.5 c`."""
    text = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight):g} {name}" for name, weight in weights)
    return text.removeprefix("+ ")
