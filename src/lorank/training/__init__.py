"""Training: a loop that the caller owns."""

from .loop import Step, TrainConfig, train

__all__ = ["Step", "TrainConfig", "train"]
