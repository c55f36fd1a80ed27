"""Variants: one file a method. Importing the folder makes every file in it known."""

import importlib
import pkgutil

from .base import METHODS, Adapter, Spec, Update, materialised, on_device_of, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .adalora import AdaLoRA, AdaLoRAAdapter  # noqa: E402
from .calibrated import CalibratedAdapter  # noqa: E402
from .dora import DoRA, DoRAAdapter  # noqa: E402
from .eva import EVA, EVAAdapter, deal_ranks  # noqa: E402
from .loha import LoHa  # noqa: E402
from .lokr import LoKr  # noqa: E402
from .lora import LoRA, LoRAAdapter, LowRank, factor_dtype  # noqa: E402
from .lora_fa import LoRAFA  # noqa: E402
from .lora_ga import LoRAGA  # noqa: E402
from .milora import MiLoRA  # noqa: E402
from .olora import OLoRA  # noqa: E402
from .pissa import PiSSA  # noqa: E402
from .shifted import Shifted, ShiftedAdapter  # noqa: E402
from .vera import VeRA, VeRAAdapter  # noqa: E402

__all__ = [
    "EVA",
    "METHODS",
    "AdaLoRA",
    "AdaLoRAAdapter",
    "Adapter",
    "CalibratedAdapter",
    "DoRA",
    "DoRAAdapter",
    "EVAAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAAdapter",
    "LoRAFA",
    "LoRAGA",
    "LowRank",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Shifted",
    "ShiftedAdapter",
    "Spec",
    "Update",
    "VeRA",
    "VeRAAdapter",
    "deal_ranks",
    "factor_dtype",
    "materialised",
    "on_device_of",
    "register",
]
