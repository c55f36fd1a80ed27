"""Experts that saw no token: adapters in one expert of a mixture may go without a gradient while others have one."""

import re
from collections.abc import Collection

# "mlp.experts.3.up_proj...", "ffn.experts.expert_3.wi...": the experts, and which of them
_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?\w*experts?)\.(?P<one>(?:\w+_)?\d+)\.")


def idle_experts(without: Collection[str], everything: Collection[str]) -> dict[str, set[str]]:
    """Return {experts: those of them without a gradient}, of parameters by name, where other experts have one.

    without: names of the parameters without a gradient; everything: names of all.
    """
    found: dict[str, tuple[set[str], set[str]]] = {}
    for name in everything:
        match = _EXPERT.match(name)
        if match:
            idle, busy = found.setdefault(match["experts"], (set(), set()))
            (idle if name in without else busy).add(match["one"])
    return {experts: idle - busy for experts, (idle, busy) in found.items() if busy and idle - busy}


def is_idle(name: str, idle: dict[str, set[str]]) -> bool:
    """Tell whether a parameter belongs to an expert that `idle_experts` found."""
    match = _EXPERT.match(name)
    return match is not None and match["one"] in idle.get(match["experts"], ())
