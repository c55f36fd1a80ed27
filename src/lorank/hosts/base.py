"""Host: a layer type seen as one or more matrices W (out, in). Stateless; the layer is always an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, dtype_name


class NoHost(AdapterError):
    """This layer cannot be adapted; the text says why, as the end of a sentence about the layer."""


class Host(ABC):
    """How a layer applies its weight, so that any variant can add an update of it.

    Shapes: W (out, in) · A (rank, in) · B (out, rank), as in `lorank.lowrank`; a part that is a stack of matrices,
    one an expert, has them all with its number in front: W (experts, out, in). A host whose layers hold one matrix
    calls its only part "weight".

    Most hosts are additive: the update is added to the layer's output, by `AdditiveHost`. The others are substituted:
    the layer runs under W + ΔW, which it finds where it reads its parameter; the parameter itself is not touched.
    """

    additive: bool = False
    quantised: bool = False  # the weight is packed: `matrix` unpacks it, and `unpacked` takes the place of `write`
    transposed: bool = False  # the weight is stored as (in, out)
    lookup: bool = False  # the input is indices into W's columns, so it is never multiplied

    def parts(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the layer's matrices."""
        return ("weight",)

    def children(self, layer: nn.Module) -> dict[str, str]:
        """Return {part: child module} for parts that are layers of their own, inside this one."""
        return {}

    def attribute(self, layer: nn.Module, part: str) -> str:
        """Return the name of the parameter that holds a part."""
        return "weight"

    def weight(self, layer: nn.Module, part: str) -> nn.Parameter:
        """Return the parameter that `matrix` reads and `write` writes; raises NoHost when it is no plain one."""
        return plain_parameter(layer, self.attribute(layer, part))

    def own(self, layer: nn.Module, part: str = "weight") -> Tensor:
        """Return whatever the layer computes with in the place of that parameter, for use in a forward."""
        own = layer._parameters[self.attribute(layer, part)]
        assert own is not None, "a part has a parameter"
        return own

    def shape(self, layer: nn.Module, part: str) -> tuple[int, ...]:
        """Return (out, in) of a part, or (number, out, in) of a stack."""
        return tuple(self.matrix(layer, part).shape)

    @abstractmethod
    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        """Return the weight as a dense (out, in) matrix in its own dtype; a view where that is possible."""

    def dtype_name(self, layer: nn.Module, part: str) -> str:
        """Return what a part is stored as: "bfloat16", or how it is packed."""
        return dtype_name(self.own(layer, part).dtype)

    @abstractmethod
    def stored(self, layer: nn.Module, part: str, W: Tensor) -> Tensor:
        """Return a matrix (out, in) of this part in the shape of its parameter, with zeros where other parts are."""

    def write(self, layer: nn.Module, part: str, W: Tensor) -> None:
        """Write W (out, in) into the layer in place, rounded to the weight's dtype: the inverse of `matrix`."""
        self.weight(layer, part).data.copy_(self.stored(layer, part, W))

    def unpacked(self, layer: nn.Module, W: Tensor) -> nn.Module:
        """Return an ordinary layer that computes what a quantised one does, with the matrix W (out, in)."""
        raise NotImplementedError("only quantised layers are unpacked")

    def unpacked_dtype(self, layer: nn.Module) -> torch.dtype | None:
        """Return the dtype that such a layer should have; None for that of the model around it."""
        return None

    def behaves(self, layer: nn.Module) -> bool:
        """Tell whether the layer's own forward computes what this host believes it does, on a small input.

        Asked only of subclasses that replace the forward of the registered class.
        """
        return True  # whatever the forward computes, it computes it from the weight that it is given

    def namespace(self, base: type[nn.Module]) -> dict[str, Any]:
        """Return what an adapted layer's class needs, beside its parameters' names, for the update to be read."""
        return {}

    def released(self, layer: nn.Module) -> None:  # noqa: B027  # most have nothing to mend
        """Mend what is left to mend in a layer that has just lost its last adapter."""


