"""lorank: low-rank adaptation of PyTorch models.

The names below are imported when they are first used, so that the command line can show its help without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .arithmetic import extract
    from .arithmetic.on_model import combine, resize
    from .baselines import (
        AdapterD,
        AdapterH,
        AdapterL,
        AdapterP,
        BitFit,
        Full,
        PrefixEmbedding,
        PrefixLayer,
        SpecialTokens,
        TopK,
    )
    from .calibrating import calibrate
    from .converting import convert
    from .errors import AdapterError, AdapterWarning
    from .formats import load, save
    from .health import check
    from .hub import pull, push
    from .merge_report import MergeReport
    from .merging import merge, merged
    from .planning import Plan, plan
    from .prefixes import special_tokens
    from .surgery import activate, adapt, adapter_parameters, disabled, remove, reset
    from .training import RankBudget, Step, TrainConfig, TrainState, parameter_groups, train
    from .tree import active_adapters, adapter_names
    from .variants import EVA, AdaLoRA, DoRA, LoHa, LoKr, LoRA, LoRAFA, LoRAGA, MiLoRA, OLoRA, PiSSA, VeRA

__all__ = [
    "EVA",
    "AdaLoRA",
    "AdapterD",
    "AdapterError",
    "AdapterH",
    "AdapterL",
    "AdapterP",
    "AdapterWarning",
    "BitFit",
    "DoRA",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAGA",
    "MergeReport",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Plan",
    "PrefixEmbedding",
    "PrefixLayer",
    "RankBudget",
    "SpecialTokens",
    "Step",
    "TopK",
    "TrainConfig",
    "TrainState",
    "VeRA",
    "__version__",
    "activate",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "calibrate",
    "check",
    "combine",
    "convert",
    "disabled",
    "extract",
    "load",
    "merge",
    "merged",
    "parameter_groups",
    "plan",
    "pull",
    "push",
    "remove",
    "reset",
    "resize",
    "save",
    "special_tokens",
    "train",
]

_HOMES = {
    "arithmetic": ("extract",),
    "arithmetic.on_model": ("combine", "resize"),
    "baselines": (
        *("AdapterD", "AdapterH", "AdapterL", "AdapterP", "BitFit", "Full", "PrefixEmbedding", "PrefixLayer"),
        *("SpecialTokens", "TopK"),
    ),
    "calibrating": ("calibrate",),
    "converting": ("convert",),
    "errors": ("AdapterError", "AdapterWarning"),
    "formats": ("load", "save"),
    "health": ("check",),
    "hub": ("pull", "push"),
    "merge_report": ("MergeReport",),
    "merging": ("merge", "merged"),
    "planning": ("Plan", "plan"),
    "prefixes": ("special_tokens",),
    "surgery": ("activate", "adapt", "adapter_parameters", "disabled", "remove", "reset"),
    "training": ("RankBudget", "Step", "TrainConfig", "TrainState", "parameter_groups", "train"),
    "tree": ("active_adapters", "adapter_names"),
    "variants": (
        *("EVA", "AdaLoRA", "DoRA", "LoHa", "LoKr", "LoRA", "LoRAFA", "LoRAGA", "MiLoRA", "OLoRA", "PiSSA", "VeRA"),
    ),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lorank' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
