"""How an adapter is carried: the layer's class is swapped for a subclass that adds the active adapters.

The layer stays the same object with the same parameters under the same names; its adapters are the child module
`<layer>.adapters`. PyTorch's own `fully_shard` works the same way.
"""

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .copied import run_copy
from .errors import AdapterError
from .hosts import AdditiveHost, class_host, registered_host
from .variants import Adapter


class Adapters(nn.Module):
    """The adapters of one layer by name, and which of them are active.

    An entry is an `Adapter`, or a copy of the layer's whole base module, which then runs in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()  # in the order of activation, only names that are here
        self.updates: tuple[str, ...] = ()  # of these, the ones added to the layer's output
        self.preparing: tuple[str, ...] = ()  # of these, the ones that change the layer's input
        self.stand_in: str | None = None  # of these, the copy that runs instead of the layer
        self.layer_names: dict[str, str] = {}  # what the layer is called in the model each adapter was put on
        self.kept: dict[tuple[str, bool], Tensor] | None = None  # what was read of W + ΔW in the call that is running
        self.may_block = False  # the layer's forward may pass no gradient on; its host knows
        self.unpacked: nn.Module | None  # runs in the place of a quantised layer, in a `merged` block
        self.run_unpacked(None)
        self.folded: tuple[str, ...] = ()  # names that `merged` has folded into the weights for now
        self.absent: str | None = None  # the prefix of its keys, when the checkpoint last loaded had none of them
        self.register_load_state_dict_post_hook(_allow_base_checkpoint)
        self._register_state_dict_hook(_leave_out_folded)

    def run_unpacked(self, layer: nn.Module | None) -> None:
        """Run an ordinary layer instead of the quantised one for now; it is no part of the model."""
        self.__dict__["unpacked"] = layer

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
        found = {name: self[name] for name in self.active}
        adapters = {name: entry for name, entry in found.items() if isinstance(entry, Adapter)}
        self.updates = in_turn(adapters)
        self.preparing = tuple(name for name, entry in adapters.items() if entry.prepares)
        copies = [name for name in self.active if name not in adapters]
        self.stand_in = copies[0] if copies else None

    def read(self, layer: nn.Module, attribute: str) -> Tensor | None:
        """Return a parameter of the layer with what the active adapters add to it, rounded once to its dtype."""
        own = layer._parameters[attribute]
        if own is None or not self.updates:
            return own
        key = attribute, torch.is_grad_enabled()
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        leaves = [leaf for name in self.updates for leaf in cast(Adapter, self[name]).leaves()]
        changes = [leaf.change(layer) for leaf in leaves if leaf.attribute(layer) == attribute]
        value: Tensor = own
        if changes:
            host = registered_host(layer)
            if host is not None and host.quantised and attribute == "weight":
                value = host.stored(layer, "weight", host.matrix(layer, "weight"))
            value = sum(changes, value.to(changes[0].dtype)).to(value.dtype)
        if self.kept is not None:
            self.kept[key] = value
        return value

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
    if adapters.unpacked is not None:
        raise AdapterError(
            f"{prefix.removesuffix('.adapters.')} is quantised: in `with lorank.merged(model)` it has no weights to "
            "save; lorank.merge makes it an ordinary layer"
        )
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


def in_turn(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """Return the names of adapters of one layer in the order in which they run.

    First what is no sum with the layer's output, and has to be given that as it is; last what runs behind all.
    """
    return tuple(sorted(adapters, key=lambda name: (adapters[name].behind, adapters[name].additive)))


class Adapted(nn.Module):
    """Mixed in front of a layer's class; adds the active adapters to its forward."""

    carries_adapters = True
    adapters: Adapters
    input_name: str  # of the first parameter of the base's forward
    reads: frozenset[str]  # parameters that are read with what the adapters add to them
    substitutes: bool  # the base's forward runs under these; otherwise it runs as it is, and the output is added to

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.adapters
        if adapters.preparing:
            args, kwargs = self._prepared(args, kwargs)
        x: Tensor | None = args[0] if args else kwargs.get(self.input_name)
        if adapters.stand_in is not None:
            output = run_copy(self, adapters[adapters.stand_in], args, kwargs)
        elif adapters.unpacked is not None:
            output = adapters.unpacked(*args, **kwargs)
        elif self.substitutes:
            return self._run_under_updates(args, kwargs)
        elif self.reads and adapters.updates:
            output = self._additive_host().apply(self, *self._with_input(args, kwargs), **kwargs)
        elif adapters.may_block and torch.is_grad_enabled() and self._additive_host().blocks(self):
            output = self._additive_host().passing(self, *self._with_input(args, kwargs), **kwargs)
        else:
            output = super().forward(*args, **kwargs)
        if adapters.updates:
            assert x is not None, "a layer whose output is added to has an input"
            for name in adapters.updates:
                output = adapters[name](self, x, output)
        return output

    def _prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the input as the active adapters change it."""
        x = args[0] if args else kwargs[self.input_name]
        for name in self.adapters.preparing:
            x = cast(Adapter, self.adapters[name]).prepare(self, x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self.input_name: x})

    def _with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments with the input among them, which hosts call by no name, and take it from `kwargs`."""
        return args if args else (kwargs.pop(self.input_name),)

    def _additive_host(self) -> AdditiveHost:
        host = registered_host(self)
        assert isinstance(host, AdditiveHost), "layers of all others substitute"
        return host

    def _run_under_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the base's forward, which reads W + ΔW; each is computed once, however often it is read."""
        adapters = self.adapters
        before, adapters.kept = adapters.kept, {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            adapters.kept = before

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as it is without adapters."""
        adapters = self.adapters
        before, adapters.updates = adapters.updates, ()  # nothing is read with an update either
        try:
            return super().forward(*args, **kwargs)
        finally:
            adapters.updates = before

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
        return (_rebuild, (base_class(self), self.reads, self.substitutes, *arguments[1:]), *state)


def _rebuild(base: type[nn.Module], reads: frozenset[str], substitutes: bool, *arguments: Any) -> nn.Module:
    return cast(nn.Module, base.__new__(adapted_class(base, reads, substitutes), *arguments))


@functools.cache
def adapted_class(
    base: type[nn.Module], reads: frozenset[str] = frozenset(), substitutes: bool = False
) -> type[nn.Module]:
    """Return the subclass of `base` whose instances carry adapters, and whose parameters `reads` are read as W + ΔW."""
    parameters = list(inspect.signature(base.forward).parameters)
    host = class_host(base)
    namespace = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "input_name": parameters[1] if parameters[1:] else "",
        "reads": reads,
        "substitutes": substitutes,
        **{name: _reading(name) for name in reads},
        **(host.namespace(base) if host is not None else {}),
    }
    # A module that is no layer may be asked for its class's name, as transformers asks its models.
    name = base.__name__ if host is None else f"Adapted{base.__name__}"
    return type(name, (Adapted, base), namespace)


def _reading(attribute: str) -> property:
    def read(layer: Adapted) -> Tensor | None:
        form = layer.adapters.read
        try:
            return form(layer, attribute)
        except AttributeError as error:  # of a property nn.Module takes it for "not here", and gives the parameter
            raise RuntimeError(f"{attribute} with its update cannot be formed: {error}") from error

    return property(read)  # assignment is nn.Module's, and changes the parameter


def base_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before it was adapted."""
    mro = type(layer).__mro__
    return mro[mro.index(Adapted) + 1] if Adapted in mro else type(layer)


def attach(
    layer: nn.Module, layer_name: str, name: str, entry: nn.Module, read_without_call: frozenset[str] = frozenset()
) -> None:
    """Give a layer one more adapter, inactive and in the layer's own train or eval mode.

    layer_name: what the layer is called in the model that is adapted.
    read_without_call: those of its parameters that other modules read.
    """
    reads, substitutes = _reads(layer, entry, read_without_call)
    if not isinstance(layer, Adapted):
        layer.add_module("adapters", Adapters())
        host = registered_host(layer)
        cast(Adapters, layer.adapters).may_block = isinstance(host, AdditiveHost) and host.may_block
    if not isinstance(layer, Adapted) or (layer.reads, layer.substitutes) != (reads, substitutes):
        _change_class(layer, adapted_class(base_class(layer), reads, substitutes))
    adapters = cast(Adapted, layer).adapters
    adapters.add_module(name, entry)
    adapters.layer_names[name] = layer_name
    adapters.train(layer.training)


def _reads(layer: nn.Module, entry: nn.Module, read_without_call: frozenset[str]) -> tuple[frozenset[str], bool]:
    """Return which parameters have to be read with what the adapters add to them, and whether all of it is."""
    present = list(layer.adapters._modules.values()) if isinstance(layer, Adapted) else []
    leaves = [leaf for e in [*present, entry] if isinstance(e, Adapter) for leaf in e.leaves()]
    changed = {leaf.attribute(layer) for leaf in leaves} - {""}
    before = layer.reads if isinstance(layer, Adapted) else frozenset()
    reads = before | (read_without_call & changed)
    substitutes = not all(leaf.adds(layer) for leaf in leaves)
    substitutes |= bool(reads) and not isinstance(registered_host(layer), AdditiveHost)
    return (reads | changed if substitutes else reads), substitutes


def become(layer: nn.Module, other: nn.Module) -> None:
    """Make a layer what another is, parameters and attributes and class, with the adapters that it carries."""
    to = type(other)
    adapters = layer._modules.get("adapters")
    if isinstance(layer, Adapted):
        to = adapted_class(to, layer.reads, layer.substitutes)
    _change_class(layer, to)
    kept = {"forward", "_old_forward", "_hf_hook", "_frozen_by_lorank"}
    for name in layer.__dict__.keys() - other.__dict__.keys() - kept:
        del layer.__dict__[name]
    layer.__dict__.update({k: v for k, v in other.__dict__.items() if not k.startswith("_") and k != "training"})
    layer._parameters, layer._buffers, layer._modules = other._parameters, other._buffers, other._modules
    if adapters is not None:
        layer._modules["adapters"] = adapters


def _change_class(layer: nn.Module, to: type[nn.Module]) -> None:
    before = type(layer)
    if before is not to:
        layer.__class__ = to
        _redirect(layer, before.forward, to.forward)


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter from a layer; with the last one the layer is again what it was before the first."""
    adapters = cast(Adapted, layer).adapters
    del adapters._modules[name], adapters.layer_names[name]
    adapters.activate(adapters.active)
    if not adapters.names:
        restore_class(layer)


def restore_class(layer: nn.Module) -> None:
    """Make a layer without adapters what it was before the first."""
    del layer._modules["adapters"]
    _change_class(layer, base_class(layer))
    host = registered_host(layer)
    if host is not None:
        host.released(layer)


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
    if isinstance(layer, Adapted) and type(layer) is not adapted_class(
        base_class(layer), layer.reads, layer.substitutes
    ):
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