class AdditiveHost(Host):
    """A host that can apply the two factors one after the other, and add the result to the layer's output."""

    additive = True
    may_block: bool = False  # `blocks` has to be asked
    multiplies_rows: bool = False  # W multiplies the last dimension of the layer's input

    @abstractmethod
    def down(self, layer: nn.Module, part: str, x: Tensor, A: Tensor) -> Tensor:
        """Apply A (rank, in) to the layer's input as the layer applies its weight; the result is what `up` takes."""

    @abstractmethod
    def up(self, layer: nn.Module, part: str, z: Tensor, B: Tensor) -> Tensor:
        """Apply B (out, rank) to the result of `down`; shaped like this part's output."""

    @abstractmethod
    def channel(self, layer: nn.Module, part: str, v: Tensor) -> Tensor:
        """Return a vector over the part's outputs, (out,), viewed so that it broadcasts against the layer's output."""

    def add(self, layer: nn.Module, part: str, y: Tensor, update: Tensor) -> Tensor:
        """Return the layer's output y with this part's update added."""
        return y + update.to(y.dtype)

    def whole(self, layer: nn.Module, part: str, x: Tensor, W: Tensor) -> Tensor:
        """Apply a matrix W (out, in) to the layer's input as the layer applies its own; shaped like this part's output.

        For updates that are no product of two factors.
        """
        z = self.down(layer, part, x, W)
        return self.up(layer, part, z, torch.eye(W.shape[0], device=z.device, dtype=z.dtype))

    def without_bias(self, layer: nn.Module, part: str, y: Tensor) -> Tensor:
        """Return the layer's own output y without the bias that it has added."""
        bias = layer._parameters.get("bias")
        return y if bias is None else y - self.channel(layer, part, bias).to(y.dtype)

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer's own forward returns for x, computed from its parameters.

        It runs instead of that forward in a layer whose weight is also read without a call, so that the update is not
        found in the weight and added once more.
        """

    def blocks(self, layer: nn.Module) -> bool:
        """Tell whether the layer's own forward passes no gradient on to its input, so that `passing` has to run."""
        return False

    def passing(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer's own forward returns for x, with a gradient for x."""
        return self.apply(layer, x)

    @abstractmethod
    def example(self, layer: nn.Module) -> Tensor:
        """Return a small input for `behaves`, of the weight's dtype and on its device."""

    @torch.no_grad()
    def behaves(self, layer: nn.Module) -> bool:
        x = self.example(layer)
        return agrees(layer, x, self.apply(layer, x))


H = TypeVar("H", bound=Host)

_HOSTS: dict[type | str, Host] = {}
_BY_WEIGHT: dict[str, Host] = {}  # by the qualified name of the weight's class
_BY_CONTENT: list[Callable[[nn.Module], "Host | None"]] = []


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


def register_weight(*weights: str) -> Callable[[type[H]], type[H]]:
    """Make a `Host` class responsible for layers whose weight is of a class, given by its qualified name."""

    def add(host: type[H]) -> type[H]:
        for weight in weights:
            _BY_WEIGHT[weight] = host()
        return host

    return add


def register_finder(find: Callable[[nn.Module], Host | None]) -> Callable[[nn.Module], Host | None]:
    """Make a function known that gives the host of modules told by what they hold, where their class has none."""
    _BY_CONTENT.append(find)
    return find


def plain_parameter(layer: nn.Module, name: str) -> nn.Parameter:
    """Return the layer's own dense floating-point parameter `name`.

    Raises NoHost for what only looks like one: computed by a parametrisation or a hook, sharded, packed by a
    quantiser, not yet initialised.
    """
    parameter = layer._parameters.get(name)
    if parameter is None:
        raise NoHost(f"its {name} is not a parameter of its own (parametrised, pruned, normalised or removed)")
    if torch.compiler.is_compiling():
        return parameter  # a stand-in, of one that was looked at when the layer was adapted
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
        raise NoHost(f"its {name} is a {kind.__name__}, for which lorank has no host yet (quantised, sharded or lazy)")
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NoHost(f"its {name} is packed as {dtype_name(parameter.dtype)}; it needs a host of its own")
    return parameter


def own_parameter(layer: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of the layer itself, which an attribute of an adapted layer may give with its update."""
    parameter = layer._parameters[name]
    assert parameter is not None, "asked for one that is there"
    return parameter


def host_of(layer: nn.Module) -> Host:
    """Return the host for a layer; raises NoHost with the reason when there is none."""
    host, own_class = registered_host(layer), _registered_class(type(layer))
    if host is None:
        raise NoHost(f"lorank has no host for {_public_name(type(layer))}")
    if isinstance(layer, torch.jit.ScriptModule):
        raise NoHost("a compiled ScriptModule cannot be changed")
    for part in host.parts(layer):
        host.shape(layer, part)  # raises for a weight that is not a plain matrix
    if own_class is not None and not host.quantised and overrides_forward(layer, own_class) and not host.behaves(layer):
        raise NoHost(
            f"{type(layer).__name__} does not compute what its base class {own_class.__name__} does; name the "
            "parameter itself ('...weight') to let it compute with W + ΔW"
        )
    return host


def has_host(layer: nn.Module) -> bool:
    """Tell whether the layer is of a kind that lorank adapts, whatever the state it is in."""
    return registered_host(layer) is not None


def overrides_forward(layer: nn.Module, base: type) -> bool:
    """Tell whether a class between the layer's own and `base` replaces the forward; being adapted does not count."""
    mro = type(layer).__mro__
    between = mro[: mro.index(base)]
    own = [vars(cls) for cls in between if "carries_adapters" not in vars(cls)]
    return any(name in methods for methods in own for name in ("forward", "_conv_forward"))


def registered_host(layer: nn.Module) -> Host | None:
    """Return the host for the layer's weight or class, whatever the state it is in; None when there is none."""
    weight = layer._parameters.get("weight")
    if weight is not None and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
        for cls in (*type(weight).__mro__, *type(weight.data).__mro__):
            if _qualified_name(cls) in _BY_WEIGHT:
                return _BY_WEIGHT[_qualified_name(cls)]
    host = class_host(type(layer))
    if host is not None:
        return host
    return next((host for find in _BY_CONTENT if (host := find(layer)) is not None), None)


def class_host(cls: type[nn.Module]) -> Host | None:
    """Return the host of a class of layers; None when there is none."""
    registered = _registered_class(cls)
    return None if registered is None else _HOSTS.get(registered) or _HOSTS[_qualified_name(registered)]


def _registered_class(layer_class: type[nn.Module]) -> type | None:
    for cls in layer_class.__mro__:
        if cls in _HOSTS or _qualified_name(cls) in _HOSTS:
            return cls
    return None


def agrees(layer: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Tell whether the layer's own forward gives `expected` for x, up to rounding."""
    try:
        y = getattr(layer, "base_forward", layer.forward)(x)
    except Exception:  # another signature, other assumptions about x: whatever it is, it is not ours
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    if y.device.type == "meta":
        return True  # there are no numbers to compare yet; merging looks again
    size = torch.linalg.vector_norm(expected.float())
    tolerance = 100 * torch.finfo(expected.dtype).eps
    # A layer of zeros agrees with everything, and so with nothing.
    return bool(size > 0 and torch.linalg.vector_norm((y - expected).float()) <= tolerance * size)


def _public_name(cls: type) -> str:
    """Return a class's name, with its module where there is a layer of PyTorch with the same name."""
    return _qualified_name(cls) if hasattr(nn, cls.__name__) else cls.__name__


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
