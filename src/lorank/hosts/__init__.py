"""Hosts: one file a layer kind. Importing the folder makes every file in it known."""

import importlib
import pkgutil

from .base import (
    AdditiveHost,
    Host,
    NoHost,
    class_host,
    has_host,
    host_of,
    overrides_forward,
    own_parameter,
    plain_parameter,
    register,
    register_finder,
    register_weight,
    registered_host,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .conv import ConvHost  # noqa: E402
from .conv_transpose import ConvTransposeHost  # noqa: E402
from .fused_qkv import FusedHost, RowLayout, consecutive, layout_of, register_layout  # noqa: E402
from .linear import LinearHost  # noqa: E402
from .parameter import PARAMETER  # noqa: E402

__all__ = [
    "PARAMETER",
    "AdditiveHost",
    "ConvHost",
    "ConvTransposeHost",
    "FusedHost",
    "Host",
    "LinearHost",
    "NoHost",
    "RowLayout",
    "class_host",
    "consecutive",
    "has_host",
    "host_of",
    "layout_of",
    "overrides_forward",
    "own_parameter",
    "plain_parameter",
    "register",
    "register_finder",
    "register_layout",
    "register_weight",
    "registered_host",
]
