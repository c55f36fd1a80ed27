"""Adapt a model and take it back: adapt, reset, activate, disabled, remove, adapter_parameters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from . import planning
from .adapted import attach, detach, why_not_detachable
from .companions import INSERTED, BiasOffset, join
from .copies import pristine_copy
from .errors import AdapterError, did_you_mean, enumerate_names, raise_problems
from .hosts import host_of, own_parameter
from .names import Names
from .planning import Bias, Method, Plan
from .targets import Targets
from .tied import TOKENS, mirrors
from .tokens import TokenRows
from .tree import (
    active_adapters,
    adapted_layers,
    adapter_names,
    base_modules,
    entries,
    refuse_in_merged_block,
    require_not_folded,
    require_not_sharded,
    require_whole_checkpoint,
    require_whole_model,
    unwrapped,
)
from .variants import Adapter, Update, on_device_of

# Where a model keeps the names of the parameters that `adapt` froze, to thaw them when the last adapter goes.
_FROZEN = "_frozen_by_lorank"


def adapt(
    model: nn.Module,
    spec: Method,
    targets: Targets | None = None,
    name: str = "default",
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    train_also: str | Sequence[str] = (),
    train_tokens: Sequence[int] | Mapping[str, Sequence[int]] = (),
    bias: Bias = "none",
    tie: bool = False,
    activate: bool = True,
) -> Plan:
    """Freeze the base, add an adapter to every layer that `targets` selects, and return what was done.

    spec: what to add, such as `LoRA(rank=8, alpha=16)`; one of the paper's baselines, such as `AdapterH(size=64)`; or
        a list of an update and baselines that make one adapter together, `[LoRA(rank=8), PrefixEmbedding(8, 4)]`.
    targets: layers by the end of their names ("q_proj", "self_attn.q_proj"), patterns ("layers.*.q_proj",
        "re:..."), the words "all-linear" and "attention", parts of a fused projection ("c_attn[q,v]"), a
        function (name, layer) -> bool, or a list of these; a leading "!" excludes. Baselines have places of their
        own, and take no targets (BitFit takes exclusions); beside an update targets are the update's alone.
    name: of the adapter, for `activate`, `save` and the others.
    ranks, alphas: {pattern: value} for layers that differ from the spec. A layer with another rank keeps its
        alpha, so its scale changes too.
    train_also: modules of which the adapter trains a whole copy (a classification head). The copy runs in the
        module's place while the adapter is active; the base's own stays as it is.
    train_tokens: token numbers of which the rows are trained whole, in the input embedding and the output head (new
        tokens, after `resize_token_embeddings`); or {layer: token numbers}.
    bias: also train the biases of the "adapted" layers, or of "all"; as the adapter's own, like `train_also`.
    tie: adapt layers that share one weight (an embedding and its head) as one, whichever of them was selected; they
        are merged without breaking the tie.
    activate: make the new adapter the only active one; False leaves the active ones as they are.

    The model stays the same object of the same class with the same parameters under the same names. Raises
    AdapterError, which lists every problem, before anything is changed.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot adapt")
    require_no_inference_mode("cannot adapt")
    made = planning.plan(
        model,
        spec,
        targets,
        name,
        ranks=ranks,
        alphas=alphas,
        train_also=train_also,
        train_tokens=train_tokens,
        bias=bias,
        tie=tie,
    )
    parts: dict[str, dict[str, Adapter]] = {}
    for place in made.places:
        parts.setdefault(place.name, {})[place.part] = place.spec.build(place.host, place.layer, place.part)
    for layer_name, layer in made.biases.items():
        parts.setdefault(layer_name, {})["bias"] = BiasOffset(layer)
    layers = {place.name: place.layer for place in made.places} | made.biases | made.copies | made.token_layers
    modules = Names(model).modules
    for layer_name, ids in made.tokens.items():
        layer = modules[layer_name]
        parts.setdefault(layer_name, {})[TOKENS] = TokenRows(host_of(layer), layer, ids)
    for layer_name, mirrored in mirrors(made.tied, parts, whole=tie).items():
        parts.setdefault(layer_name, {}).update(mirrored)
        layers[layer_name] = modules[layer_name]
    for module_name, (module, build) in made.inserted.items():
        parts.setdefault(module_name, {})[INSERTED] = build(None)
        layers[module_name] = module
    built: dict[str, nn.Module] = {layer_name: join(adapters) for layer_name, adapters in parts.items()}
    for module_name, module in made.copies.items():
        try:
            built[module_name] = pristine_copy(module)
        except (RuntimeError, TypeError) as error:
            raise AdapterError(f"cannot adapt: train_also: {module_name} cannot be copied: {error}") from error
    install(model, name, {n: (layers[n], entry) for n, entry in built.items()}, activate=activate)
    planning.warn(made)
    return made


