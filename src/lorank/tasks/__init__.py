"""Tasks: what a model is trained for. One file a task: how records become batches, a loss and scores."""

from .base import Task, Tensors
from .causal_lm import CausalLM
from .sequence import Classification, Regression
from .writing import Output, Question, generate_and_score

__all__ = [
    "CausalLM",
    "Classification",
    "Output",
    "Question",
    "Regression",
    "Task",
    "Tensors",
    "generate_and_score",
]
