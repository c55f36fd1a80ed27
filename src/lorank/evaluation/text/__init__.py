"""Scores of generated text against references: one file a family of scores, one registry of all of them."""

from .base import Metric
from .registry import METRICS, PRESETS, chosen_metrics, require_metrics, text_scores

__all__ = ["METRICS", "PRESETS", "Metric", "chosen_metrics", "require_metrics", "text_scores"]
