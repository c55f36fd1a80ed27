"""Training: the loop, and what it needs to go on after an interruption."""

from .loop import Step, TrainConfig, train
from .state import TrainState

__all__ = ["Step", "TrainConfig", "TrainState", "train"]
