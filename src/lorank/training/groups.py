"""LoRA+: B learns faster than A.

With one learning rate for both, the steps of A and B are of different sizes in wide models, and features are learnt
inefficiently; a rate for B that is a fixed number of times A's mends that (Hayou et al. 2024, "LoRA+: Efficient Low
Rank Adaptation of Large Models", section 4; it recommends about 16).
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import AdapterError
from ..surgery import adapter_parameters

_FAST = ("B", "B1", "B2", "CB", "DB", "b")  # what an update ends with, on the side of the output


def is_fast(name: str) -> bool:
    """Tell whether a parameter of an adapter, by its name, is on the side of the output, as B is."""
    return name.rpartition(".")[2] in _FAST


def parameter_groups(
    model: nn.Module, learning_rate: float, ratio: float = 16.0, name: str | None = None
) -> list[dict[str, Any]]:
    """Return an adapter's parameters in two groups for any optimiser, of which B's learns `ratio` times as fast.

        optimiser = torch.optim.AdamW(lorank.parameter_groups(model, 1e-4, ratio=16))

    Whatever is on the side of the output counts as B (b of VeRA, B1 and B2 of LoHa); heads, biases and magnitudes
    learn at `learning_rate`. Without a name it is the active adapters' parameters. `TrainConfig(lora_plus=16)` makes
    the same groups for `lorank.train`. Raises AdapterError for an adapter without such parameters.
    """
    named = adapter_parameters(model, name)
    fast = [parameter for key, parameter in named.items() if is_fast(key)]
    if not fast:
        raise AdapterError("LoRA+ has nothing to do: this adapter has no parameters on the side of the output")
    if not ratio > 0:
        raise AdapterError(f"ratio is {ratio}; it must be above 0")
    slow = [parameter for key, parameter in named.items() if not is_fast(key)]
    groups = [{"params": slow, "lr": learning_rate}] if slow else []
    return [*groups, {"params": fast, "lr": ratio * learning_rate}]


def rates(names: Iterable[str], ratio: float) -> list[float]:
    """Return by how much each parameter's learning rate is multiplied."""
    return [ratio if is_fast(name) else 1.0 for name in names]
