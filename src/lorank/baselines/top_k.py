"""Top-k layers: the last blocks are trained whole (paper, section 5.1: FT^Top2, after Li and Liang, 2021)."""

from dataclasses import dataclass

from torch import nn

from ..blocks import blocks_of
from ..errors import AdapterError, raise_problems
from ..names import Names
from .base import Arrangement, Baseline, register, whole_number_problems


@register("top-k")
@dataclass(frozen=True)
class TopK(Baseline):
    """The last `blocks` blocks, as copies beside the base's own; norms and heads behind them stay frozen.

    stack: the name of the list of blocks, of a model with several.

    With two blocks of GPT-2 medium these are 25,192,448 parameters, as in Table 3.
    """

    merges = True
    pace = 0.1
    blocks: int = 2
    stack: str = ""

    def __post_init__(self) -> None:
        raise_problems("top-k cannot be used", whole_number_problems(self, blocks=1))

    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        blocks = blocks_of(names, "top-k", self.stack)
        if self.blocks > len(blocks):
            raise AdapterError(f"top-k is to train {self.blocks} blocks, and the model has {len(blocks)}")
        return Arrangement(train_also=tuple(blocks[-self.blocks :]))

    def inference(self) -> str:
        return "none added once merged; until then the copies' memory"
