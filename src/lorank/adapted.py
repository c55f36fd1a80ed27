"""How an adapter is carried: the layer's class is swapped for a subclass that adds the active adapters.

The layer stays the same object with the same parameters under the same names; its adapters are the child module
`<layer>.adapters`. PyTorch's own `fully_shard` works the same way.
"""

import functools
import types
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .errors import AdapterError
from .variants import Adapter


class Adapters(nn.Module):
    """The adapters of one layer by name, and which of them are active.

    An entry is an `Adapter`, or a copy of the layer's whole base module, which then runs in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()  # in the order of activation, only names that are here
        self.updates: tuple[str, ...] = ()  # of these, the ones added to the layer's output
        self.stand_in: str | None = None  # of these, the copy that runs instead of the layer
        self.folded: tuple[str, ...] = ()  # names that `merged` has folded into the weights for now
        self._absent: str | None = None
        self.register_load_state_dict_post_hook(_allow_base_checkpoint)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def activate(self, names: tuple[str, ...]) -> None:
        """Make those of `names` that are here the active ones."""
        self.active = tuple(name for name in names if name in self)
        self.updates = tuple(name for name in self.active if isinstance(self[name], Adapter))
        copies = [name for name in self.active if name not in self.updates]
        self.stand_in = copies[0] if copies else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._absent = None if any(key.startswith(prefix) for key in state_dict) else prefix
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"active={list(self.active)}"


def _allow_base_checkpoint(adapters: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Let a checkpoint of the bare base load with strict=True: a layer it has no adapter for keeps its own.

    A checkpoint that has any adapter tensor of a layer must have all of them.
    """
    assert isinstance(adapters, Adapters)
    prefix, adapters._absent = adapters._absent, None
    if prefix is not None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(prefix)]


class Adapted(nn.Module):
    """Mixed in front of a layer's class; adds the active adapters to its forward."""

    adapters: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.adapters
        if adapters.stand_in is None:
            output = super().forward(*args, **kwargs)
        else:
            output = adapters[adapters.stand_in](*args, **kwargs)
        if adapters.updates:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            for name in adapters.updates:
                output = adapters[name](self, x, output)
        return output

    def __repr__(self) -> str:
        text = super().__repr__()
        if "(adapters)" in text:
            return text
        return f"Adapted{text} with (adapters): {self.adapters!r}"  # a class that prints itself on one line

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the layer's own class: the mixed one is made on the fly and has no address."""
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_rebuild, (base_class(self), *arguments[1:]), *state)


def _rebuild(base: type[nn.Module], *arguments: Any) -> nn.Module:
    return cast(nn.Module, base.__new__(adapted_class(base), *arguments))


@functools.cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` whose instances carry adapters."""
    return type(f"Adapted{base.__name__}", (Adapted, base), {"__module__": __name__, "__doc__": base.__doc__})


def base_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before it was adapted."""
    mro = type(layer).__mro__
    return mro[mro.index(Adapted) + 1] if Adapted in mro else type(layer)


def attach(layer: nn.Module, name: str, entry: nn.Module) -> None:
    """Give a layer one more adapter, inactive and in the layer's own train or eval mode."""
    if not isinstance(layer, Adapted):
        base = type(layer)
        layer.add_module("adapters", Adapters())
        layer.__class__ = adapted_class(base)
        _redirect(layer, base.forward, Adapted.forward)
    adapters = cast(Adapted, layer).adapters
    adapters.add_module(name, entry)
    adapters.train(layer.training)


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter from a layer; with the last one the layer is again what it was before the first."""
    adapters = cast(Adapted, layer).adapters
    del adapters._modules[name]
    adapters.activate(adapters.active)
    if not adapters.names:
        _restore_class(layer)


def _restore_class(layer: nn.Module) -> None:
    base = base_class(layer)
    del layer._modules["adapters"]
    layer.__class__ = base
    _redirect(layer, Adapted.forward, base.forward)


def why_not_attachable(layer: nn.Module) -> str | None:
    """Return why a layer's class cannot be swapped; None when it can."""
    if isinstance(layer, Adapted):
        return None
    if hasattr(layer, "adapters"):
        return "it has an attribute `adapters` of its own, which is where lorank would keep its adapters"
    if "forward" in layer.__dict__ and not (_bound_to(layer, "forward") or _bound_to(layer, "_old_forward")):
        return "its `forward` was replaced on the instance, so that an adapter on the layer would never run"
    return None


def why_not_detachable(layer: nn.Module) -> str | None:
    """Return why a layer cannot be given back its own class; None when it can."""
    if type(layer) is not adapted_class(base_class(layer)):
        return f"its class became {type(layer).__name__} after it was adapted (sharded or parametrised)"
    return None


def _bound_to(layer: nn.Module, attribute: str) -> bool:
    method = layer.__dict__.get(attribute)
    return isinstance(method, types.MethodType) and method.__func__ is type(layer).forward


def _redirect(layer: nn.Module, old: Any, new: Any) -> None:
    """Point bound forwards kept on the instance (accelerate's hooks keep one) at the forward of the new class."""
    for attribute in ("forward", "_old_forward"):
        method = layer.__dict__.get(attribute)
        if isinstance(method, types.MethodType) and method.__func__ is old:
            layer.__dict__[attribute] = types.MethodType(new, layer)


def pristine_copy(module: nn.Module) -> nn.Module:
    """Return a trainable deep copy of a module's base, without adapters that others have put on it."""
    copy: nn.Module
    if isinstance(module, Adapted):
        copy = deepcopy(module, {id(module.adapters): nn.Module()})  # a stand-in, so that no adapter is copied
        _restore_class(copy)
    else:
        copy = deepcopy(module)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return copy


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # OptimizedModule, without importing it
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every module of the model and every name it goes by, but not the adapters."""

    def walk(name: str, module: nn.Module, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        above = above | {id(module)}
        for child_name, child in module._modules.items():
            if child is not None and not isinstance(child, Adapters) and id(child) not in above:
                yield from walk(f"{name}.{child_name}" if name else child_name, child, above)

    return walk("", model, frozenset())


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return every layer that carries adapters by its (first) dotted name, in the model's order."""
    found: dict[int, tuple[str, Adapted]] = {}
    for name, module in base_modules(model):
        if isinstance(module, Adapted):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters on the model, in the order in which they first occur."""
    return list(
        dict.fromkeys(name for layer in adapted_layers(unwrapped(model)).values() for name in layer.adapters.names)
    )


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are active."""
    return list(
        dict.fromkeys(name for layer in adapted_layers(unwrapped(model)).values() for name in layer.adapters.active)
    )


def entries(model: nn.Module, name: str) -> dict[str, tuple[Adapted, nn.Module]]:
    """Return {layer name: (layer, entry)} of one adapter."""
    return {
        layer_name: (layer, layer.adapters[name])
        for layer_name, layer in adapted_layers(model).items()
        if name in layer.adapters
    }


def require_not_folded(model: nn.Module, action: str) -> None:
    """Raise AdapterError inside a `merged` block, where the weights are not the base's."""
    if any(layer.adapters.folded for layer in adapted_layers(model).values()):
        raise AdapterError(f"{action}: not inside `with lorank.merged(model)`; leave the block first")
