"""A file's tensors as an adapter: which layers they are of, and for which model."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...errors import AdapterError, enumerate_names
from ...hosts import ConvHost, NoHost
from ...names import Names
from ...variants import LoRA
from ..content import Content, LayerUpdate
from .factors import read_layer
from .layers import KEY, Layers, prefix_of, why_not_held


@dataclass
class _Group:
    """What a file has for one model, told by the prefix of the names."""

    updates: dict[str, LayerUpdate] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # names of layers that the model has not
    problems: list[str] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)  # what was done, with the layers that it was done to
    size: int = 0  # layers, read or not

    @property
    def fits(self) -> bool:
        return not self.missing and not self.problems


def decode(tensors: Mapping[str, Tensor], names: Names | None, alpha: float | None, dropout: float) -> Content:
    """Return what the tensors are; what is wrong with them goes into the content's `problems`.

    alpha: of layers that have none; None to take their rank.
    """
    content = Content(LoRA())
    found: dict[str, dict[str, dict[str, Tensor]]] = {}  # by prefix, name of the layer, and kind
    for key in sorted(tensors):
        name, _, kind = key.partition(".")
        match = KEY.fullmatch(name)
        if match is None or not kind:
            content.problems.append(f"{key} is no tensor of a layer: those begin with lora_unet_, lora_te_ or lycoris_")
        else:
            found.setdefault(match[1], {}).setdefault(match[2], {})[kind] = tensors[key]
    if names is None:
        whole = {f"{prefix}_{name}": kinds for prefix, layers in found.items() for name, kinds in layers.items()}
        chosen = _read(whole, None, alpha, dropout)
        content.needs_model = (
            "the names of its layers have _ in the place of dots: which layers they are is known with their model alone"
        )
    else:
        layers = Layers(names)
        groups = {prefix: _read(of_prefix, layers, alpha, dropout) for prefix, of_prefix in found.items()}
        chosen = _chosen(groups, names, content)
        chosen.problems += layers.unknown(chosen.missing)
    content.updates = chosen.updates
    content.problems += chosen.problems
    content.remarks += [f"{enumerate_names(those, 3)}: {what}" for what, those in sorted(chosen.remarks.items())]
    if content.updates:
        content.spec = Counter(update.spec for update in content.updates.values()).most_common(1)[0][0]
    return content


def _read(
    found: Mapping[str, Mapping[str, Tensor]], layers: Layers | None, alpha: float | None, dropout: float
) -> _Group:
    """Return the layers of one prefix, of a model or of none."""
    group = _Group(size=len(found))
    for name, kinds in found.items():
        try:
            layer = name if layers is None else layers.layer(name)
            if layer is None:
                group.missing.append(name)
                continue
            weight, groups = (None, 1) if layers is None else _weight(layers.names, layer)
            read = read_layer(kinds, weight, alpha, dropout)
        except AdapterError as error:
            group.problems.append(f"{name}: {error}")
            continue
        if layer in group.updates:
            group.problems.append(f"{name}: {layer} is in the file twice, under two of its names")
        out, in_ = read.matrix
        shape = weight or (out, in_ // math.prod(read.kernel), *read.kernel)
        group.updates[layer] = LayerUpdate(
            read.spec,
            {"weight": read.tensors},
            shapes={"weight": shape} if len(shape) > 2 else {},
            matrices={"weight": read.matrix},
            groups=groups,
        )
        for remark in read.remarks:
            group.remarks.setdefault(remark, []).append(layer)
    return group


def _weight(names: Names, layer: str) -> tuple[tuple[int, ...] | None, int]:
    """Return the shape of a layer's weight, and its groups; raises AdapterError for what the format does not have."""
    module: Any = names.modules[layer]
    try:
        host = names.host(layer)
    except NoHost:
        return None, 1  # `fit` says why
    if reason := why_not_held(host, lookup=False):
        raise AdapterError(reason)
    if isinstance(host, ConvHost):
        return tuple(host.own(module).shape), module.groups
    return host.shape(module, "weight"), 1


def _chosen(groups: dict[str, _Group], names: Names, content: Content) -> _Group:
    """Return the layers that are for a model, where a file has some for several: UNet and text encoders."""
    own = prefix_of(names.modules[""])
    fitting = [own] if own in groups else [prefix for prefix, group in groups.items() if group.fits]
    if len(groups) == 1 or len(fitting) == 1:
        prefix = fitting[0] if fitting else next(iter(groups))
        others = {other: group.size for other, group in groups.items() if other != prefix}
        content.remarks += [
            f"its {count} layers {other}_… are for another model, and were left out" for other, count in others.items()
        ]
        return groups[prefix]
    if not groups:
        return _Group()
    listed = enumerate_names(sorted(groups))
    if fitting:
        reason = f"the file has layers of several models ({listed}), of which more than one fit this one"
        return _Group(problems=[reason])
    nearest = min(groups, key=lambda prefix: groups[prefix].size - len(groups[prefix].updates))
    reason = f"the file has layers of several models ({listed}), and none of them fit this one; {nearest}_… does not:"
    return replace(groups[nearest], problems=[reason, *groups[nearest].problems])
