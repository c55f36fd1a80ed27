"""Tasks: what a model is trained for. One file a task: how records become batches, a loss and scores."""

from .base import Task, Tensors
from .causal_lm import CausalLM
from .sequence import Classification, Regression

__all__ = ["CausalLM", "Classification", "Regression", "Task", "Tensors"]
