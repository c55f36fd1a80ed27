"""lorank: low-rank adaptation of PyTorch models."""

from .adapted import active_adapters, adapter_names
from .errors import AdapterError, AdapterWarning
from .formats import load, save
from .health import check
from .merging import MergeReport, merge, merged
from .planning import Plan, plan
from .surgery import activate, adapt, adapter_parameters, disabled, remove, reset
from .training import Step, TrainConfig, train
from .variants import LoRA

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterWarning",
    "LoRA",
    "MergeReport",
    "Plan",
    "Step",
    "TrainConfig",
    "activate",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "check",
    "disabled",
    "load",
    "merge",
    "merged",
    "plan",
    "remove",
    "reset",
    "save",
    "train",
]
