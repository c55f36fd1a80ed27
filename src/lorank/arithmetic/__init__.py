"""Arithmetic with adapters, on what their files hold: no base, and no model.

Every update with a form ΔW = scale · B A can take part, whatever method it was trained with; the results are LoRA.
`lorank.combine` and `lorank.resize` do the same with adapters on a model.
"""

from .combine import combine
from .diff import Difference, DiffRow, diff, subspace_similarity
from .extract import Extraction, extract
from .reports import Report, Row
from .resize import resize
from .scale import negate, scaled
from .writing import write

__all__ = [
    "DiffRow",
    "Difference",
    "Extraction",
    "Report",
    "Row",
    "combine",
    "diff",
    "extract",
    "negate",
    "resize",
    "scaled",
    "subspace_similarity",
    "write",
]