def require_no_inference_mode(action: str) -> None:
    """Raise AdapterError where parameters that are made could never be trained."""
    if torch.is_inference_mode_enabled():
        raise AdapterError(f"{action}: not under torch.inference_mode, in which no trainable parameter can be made")


def install(model: nn.Module, name: str, built: Mapping[str, tuple[nn.Module, nn.Module]], *, activate: bool) -> None:
    """Freeze the base and attach finished adapters, {layer name: (layer, entry)}; a failure is taken back."""
    attached: list[nn.Module] = []
    names = Names(model)
    freeze_base(model)
    try:
        for layer_name, (layer, entry) in built.items():
            attach(layer, layer_name, name, entry, names.read_without_call(layer_name))
            attached.append(layer)
            for leaf in entry.leaves() if isinstance(entry, Adapter) else ():
                if isinstance(leaf, Update) and leaf.base is None:
                    leaf.remember_base(layer)
    except BaseException:
        for layer in attached:
            detach(layer, name)
        thaw_base(model)
        raise
    if activate:
        set_active(model, (name,))


def freeze_base(model: nn.Module) -> None:
    """Stop gradients for every parameter that is not an adapter's, and note which ones were running."""
    frozen: list[str] = model.__dict__.get(_FROZEN, [])
    for module_name, module in base_modules(model):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(f"{module_name}.{parameter_name}")
    if _FROZEN not in model.__dict__:
        model.__dict__[_FROZEN] = frozen
        model.register_load_state_dict_pre_hook(refuse_in_merged_block)
        model.register_load_state_dict_post_hook(require_whole_checkpoint)


def thaw_base(model: nn.Module) -> None:
    """Let gradients run again where `freeze_base` stopped them, in every model that no adapter is left on."""
    for _, root in base_modules(model):
        if _FROZEN not in root.__dict__ or _is_adapted_through(root):
            continue
        frozen = set(root.__dict__.pop(_FROZEN))
        still = [(name, m) for name, m in base_modules(root) if _FROZEN in m.__dict__ and _is_adapted_through(m)]
        for module_name, module in base_modules(root):
            inner = next(((name, m) for name, m in still if f"{module_name}.".startswith(f"{name}.")), None)
            for parameter_name, parameter in module._parameters.items():
                if parameter is None or f"{module_name}.{parameter_name}" not in frozen:
                    continue
                if inner is None:
                    parameter.requires_grad_(True)
                else:  # lies in a part that was adapted by itself, and is now frozen for that alone
                    path = module_name.removeprefix(inner[0]).removeprefix(".")
                    inner[1].__dict__[_FROZEN].append(f"{path}.{parameter_name}")
        _remove_hooks(root)


def _is_adapted_through(root: nn.Module) -> bool:
    """Tell whether an adapter is left that was put on this very module, and not on a part of it."""
    return any(
        full == name for name, layer in adapted_layers(root).items() for full in layer.adapters.layer_names.values()
    )


def _remove_hooks(root: nn.Module) -> None:
    for key in [key for key, hook in root._load_state_dict_post_hooks.items() if hook is require_whole_checkpoint]:
        del root._load_state_dict_post_hooks[key]
    before = root._load_state_dict_pre_hooks
    for key in [key for key, hook in before.items() if getattr(hook, "hook", None) is refuse_in_merged_block]:
        del before[key]


