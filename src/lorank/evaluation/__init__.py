"""Evaluation: what a model writes, and scores of predictions."""

from .generation import Decoding, complete, require_room, stream
from .scores import classification_scores, regression_scores
from .text import METRICS, PRESETS, chosen_metrics, require_metrics, text_scores

__all__ = [
    "METRICS",
    "PRESETS",
    "Decoding",
    "chosen_metrics",
    "classification_scores",
    "complete",
    "regression_scores",
    "require_metrics",
    "require_room",
    "stream",
    "text_scores",
]
