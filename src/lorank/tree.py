"""The modules of a model and their names: with which adapters on which of them, and without adapters."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from .adapted import Adapted, Adapters
from .errors import AdapterError, AdapterWarning
from .variants import Adapter, Update


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


def leaves_of(layer: Adapted) -> list[Adapter]:
    """Return all adapters of a layer that hold parameters, of whatever name."""
    return [leaf for e in layer.adapters._modules.values() if isinstance(e, Adapter) for leaf in e.leaves()]


def updates_of(layer: Adapted) -> list[Update]:
    """Return all updates of a layer's matrices, of all its adapters."""
    return [leaf for leaf in leaves_of(layer) if isinstance(leaf, Update)]


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


def refuse_in_merged_block(model: nn.Module, *args: Any) -> None:
    """Raise before `load_state_dict` has changed anything in a `merged` block (a hook of it)."""
    require_not_folded(model, "cannot load a state dict")


def require_whole_checkpoint(model: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Report adapter keys as missing when a checkpoint has them for some layers only (a hook of `load_state_dict`)."""
    layers = {id(module): module for _, module in base_modules(model) if isinstance(module, Adapted)}.values()
    absent = [layer.adapters for layer in layers if layer.adapters.absent is not None]
    for layer in layers:
        for leaf in updates_of(layer):
            # What came with its base, or was not trained yet, belongs to the base that is there now.
            if layer.adapters.absent is None or leaf.at_start(layer):
                if layer.adapters.absent is not None:
                    leaf.rebase(layer)
                leaf.remember_base(layer)
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
