"""PEFT's methods that lorank reads and writes: one file each. Importing the folder makes every file in it known."""

import importlib
import pkgutil

from .base import METHODS, Method, method_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "method_of"]