def reset(model: nn.Module, name: str | None = None) -> None:
    """Initialise an adapter anew, in place: afterwards the adapted model computes what the base does.

    Also what a model needs that was adapted on the meta device, after `to_empty` and the loading of its base.
    Without a name it is the active adapters that are reset.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot reset")
    for chosen in named_or_active(model, name, "reset"):
        for layer, entry in entries(model, chosen).values():
            if isinstance(entry, Adapter):
                with torch.no_grad():
                    entry.reset_parameters(layer)
                for leaf in entry.leaves():
                    if isinstance(leaf, Update):
                        leaf.remember_base(layer)
            else:
                _copy_tensors(layer, entry)


def _copy_tensors(layer: nn.Module, copy: nn.Module) -> None:
    """Give a copy the values of the module it was made of, in place; what is on the meta device is made anew."""
    own = dict(base_modules(layer))
    made: dict[int, nn.Parameter] = {}  # what is tied in the base stays tied in the copy
    for name, module in base_modules(copy):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                source = own_parameter(own[name], key)
                made.setdefault(id(source), on_device_of(parameter, source)).data.copy_(source)
                module._parameters[key] = made[id(source)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                source = own[name].get_buffer(key)
                module._buffers[key] = source.clone() if buffer.is_meta else buffer.copy_(source)


def activate(model: nn.Module, *names: str) -> None:
    """Make the named adapters the active ones, in this order; without a name the model runs its base.

    Weights do not move and nothing is recomputed. Raises AdapterError for an unknown name, and for adapters
    that cannot run together: two copies of one module, a layer adapted inside a module that another adapter
    copies, or two adapters of which one is not additive.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot activate")
    known = adapter_names(model)
    if not all(isinstance(name, str) for name in names):
        raise AdapterError(f"cannot activate: names are strings, one argument each; got {', '.join(map(repr, names))}")
    problems = [
        f"no adapter '{name}'; {did_you_mean(name, known, 'adapters here are')}" for name in names if name not in known
    ]
    if len(set(names)) < len(names):
        problems.append(f"an adapter is named twice in {list(names)}")
    if not problems:
        problems = why_not_together(model, names)
    raise_problems("cannot activate", problems)
    set_active(model, names)


