"""Variants: one file a method. Importing the folder makes every file in it known."""

import importlib
import pkgutil

from .base import Adapter, Spec, Update, materialised, on_device_of, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .lora import LoRA, LoRAAdapter, LowRank, factor_dtype  # noqa: E402

__all__ = [
    "Adapter",
    "LoRA",
    "LoRAAdapter",
    "LowRank",
    "Spec",
    "Update",
    "factor_dtype",
    "materialised",
    "on_device_of",
    "register",
]
