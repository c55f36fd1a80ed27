"""How an adapter is carried: the layer's class is swapped for a subclass that adds the active adapters.

The layer stays the same object with the same parameters under the same names; its adapters are the child module
`<layer>.adapters`. PyTorch's own `fully_shard` works the same way.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .errors import AdapterError, AdapterWarning
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
        self.layer_names: dict[str, str] = {}  # what the layer is called in the model each adapter was put on
        self.folded: tuple[str, ...] = ()  # names that `merged` has folded into the weights for now
        self.absent: str | None = None  # the prefix of its keys, when the checkpoint last loaded had none of them
        self.register_load_state_dict_post_hook(_allow_base_checkpoint)
        self._register_state_dict_hook(_leave_out_folded)

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
        if self.folded:
            raise AdapterError("cannot load a state dict inside `with lorank.merged(model)`; leave the block first")
        self.absent = None if any(key.startswith(prefix) for key in state_dict) else prefix
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"active={list(self.active)}"


def _leave_out_folded(adapters: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave adapters out of a state dict taken in a `merged` block: its weights hold them already."""
    assert isinstance(adapters, Adapters)
    prefixes = tuple(f"{prefix}{name}." for name in adapters.folded)
    if prefixes:
        for key in [key for key in state_dict if key.startswith(prefixes)]:
            del state_dict[key]


def _allow_base_checkpoint(adapters: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Let a checkpoint of the bare base load with strict=True: a layer it has no adapter for keeps its own.

    A checkpoint that has any adapter tensor of a layer must have all of them; `require_whole_checkpoint` sees to
    it that it has them of all layers or of none.
    """
    assert isinstance(adapters, Adapters)
    prefix = adapters.absent
    if prefix is not None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(prefix)]


def refuse_in_merged_block(model: nn.Module, *args: Any) -> None:
    """Raise before `load_state_dict` has changed anything in a `merged` block (a hook of it)."""
    require_not_folded(model, "cannot load a state dict")


def require_whole_checkpoint(model: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Report adapter keys as missing when a checkpoint has them for some layers only (a hook of `load_state_dict`)."""
    layers = {id(module): module for _, module in base_modules(model) if isinstance(module, Adapted)}.values()
    absent = [layer.adapters for layer in layers if layer.adapters.absent is not None]
    if len(absent) < len(layers):
        for adapters in absent:
            incompatible.missing_keys.extend(f"{adapters.absent}{key}" for key in adapters.state_dict())
    elif any(not isinstance(adapters[name], Adapter) for adapters in absent for name in adapters.names):
        warnings.warn(
            "a checkpoint of the base was loaded; modules that an adapter trains as a copy (train_also) keep the "
            "values they had: call lorank.reset to start them from this base",
            AdapterWarning,
            stacklevel=4,
        )


class Adapted(nn.Module):
    """Mixed in front of a layer's class; adds the active adapters to its forward."""

    carries_adapters = True
    adapters: Adapters
    input_name: str  # of the first parameter of the base's forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.adapters
        if adapters.stand_in is None:
            output = super().forward(*args, **kwargs)
        else:
            output = run_copy(self, adapters[adapters.stand_in], args, kwargs)
        if adapters.updates:
            x: Tensor = args[0] if args else kwargs[self.input_name]
            for name in adapters.updates:
                output = adapters[name](self, x, output)
        return output

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as it is without adapters."""
        return super().forward(*args, **kwargs)

    def __repr__(self) -> str:
        text = super().__repr__()
        if "(adapters)" in text:
            return text
        return f"Adapted{text} with (adapters): {self.adapters!r}"  # a class that prints itself on one line

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the layer's own class: the mixed one is made on the fly and has no address."""
        if self.adapters.folded:
            raise AdapterError("cannot copy a model inside `with lorank.merged(model)`; leave the block first")
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_rebuild, (base_class(self), *arguments[1:]), *state)


