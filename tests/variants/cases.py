"""What tests of methods share: each method, and a small model that carries it."""

from typing import Any

import torch
from torch import Tensor, nn

import lorank
from lorank import EVA, AdaLoRA, DoRA, LoHa, LoKr, LoRAFA, LoRAGA, MiLoRA, OLoRA, PiSSA, VeRA
from lorank.tree import adapted_layers
from lorank.variants import Spec

METHODS: dict[str, Spec] = {
    "dora": DoRA(rank=3, alpha=6),
    "pissa": PiSSA(rank=2, alpha=3),
    "pissa-randomised": PiSSA(rank=2, alpha=3, iterations=4),
    "olora": OLoRA(rank=2, alpha=3),
    "milora": MiLoRA(rank=2, alpha=3),
    "eva": EVA(rank=2, alpha=4),
    "lora-ga": LoRAGA(rank=2, alpha=4),
    "lora-fa": LoRAFA(rank=3, alpha=6),
    "vera": VeRA(rank=5),
    "adalora": AdaLoRA(rank=3, target_rank=2, alpha=6),
    "loha": LoHa(rank=2, alpha=4),
    "lokr": LoKr(rank=1, alpha=2),
    "lokr-both": LoKr(rank=1, alpha=2, decompose_both=True, factor=3),
    "lokr-whole": LoKr(rank=64, alpha=3),
}


class Stack(nn.Module):
    """Two layers of unequal shapes."""

    def __init__(self, inputs: int = 6, hidden: int = 8, outputs: int = 5):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def leaves(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """Return the only update of every adapted layer by its name."""
    return {layer_name: layer.adapters[name] for layer_name, layer in adapted_layers(model).items()}


def stacked(spec: Spec, name: str = "default") -> Any:
    """Return an adapted stack, calibrated where that is needed."""
    torch.manual_seed(1)
    model: Any = Stack()
    lorank.adapt(model, spec, ["first", "second"], name=name)
    if isinstance(spec, EVA | LoRAGA):
        lorank.calibrate(model, lambda x: model(x).square().mean(), [torch.randn(9, 6)])
    return model
