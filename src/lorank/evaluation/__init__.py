"""Evaluation: what a model writes, and scores of predictions."""

from .generation import Decoding, complete, stream
from .scores import classification_scores, regression_scores

__all__ = ["Decoding", "classification_scores", "complete", "regression_scores", "stream"]