def run_copy(layer: nn.Module, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a copy of a layer, with its parameters rounded to the dtypes of the layer's own where they are wider."""
    rounded = {}
    for name, parameter in copy.named_parameters():
        path, _, key = name.rpartition(".")
        own = layer.get_submodule(path)._parameters.get(key)  # None when it was parametrised since
        if own is not None and parameter.dtype != own.dtype:
            rounded[name] = parameter.to(own.dtype)
    return torch.func.functional_call(copy, rounded, args, kwargs) if rounded else copy(*args, **kwargs)


def _rebuild(base: type[nn.Module], *arguments: Any) -> nn.Module:
    return cast(nn.Module, base.__new__(adapted_class(base), *arguments))


@functools.cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` whose instances carry adapters."""
    parameters = list(inspect.signature(base.forward).parameters)
    namespace = {"__module__": __name__, "__doc__": base.__doc__, "input_name": parameters[1] if parameters[1:] else ""}
    return type(f"Adapted{base.__name__}", (Adapted, base), namespace)


def base_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before it was adapted."""
    mro = type(layer).__mro__
    return mro[mro.index(Adapted) + 1] if Adapted in mro else type(layer)


def attach(layer: nn.Module, layer_name: str, name: str, entry: nn.Module) -> None:
    """Give a layer one more adapter, inactive and in the layer's own train or eval mode.

    layer_name: what the layer is called in the model that is adapted.
    """
    if not isinstance(layer, Adapted):
        base = type(layer)
        layer.add_module("adapters", Adapters())
        layer.__class__ = adapted_class(base)
        _redirect(layer, base.forward, Adapted.forward)
    adapters = cast(Adapted, layer).adapters
    adapters.add_module(name, entry)
    adapters.layer_names[name] = layer_name
    adapters.train(layer.training)


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter from a layer; with the last one the layer is again what it was before the first."""
    adapters = cast(Adapted, layer).adapters
    del adapters._modules[name], adapters.layer_names[name]
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
    if "adapters" in layer.__dict__ or "adapters" in layer._modules or hasattr(type(layer), "adapters"):
        return "it has an attribute `adapters` of its own, which is where lorank would keep its adapters"
    if "forward" in layer.__dict__ and not (_bound_to(layer, "forward") or _bound_to(layer, "_old_forward")):
        return "its `forward` was replaced on the instance, so that an adapter on the layer would never run"
    if hasattr(layer, "_hf_hook") and any(p.is_meta for p in layer._parameters.values() if p is not None):
        return "accelerate has offloaded its weights; adapt the model before it is dispatched"
    try:
        adapted_class(type(layer))
    except (TypeError, ValueError) as error:
        return f"{type(layer).__name__} cannot be subclassed: {error}"
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


# The hooks of a module itself. They run for the layer, so its copy, which runs in the layer's forward, has none.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def pristine_copy(module: nn.Module) -> nn.Module:
    """Return a trainable deep copy of a module's base, without adapters that others have put on it.

    Parameters of a half-precision base are kept in float32, in which small steps are not rounded away.
    """
    copy: nn.Module
    if isinstance(module, Adapted):
        copy = deepcopy(module, {id(module.adapters): nn.Module()})  # a stand-in, so that no adapter is copied
        _restore_class(copy)
    else:
        copy = deepcopy(module)
    for hooks in _HOOKS:
        copy.__dict__[hooks] = type(copy.__dict__[hooks])()
    for parameter in copy.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return copy


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"the first argument must be the model, a torch.nn.Module; it is a {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # OptimizedModule, without importing it
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every module of the model and every name it goes by, but not the adapters.

    `torch.compile`'s wrapper around a part of the model adds nothing to the names of what lies in it.
    """

    def walk(name: str, module: nn.Module, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        above = above | {id(module)}
        for child_name, child in module._modules.items():
            if child is None or isinstance(child, Adapters) or id(child) in above:
                continue
            if child_name == "_orig_mod":
                yield from walk(name, child, above)
            else:
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


def require_whole_model(model: nn.Module, name: str, action: str) -> None:
    """Raise AdapterError for a part of the model that an adapter was put on: the rest of its base is frozen too."""
    for layer_name, (layer, _) in entries(model, name).items():
        full_name = layer.adapters.layer_names[name]
        if len(full_name) > len(layer_name) and full_name.endswith(layer_name):
            raise AdapterError(
                f"{action}: adapter '{name}' was put on a larger model, in which '{layer_name}' is '{full_name}'; "
                "give that one"
            )


def require_not_folded(model: nn.Module, action: str) -> None:
    """Raise AdapterError inside a `merged` block, where the weights are not the base's."""
    if any(layer.adapters.folded for layer in adapted_layers(model).values()):
        raise AdapterError(f"{action} inside `with lorank.merged(model)`; leave the block first")


def require_not_sharded(model: nn.Module, action: str) -> None:
    """Raise AdapterError for a model of which each process holds a part."""
    for name, parameter in model.named_parameters():
        if type(parameter).__module__.startswith("torch.distributed"):
            raise AdapterError(
                f"{action}: {name} is a {type(parameter).__name__}, sharded over processes; save the adapter, and do "
                "this with a whole model that has loaded it"
            )
