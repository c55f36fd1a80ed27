"""Of which layer and part each pair of factors in a file is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import AdapterError
from ...hosts import own_parameter
from ...names import Names
from .header import Account
from .layout import PARAMETERS, PARTS
from .older import is_swapped, times_of_out_proj

_OUT_PROJ = ".base_layer.out_proj"  # where PEFT has that of nn.MultiheadAttention; `out_proj` elsewhere is a layer


def nested(name: str, parameters: int) -> list[str]:
    """Return PEFT's paths for adapted parameters of one module, in their order: it wraps one in the next."""
    return [name + ".base_layer" * (parameters - 1 - i) for i in range(parameters)]


@dataclass(frozen=True)
class Place:
    """One pair of factors of a file: of which layer and part it is, and how it lies in the file."""

    path: str  # in the tensors' names
    layer: str
    part: str = "weight"
    parameter: bool = False  # in PEFT's layout of parameters,
    experts: int = 0  # as a stack of so many matrices, or of one
    swapped: bool = False  # A and B have taken the place of each other
    third: int | None = None  # of a pair for q, k and v of an attention: which of them
    additions: int = 1  # how many times PEFT adds the update
    settings_of: str = ""  # another layer, whose rank and alpha PEFT gives it
    enabled: tuple[bool, ...] = ()  # of a layer in equal parts of which some may have factors: which have
    channels: int = 0  # of a convolution in groups: the channels of all of them

    @property
    def matched_as(self) -> str:
        """The name that PEFT's patterns are matched with."""
        return self.settings_of or (f"{self.layer}.{self.part}".removeprefix(".") if self.parameter else self.layer)


def places_of(
    factors: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    account: Account | None,
    names: Names,
    problems: list[str],
) -> list[Place]:
    """Return what each pair of factors in a file belongs to."""
    found: dict[str, Place] = {}
    for name, told in account.layers.items() if account is not None else ():
        if told.layout == PARAMETERS:
            paths = zip(nested(name, len(told.parts)), told.parts, strict=True)
            found |= {path: Place(path, name, part, True, told.stacks.get(part, 0)) for path, part in paths}
        elif told.layout == PARTS:
            paths = ((f"{name}.{part}".removeprefix("."), part) for part in told.parts)
            found |= {path: Place(path, name, part) for path, part in paths}
    if account is not None:
        parameters = {place.matched_as for place in found.values() if place.parameter}
        if parameters != set(config.get("target_parameters") or []):
            problems.append(
                f"target_parameters is {config.get('target_parameters')!r} in adapter_config.json, the tensors' own "
                f"header has {sorted(parameters)}"
            )
    else:
        for name, parameters in _target_parameters(config, names, problems).items():
            for path, part in zip(nested(name, len(parameters)), parameters, strict=True):
                found[path] = _parameter(path, name, part, factors.get(path, {}), config, names, problems)
        problems += [f"{path}: the file lacks its factors" for path in found if path not in factors]
    known = [found[path] for path in found if path in factors]  # in the order of the parameters in their module
    for path in [path for path in factors if path not in found] if account is None else ():
        known += _attention(path, config, names, problems)
    told = found.keys() | {place.path for place in known}
    return known + [_layer(path, config, names) for path in factors if path not in told]


def _layer(path: str, config: Mapping[str, Any], names: Names) -> Place:
    layer = names.modules.get(path)
    channels = layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 else 0
    return Place(path, path, enabled=tuple(map(bool, config.get("enable_lora") or ())), channels=channels)


def _parameter(
    path: str,
    name: str,
    part: str,
    factors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Names,
    problems: list[str],
) -> Place:
    """Return the place of a pair that `target_parameters` names."""
    weight = own_parameter(names.modules[name], part)
    if weight.dim() != 3:
        return Place(path, name, part, True)
    transposed = getattr(names.modules[name], "is_transposed", False) is True
    shape = tuple(weight.mT.shape if transposed else weight.shape)
    try:
        readable = "A" in factors and factors["A"].dim() == 2
        swapped = readable and is_swapped(config, shape, transposed, factors["A"].shape[1])
    except AdapterError as error:
        problems.append(f"{name}.{part}: {error}")
        swapped = False
    return Place(path, name, part, True, weight.shape[0], swapped)


def _attention(path: str, config: Mapping[str, Any], names: Names, problems: list[str]) -> list[Place]:
    """Return the places of a pair of nn.MultiheadAttention, none where it is of another layer.

    PEFT has one pair for q, k and v together, and one for the out_proj, which it wraps inside.
    """
    if path.endswith(_OUT_PROJ):
        name = path.removesuffix(_OUT_PROJ)
        try:
            times = times_of_out_proj(config)
        except AdapterError as error:
            problems.append(f"{path}: {error}")
            times = 1
        return [Place(path, f"{name}.out_proj", additions=times, settings_of=name)]
    layer = names.modules.get(path)
    if not isinstance(layer, nn.MultiheadAttention) or not layer._qkv_same_embed_dim:
        return []
    return [Place(path, path, part, third=third) for third, part in enumerate("qkv")]


def _target_parameters(config: Mapping[str, Any], names: Names, problems: list[str]) -> dict[str, list[str]]:
    """Return {module: its parameters} that `target_parameters` names, which PEFT takes as endings."""
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list):
        problems.append(f"adapter_config.json: target_parameters is {wanted!r}")
        return {}
    found: dict[str, list[str]] = {}
    for entry in wanted:
        matches = names.parameters_matching(str(entry)) if "*" not in str(entry) else []
        if not matches and names.modules.keys() - {""}:
            problems.append(f"adapter_config.json: target_parameters names '{entry}', which this model has not")
        for name, part in matches:
            found.setdefault(name, []).append(part)
    return {name: [part for part in names.modules[name]._parameters if part in parts] for name, parts in found.items()}
