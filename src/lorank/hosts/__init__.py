"""Hosts: one file a layer kind. Importing the folder makes every file in it known."""

import importlib
import pkgutil

from .base import (
    Host,
    NoHost,
    has_host,
    host_of,
    overrides_forward,
    plain_parameter,
    read_without_call,
    register,
    registered_host,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .fused_qkv import FusedHost, RowLayout, consecutive, layout_of, register_layout  # noqa: E402

__all__ = [
    "FusedHost",
    "Host",
    "NoHost",
    "RowLayout",
    "consecutive",
    "has_host",
    "host_of",
    "layout_of",
    "overrides_forward",
    "plain_parameter",
    "read_without_call",
    "register",
    "register_layout",
    "registered_host",
]
