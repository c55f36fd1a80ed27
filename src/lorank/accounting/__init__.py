"""What a method costs on a model, counted on the meta device: nothing is loaded, nothing is computed."""

from .sizes import adapter_bytes, checkpoint_bytes, readable
from .training import Memory, StepCosts, training_costs

__all__ = ["Memory", "StepCosts", "adapter_bytes", "checkpoint_bytes", "readable", "training_costs"]
