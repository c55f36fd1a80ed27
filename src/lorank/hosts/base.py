"""Host: a layer type seen as one or more matrices W (out, in). Stateless; the layer is always an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, dtype_name


class NoHost(AdapterError):
    """This layer cannot be adapted; the text says why, as the end of a sentence about the layer."""


class Host(ABC):
    """How a layer applies its weight, so that any variant can add an update of it.

    Shapes: W (out, in) · A (rank, in) · B (out, rank), as in `lorank.lowrank`. A host whose layers hold one
    matrix calls its only part "weight".
    """

    transposed: bool = False  # the weight is stored as (in, out)
    lookup: bool = False  # the input is indices into W's columns, so it is never multiplied

    def parts(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the layer's matrices."""
        return ("weight",)

    def shape(self, layer: nn.Module, part: str) -> tuple[int, int]:
        """Return (out, in) of a part."""
        out, in_ = self.matrix(layer, part).shape
        return out, in_

    @abstractmethod
    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        """Return the weight as a dense (out, in) matrix in its own dtype; a view where that is possible."""

    @abstractmethod
    def write(self, layer: nn.Module, part: str, W: Tensor) -> None:
        """Write W (out, in) into the layer in place, rounded to the weight's dtype: the inverse of `matrix`."""

    @abstractmethod
    def down(self, layer: nn.Module, part: str, x: Tensor, A: Tensor) -> Tensor:
        """Apply A (rank, in) to the layer's input as the layer applies its weight; ends in (..., rank)."""

    @abstractmethod
    def up(self, layer: nn.Module, part: str, z: Tensor, B: Tensor) -> Tensor:
        """Apply B (out, rank) to the result of `down`; shaped like this part's output."""

    @abstractmethod
    def channel(self, layer: nn.Module, part: str, v: Tensor) -> Tensor:
        """Return a vector over the part's outputs, (out,), viewed so that it broadcasts against the layer's output."""

    def add(self, layer: nn.Module, part: str, y: Tensor, update: Tensor) -> Tensor:
        """Return the layer's output y with this part's update added."""
        return y + update.to(y.dtype)

    @abstractmethod
    def behaves(self, layer: nn.Module) -> bool:
        """Tell whether the layer's own forward computes what this host believes it does, on a small input.

        Asked only of subclasses that replace the forward of the registered class.
        """

    def weight(self, layer: nn.Module) -> nn.Parameter:
        """Return the parameter that `matrix` reads and `write` writes."""
        return plain_parameter(layer, "weight")


H = TypeVar("H", bound=Host)

_HOSTS: dict[type | str, Host] = {}

# Modules that read the weights of what lies in them without calling it, always or in eval mode, so that nothing
# put on an inner layer would have an effect (pytorch#78109).
_READ_WITHOUT_CALL = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def register(*layers: type | str) -> Callable[[type[H]], type[H]]:
    """Make a `Host` class responsible for layer classes.

    A layer class of another library is given as its qualified name ("transformers.pytorch_utils.Conv1D"), so
    that nothing is imported for it.
    """

    def add(host: type[H]) -> type[H]:
        for layer in layers:
            _HOSTS[layer] = host()
        return host

    return add


def plain_parameter(layer: nn.Module, name: str) -> nn.Parameter:
    """Return the layer's own dense floating-point parameter `name`.

    Raises NoHost for what only looks like one: computed by a parametrisation or a hook, sharded, packed by a
    quantiser, not yet initialised.
    """
    parameter = layer._parameters.get(name)
    if parameter is None:
        raise NoHost(f"its {name} is not a parameter of its own (parametrised, pruned, normalised or removed)")
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
        raise NoHost(f"its {name} is a {kind.__name__}, for which lorank has no host yet (quantised, sharded or lazy)")
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NoHost(f"its {name} is packed as {dtype_name(parameter.dtype)}; it needs a host of its own")
    return parameter


def host_of(layer: nn.Module) -> Host:
    """Return the host for a layer; raises NoHost with the reason when there is none."""
    host, own_class = registered_host(layer), _registered_class(layer)
    if host is None or own_class is None:
        raise NoHost(f"lorank has no host for {_public_name(type(layer))}")
    if isinstance(layer, torch.jit.ScriptModule):
        raise NoHost("a compiled ScriptModule cannot be changed")
    for part in host.parts(layer):
        host.shape(layer, part)  # raises for a weight that is not a plain matrix
    if overrides_forward(layer, own_class) and not host.behaves(layer):
        raise NoHost(f"{type(layer).__name__} does not compute what its base class {own_class.__name__} does")
    return host


def has_host(layer: nn.Module) -> bool:
    """Tell whether the layer is of a kind that lorank adapts, whatever the state it is in."""
    return registered_host(layer) is not None


def read_without_call(above: Iterable[nn.Module]) -> str | None:
    """Return why a change of a module that lies in the modules `above` would have no effect; None when it would."""
    for module in above:
        for kind in _READ_WITHOUT_CALL:
            if isinstance(module, kind):
                return f"{kind.__name__} reads its weight without calling it, so that an adapter there has no effect"
    return None


def overrides_forward(layer: nn.Module, base: type) -> bool:
    """Tell whether a class between the layer's own and `base` replaces the forward; being adapted does not count."""
    mro = type(layer).__mro__
    between = mro[: mro.index(base)]
    return any("forward" in vars(cls) and "carries_adapters" not in vars(cls) for cls in between)


def registered_host(layer: nn.Module) -> Host | None:
    """Return the host for the layer's class, whatever the state the layer is in; None when there is none."""
    cls = _registered_class(layer)
    return None if cls is None else _HOSTS.get(cls) or _HOSTS[_qualified_name(cls)]


def _registered_class(layer: nn.Module) -> type | None:
    for cls in type(layer).__mro__:
        if cls in _HOSTS or _qualified_name(cls) in _HOSTS:
            return cls
    return None


def _public_name(cls: type) -> str:
    """Return a class's name, with its module where there is a layer of PyTorch with the same name."""
    return _qualified_name(cls) if hasattr(nn, cls.__name__) else cls.__name__


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
