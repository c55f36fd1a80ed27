"""BitFit: only bias vectors are trained (Ben Zaken et al., 2021, arXiv 2106.10199; paper, section 5.1)."""

from dataclasses import dataclass

from torch import nn

from ..errors import AdapterError
from ..names import Names
from .base import Arrangement, Baseline, register


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Baseline):
    """All biases, those of layer norms among them; the adapter holds the trained change of each."""

    merges = True

    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        if not any(module._parameters.get("bias") is not None for module in names.modules.values()):
            raise AdapterError("bitfit trains biases, and this model has none (LLaMA's layers have weights alone)")
        return Arrangement(bias="all")

    def inference(self) -> str:
        return "none added once merged"
