"""Mixed precision: float32 weights, of which matrix products are computed in bfloat16 (Micikevicius et al. 2018)."""

from typing import Any

import torch
from torch import nn


def compute_in_bfloat16(model: nn.Module, device: torch.device) -> None:
    """Have every forward pass of a model run under autocast, in place.

    Its weights, and so the steps of an optimiser, stay as they are: in bfloat16 a weight of 1 does not move by less
    than 0.004, and full fine-tuning would stand still.
    """
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any) -> None:
        context = torch.autocast(device.type, torch.bfloat16)
        context.__enter__()
        entered.append(context)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
