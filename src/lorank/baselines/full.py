"""Full fine-tuning: every weight of the base is trained, in place (paper, section 5.1)."""

from dataclasses import dataclass

from torch import nn

from ..errors import AdapterError
from ..names import Names
from .base import Arrangement, Baseline, register


@register("full")
@dataclass(frozen=True)
class Full(Baseline):
    """All parameters. There is no adapter: what is trained is the model, and what is saved is a whole checkpoint.

    `lorank train --method full` does it; a copy beside the frozen base would take twice the memory for nothing.
    """

    merges = True
    pace = 0.05

    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        raise AdapterError(
            "full fine-tuning is no adapter: train model.parameters() and save the model with save_pretrained, or use "
            "`lorank train --method full`"
        )

    def inference(self) -> str:
        return "none added; a whole checkpoint for every task"
