"""What a method costs on a base: parameters, bytes, memory and operations of a step. Nothing is loaded or computed."""

from dataclasses import dataclass

import torch

from ..accounting import StepCosts, checkpoint_bytes
from ..copies import count
from ..data import IGNORED, PlainText, Text
from ..errors import AdapterError
from ..models import empty_base, longest
from ..planned import Plan
from ..prefixes import special_tokens
from ..surgery import adapter_parameters
from ..tasks import CausalLM, Classification, Regression, Task, Tensors
from .prepare import adapt_base, step_costs
from .recipe import Recipe


@dataclass(frozen=True)
class StepShape:
    """What a step of training runs on.

    length: tokens of a text, without the special tokens of a prefix.
    moments: numbers that the optimiser keeps for each trained one.
    """

    rows: int
    length: int
    dtype: torch.dtype
    labels: int = 2
    device: str = "cpu"
    moments: int = 2


@dataclass(frozen=True)
class MethodCosts:
    """What a method costs on a base."""

    plan: Plan
    trainable_parameters: int
    checkpoint_bytes: int  # of the adapter's file; of the whole model where that is trained
    step: StepCosts | str  # or why it cannot be counted
    tokens: int  # of the texts of a step
    inference: str  # what it costs there

    def per_token(self, flops: int) -> int:
        """Return operations for each token of the texts."""
        return round(flops / self.tokens)


def method_costs(recipe: Recipe, shape: StepShape) -> MethodCosts:
    """Return what a recipe's method costs on its model; raises AdapterError where it makes no sense."""
    model = empty_base(recipe.model, recipe.task, dtype=shape.dtype, labels=shape.labels)
    plan = adapt_base(recipe, model)
    parameters = model.parameters() if plan.whole else adapter_parameters(model).values()
    trainable, size = count(parameters), checkpoint_bytes(model)
    special = special_tokens(model)
    around = [*range(special.first, special.first + len(special))] if special is not None else []
    most = longest(model.config, None)
    if shape.length > most:
        raise AdapterError(f"length is {shape.length:,}; this model reads at most {most:,} tokens")
    text = min(shape.length, most - len(around))  # special tokens take room in the context
    if text < 2:
        raise AdapterError(f"{len(around):,} special tokens leave no room in a context of {most:,}")
    ids = torch.cat([torch.tensor(around, dtype=torch.long), torch.ones(text, dtype=torch.long)])
    task, batch = _task_and_batch(recipe.task, ids.expand(shape.rows, -1), len(around), shape)
    step = step_costs(
        *(model, task, batch), accumulate=recipe.accumulate > 1, device=shape.device, moments=shape.moments
    )
    inference = "; ".join(method.inference() for method in plan.baselines) or "none added once merged"
    return MethodCosts(plan, trainable, size, step, shape.rows * text, inference)


def _task_and_batch(kind: str, ids: torch.Tensor, special: int, shape: StepShape) -> tuple[Task, Tensors]:
    """Return a task and a batch of it, with so many special tokens in front of each text."""
    text, length = Text("text"), ids.shape[1]
    if kind == "causal-lm":
        labels = ids.clone()
        labels[:, :special] = IGNORED
        return CausalLM(None, length, PlainText(text)), {"input_ids": ids, "labels": labels}
    labels = torch.zeros(len(ids), dtype=torch.long)
    if kind == "regression":
        return Regression(None, length, text, None, "label"), {"input_ids": ids, "labels": labels.float()}
    names = [str(i) for i in range(shape.labels)]
    return Classification(None, length, text, None, "label", labels=names), {"input_ids": ids, "labels": labels}