def set_active(model: nn.Module, names: tuple[str, ...]) -> None:
    """Make the named adapters the active ones in every layer that has them."""
    for layer in adapted_layers(model).values():
        layer.adapters.activate(names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base inside the block, with its own heads and biases; afterwards the same adapters are active.

    An adapter that is added inside the block is not active after it.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot disable adapters")
    before = {id(layer): layer.adapters.active for layer in adapted_layers(model).values()}
    set_active(model, ())
    try:
        yield
    finally:
        for layer in adapted_layers(model).values():  # the block may have removed an adapter, or added one
            layer.adapters.activate(before.get(id(layer), ()))


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter from the model; with the last one gone the model is what it was before the first.

    Without a name it is the only adapter there is. Class, attributes, outputs and `requires_grad` of the base
    are as they were. Raises AdapterError for an unknown name, and on layers that were sharded after `adapt`.
    """
    model = unwrapped(model)
    require_not_folded(model, "cannot remove")
    require_not_sharded(model, "cannot remove")
    chosen = name if name is not None else only_adapter(model, "remove")
    found = entries(model, require_name(model, chosen, "remove"))
    require_whole_model(model, chosen, "cannot remove")
    reasons = {layer_name: why_not_detachable(layer) for layer_name, (layer, _) in found.items()}
    raise_problems("cannot remove", [f"{layer_name}: {reason}" for layer_name, reason in reasons.items() if reason])
    for layer, _ in found.values():
        detach(layer, chosen)
    thaw_base(model)


class AdapterParameters(dict[str, nn.Parameter]):
    """What an adapter trains, by name, and which of it is on the side of the output: LoRA+ tells these apart."""

    def __init__(self) -> None:
        super().__init__()
        self.outward: set[str] = set()  # names


def adapter_parameters(model: nn.Module, name: str | None = None) -> AdapterParameters:
    """Return what an adapter trains, {parameter name: Parameter}, for any optimiser.

    Factors, and the copies and biases of `train_also` and `bias`. The names are those of
    `model.named_parameters()`, without what compiling a part of the model adds to them. Without a name it is the
    active adapters' parameters.
    """
    model = unwrapped(model)
    found = AdapterParameters()
    seen: set[int] = set()
    for chosen in named_or_active(model, name, "list the parameters"):
        for layer_name, (_, entry) in entries(model, chosen).items():
            prefix = f"{layer_name}.adapters.{chosen}" if layer_name else f"adapters.{chosen}"
            leaves = entry.leaves() if isinstance(entry, Adapter) else ()
            updates = [leaf for leaf in leaves if isinstance(leaf, Update)]
            outward = {id(leaf._parameters.get(key)) for leaf in updates for key in leaf.outward}
            for key, parameter in entry.named_parameters():
                if (parameter.is_floating_point() or parameter.is_complex()) and id(parameter) not in seen:
                    found[f"{prefix}.{key}"] = parameter
                    seen.add(id(parameter))  # what tied layers share is listed once
                    if id(parameter) in outward:
                        found.outward.add(f"{prefix}.{key}")
    return found


def named_or_active(model: nn.Module, name: str | None, action: str) -> list[str]:
    """Return [name] if it is known, or the active adapters; raises AdapterError when there is none."""
    if name is not None:
        return [require_name(model, name, action)]
    active = active_adapters(model)
    if not active:
        known = adapter_names(model)
        hint = f"name one of {', '.join(known)}, or activate it" if known else "the model has none"
        raise AdapterError(f"cannot {action}: no adapter is active; {hint}")
    return active


def only_adapter(model: nn.Module, action: str) -> str:
    """Return the name of the only active adapter, or of the only one there is."""
    known, active = adapter_names(model), active_adapters(model)
    for names in (known, active):
        if len(names) == 1:
            return names[0]
    which = f"name one of {enumerate_names(known)}" if known else "the model has no adapter"
    raise AdapterError(f"cannot {action}: {which}")


def require_name(model: nn.Module, name: str, action: str) -> str:
    """Return `name` if the model has such an adapter; raises AdapterError with the nearest names if not."""
    known = adapter_names(model)
    if name not in known:
        raise AdapterError(f"cannot {action}: no adapter '{name}'; {did_you_mean(name, known, 'adapters here are')}")
    return name


def why_not_together(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return why the named adapters cannot be active together."""
    problems = []
    copied: dict[str, str] = {}  # module name -> adapter that copies it
    lone: set[str] = set()
    for name in names:
        for layer_name, (_, entry) in entries(model, name).items():
            if isinstance(entry, Adapter):
                lone |= set() if entry.additive else {name}
            elif layer_name in copied:
                problems.append(f"'{copied[layer_name]}' and '{name}' both put a copy in the place of {layer_name}")
            else:
                copied[layer_name] = name
    for name in names:
        for layer_name in entries(model, name):
            top = next((top for top in copied if layer_name.startswith(top + ".")), None)
            layer, entry = entries(model, name)[layer_name]
            needs_weight = isinstance(entry, Adapter) and not (
                entry.additive and all(e.adds(layer) for e in entry.leaves())
            )
            if layer_name in copied and needs_weight:
                problems.append(
                    f"'{name}' runs {layer_name} under its update, of which '{copied[layer_name]}' runs a copy"
                )
            if top is not None:
                problems.append(f"'{name}' adapts {layer_name}, in {top}, of which '{copied[top]}' runs a copy")
    if len(lone) > 1:
        problems.append(
            f"{', '.join(repr(name) for name in sorted(lone))} are not additive: each is a change of the base alone, "
            "so only one of them can be active"
        )
    return problems
