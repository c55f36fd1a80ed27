"""Training: the loop, and what it needs to go on after an interruption."""

from .budget import RankBudget
from .groups import parameter_groups
from .loop import Step, TrainConfig, train
from .state import TrainState

__all__ = ["RankBudget", "Step", "TrainConfig", "TrainState", "parameter_groups", "train"]
