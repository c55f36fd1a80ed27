"""LoRA+: B learns faster than A.

With one learning rate for both, the steps of A and B are of different sizes in wide models, and features are learnt
inefficiently; a rate for B that is a fixed number of times A's mends that (Hayou et al. 2024, "LoRA+: Efficient Low
Rank Adaptation of Large Models", section 4; it recommends about 16).
"""

from typing import Any

from torch import nn

from ..errors import AdapterError
from ..surgery import AdapterParameters, adapter_parameters


def parameter_groups(
    model: nn.Module, learning_rate: float, ratio: float = 16.0, name: str | None = None
) -> list[dict[str, Any]]:
    """Return an adapter's parameters in two groups for any optimiser, of which B's learns `ratio` times as fast.

        optimiser = torch.optim.AdamW(lorank.parameter_groups(model, 1e-4, ratio=16))

    Whatever is on the side of the output counts as B (b of VeRA, B1 and B2 of LoHa); heads, biases and magnitudes
    learn at `learning_rate`. Without a name it is the active adapters' parameters. `TrainConfig(lora_plus=16)` makes
    the same groups for `lorank.train`. Raises AdapterError for an adapter without such parameters.
    """
    if not ratio > 0:
        raise AdapterError(f"ratio is {ratio}; it must be above 0")
    paced = by_pace(adapter_parameters(model, name), ratio)
    return [{"params": parameters, "lr": times * learning_rate} for parameters, times in paced]


def by_pace(parameters: AdapterParameters, ratio: float) -> list[tuple[list[nn.Parameter], float]]:
    """Return the groups of an adapter's parameters, each with how many times as fast it learns.

    Raises AdapterError for an adapter without parameters on the side of the output.
    """
    if not parameters.outward:
        raise AdapterError("LoRA+ has nothing to do: this adapter has no parameters on the side of the output")
    slow = [parameter for name, parameter in parameters.items() if name not in parameters.outward]
    fast = [parameter for name, parameter in parameters.items() if name in parameters.outward]
    return [(slow, 1.0), (fast, ratio)] if slow else [(fast, ratio)]
