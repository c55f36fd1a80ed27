"""What an adapter file says, apart from how its format says it; taken from a model, and put on one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapted import pristine_copy, why_not_attachable
from ..companions import BiasOffset, join, why_no_bias_offset
from ..copies import copyable_parts, count, own_parameters, why_not_copyable
from ..errors import AdapterError, did_you_mean, dtype_name, raise_problems
from ..fingerprint import Comparison, Fingerprint, compare, fingerprint, other_base
from ..hosts import ConvHost, Host, NoHost
from ..names import Names
from ..planning import Bias, Place, Plan, name_problems
from ..surgery import install, require_no_inference_mode
from ..tree import entries
from ..variants import Adapter, LoRA, LoRAAdapter, factor_dtype


@dataclass
class LayerUpdate:
    """The factors of one layer: {part: (A (rank, in), B (out, rank))}; the only part of a plain layer is "weight"."""

    spec: LoRA
    factors: dict[str, tuple[Tensor, Tensor]]
    host: Host | None = None  # known when it was taken from a model
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the parameters, by part; known then too
    groups: int = 1  # of a convolution
    by_parts: bool = False  # the file says which parts these are; else they are the whole layer
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)


@dataclass
class Content:
    """One adapter."""

    spec: LoRA
    updates: dict[str, LayerUpdate] = field(default_factory=dict)  # by layer
    biases: dict[str, Tensor] = field(default_factory=dict)  # by layer, (out,)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by module, its state dict
    base: dict[str, Tensor] = field(default_factory=dict)  # tensors of the base that came along
    bias: Bias = "none"
    about: dict[str, Any] = field(default_factory=dict)  # what its maker wrote of it: the task, the names of labels
    task: str | None = None  # what the model is for, when the file says so: causal-lm or classification
    base_model: str | None = None  # where the base is, when the file says so: a hub id
    problems: list[str] = field(default_factory=list)  # what a reader found; `fit` adds what it finds, and raises
    remarks: list[str] = field(default_factory=list)  # what a reader should warn of once the adapter is loaded


def outputs_of_head(content: Content) -> int:
    """Return how many outputs a trained head has, 0 without one; of its layers the last is the narrowest."""
    matrices = [tensor for copy in content.copies.values() for tensor in copy.values() if tensor.dim() == 2]
    return min((matrix.shape[0] for matrix in matrices), default=0)


def gather(model: nn.Module, name: str) -> Content:
    """Return what there is to save of an adapter. Raises AdapterError for values that are not finite."""
    found = entries(model, name)
    content = Content(LoRA())
    problems = []
    for layer_name, (layer, entry) in found.items():
        for key, parameter in entry.named_parameters():
            if parameter.is_meta:
                problems.append(f"{layer_name}: {key} is on the meta device and has no values")
            elif not torch.isfinite(_collected(parameter)).all():
                problems.append(f"{layer_name}: {key} holds NaN or Inf")
        if not isinstance(entry, Adapter):
            content.copies[layer_name] = _tensors(entry)
            continue
        for leaf in entry.leaves():
            if isinstance(leaf, BiasOffset):
                content.biases[layer_name] = _collected(leaf.value(layer))
            elif isinstance(leaf, LoRAAdapter):
                update = content.updates.setdefault(layer_name, LayerUpdate(leaf.spec, {}, host=leaf.host))
                update.groups = getattr(layer, "groups", 1) if isinstance(leaf.host, ConvHost) else 1
                update.shapes[leaf.part] = tuple(leaf.host.own(layer, leaf.part).shape)
                update.factors[leaf.part] = (_collected(leaf.A), _collected(leaf.B))
                with suppress(NoHost):  # a weight that was sharded or parametrised since cannot be recognised later
                    W = leaf.host.matrix(layer, leaf.part)
                    if not W.is_meta:
                        update.fingerprints[leaf.part] = fingerprint(W, leaf.host.dtype_name(layer, leaf.part))
            else:
                problems.append(f"{layer_name}: no file format yet for {type(leaf).__name__}")
    raise_problems("cannot save", problems)
    if content.updates:
        specs = Counter(update.spec for update in content.updates.values())
        content.spec = specs.most_common(1)[0][0]
    if content.biases:
        content.bias = "adapted" if content.biases.keys() <= content.updates.keys() else "all"
    return content


def _collected(tensor: Tensor) -> Tensor:
    """Return a tensor's values, collected from all processes when it is sharded over them."""
    return getattr(tensor.detach(), "full_tensor", lambda: tensor.detach())()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state dict; it may hold other things too."""
    return {key: _collected(value) for key, value in _own_tensors(module).items()}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers themselves that `_tensors` holds the values of."""
    return {key: value for key, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def fit(model: nn.Module, content: Content, name: str, *, activate: bool, allow_other_base: bool) -> Plan:
    """Put an adapter on a model. Everything is checked first; on an error nothing has changed."""
    require_no_inference_mode("cannot load")
    names = Names(model)
    problems = name_problems(model, name) + content.problems
    parts: dict[str, dict[str, Adapter]] = {}
    places = _fit_updates(content, names, parts, problems, allow_other_base)
    biases = _fit_biases(content, names, parts, problems)
    copies = _fit_copies(content, names, problems)
    built: dict[str, nn.Module] = {layer: join(adapters) for layer, adapters in parts.items()}
    built.update(copies)
    for layer_name in built:
        reason = why_not_attachable(names.modules[layer_name])
        if reason:
            problems.append(f"{layer_name}: {reason}")
    problems += _base_problems(content, names)
    if not built and not problems:
        problems.append("it holds no adapter")
    raise_problems("this adapter does not fit this model", list(dict.fromkeys(problems)))
    install(model, name, {n: (names.modules[n], entry) for n, entry in built.items()}, activate=activate)
    return Plan(
        adapter=name,
        spec=content.spec,
        places=tuple(places),
        copies={module_name: names.modules[module_name] for module_name in copies},
        biases=biases,
        bias=content.bias,
        left_out={},
        base_parameters=count(own_parameters(model)),
        warnings=tuple(content.remarks),
    )


def _fit_updates(
    content: Content,
    names: Names,
    parts: dict[str, dict[str, Adapter]],
    problems: list[str],
    allow_other_base: bool,
) -> list[Place]:
    """Build the low-rank updates into `parts`, {layer: {part: adapter}}."""
    places: list[Place] = []
    compared: dict[str, Comparison] = {}
    for canonical, host, update in located(content, names, problems):
        layer = names.modules[canonical]
        known = host.parts(layer)
        problems += [f"{canonical} has no part {part}, which the file adapts" for part in update.factors.keys() - known]
        for part in (part for part in known if part in update.factors):
            A, B = update.factors[part]
            place = Place(canonical, part, layer, host, update.spec, host.shape(layer, part))
            wrong = factor_problems(place, A, B)
            if host.weight(layer, part).device.type == "meta":
                wrong.append(f"{place.label}: the model is on the meta device; load its weights first")
            problems += wrong
            if wrong:
                continue
            places.append(place)
            parts.setdefault(canonical, {})[part] = filled = _filled(place, A, B)
            if part in update.fingerprints:
                filled.base, filled.other_base_allowed = update.fingerprints[part], allow_other_base
                compared[place.label] = compare(filled.base, host.matrix(layer, part), host.dtype_name(layer, part))
    problems += other_base(compared, allow_other_base, content.remarks)
    return places


def _fit_biases(
    content: Content, names: Names, parts: dict[str, dict[str, Adapter]], problems: list[str]
) -> dict[str, nn.Module]:
    """Build the biases into `parts`; return their layers by name."""
    biases: dict[str, nn.Module] = {}
    for layer_name, value in content.biases.items():
        if layer_name not in names.modules:
            hint = did_you_mean(layer_name, names.modules)
            problems.append(f"the file has a bias for {layer_name}, which this model has not; {hint}")
            continue
        canonical = names.canonical[layer_name]
        module = names.modules[canonical]
        reason = f"the file has a bias for {canonical} twice, under two of its names" if canonical in biases else None
        reason = reason or _bias_problem(canonical, module, value)
        if reason:
            problems.append(reason)
            continue
        offset = BiasOffset(module)
        bias = module.get_parameter("bias").detach()
        offset.offset.data.copy_(value.to(bias.device, offset.offset.dtype) - bias)
        parts.setdefault(canonical, {})["bias"] = offset
        biases[canonical] = module
    return biases


def located(content: Content, names: Names, problems: list[str]) -> Iterator[tuple[str, Host, LayerUpdate]]:
    """Yield each update with its layer's first name and host; why one has no place goes into `problems`."""
    seen: set[str] = set()
    for name, update in content.updates.items():
        try:
            canonical, host = _locate(name, update, names)
        except AdapterError as error:
            problems.append(str(error))
            continue
        if canonical in seen:
            problems.append(f"the file adapts {canonical} twice, under two of its names")
            continue
        seen.add(canonical)
        yield canonical, host, update


def _locate(name: str, update: LayerUpdate, names: Names) -> tuple[str, Host]:
    """Return the layer's first name and its host, the parts' host when the update is by parts."""
    if name not in names.modules:
        raise AdapterError(f"the file adapts {name}, which this model has not; {did_you_mean(name, names.modules)}")
    canonical = names.canonical[name]
    try:
        return canonical, names.host(canonical, update.factors if update.by_parts else None)
    except NoHost as error:
        raise AdapterError(f"the file adapts {name}, which cannot be adapted: {error}") from None


def factor_problems(place: Place, A: Tensor, B: Tensor) -> list[str]:
    """Return what is wrong with a file's factors for one matrix of a model: shapes and values."""
    problems = []
    *stack, out, in_ = place.shape
    rank = place.spec.rank
    for factor, tensor, needed in (("A", A, (*stack, rank, in_)), ("B", B, (*stack, out, rank))):
        if tuple(tensor.shape) != needed:
            problems.append(f"{place.label}: {factor} is {tuple(tensor.shape)} in the file, the model needs {needed}")
        else:
            dtype = factor_dtype(place.spec, place.host.weight(place.layer, place.part))
            problems += _value_problems(f"{place.label}: {factor}", tensor, dtype)
    return problems


def _value_problems(what: str, tensor: Tensor, dtype: torch.dtype) -> list[str]:
    """Return what is wrong with the values of a file's tensor that is to be kept in a dtype."""
    if not tensor.is_floating_point():
        return [f"{what} is {dtype_name(tensor.dtype)} in the file; it must be floating-point"]
    if not torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.float()).all():
        return [f"{what} holds NaN or Inf"]
    if not torch.isfinite(tensor.to(dtype)).all():
        return [f"{what} holds numbers that are too large for {dtype_name(dtype)}"]
    return []


def _filled(place: Place, A: Tensor, B: Tensor) -> LoRAAdapter:
    weight = place.host.weight(place.layer, place.part)
    adapter = cast(LoRAAdapter, place.spec.build(place.host, place.layer, place.part, torch.device("meta")))
    for factor, tensor in (("A", A), ("B", B)):
        dtype = getattr(adapter, factor).dtype
        setattr(adapter, factor, nn.Parameter(tensor.to(weight.device, dtype, copy=True)))
    return adapter


def _bias_problem(name: str, module: nn.Module, value: Tensor) -> str | None:
    reason = why_no_bias_offset(module)
    if reason:
        return f"the file has a bias for {name}: {reason}"
    bias = module.get_parameter("bias")
    if value.shape != bias.shape:
        return f"{name}.bias is {tuple(value.shape)} in the file, the model needs {tuple(bias.shape)}"
    return next(iter(_value_problems(f"{name}.bias", value, torch.promote_types(bias.dtype, torch.float32))), None)


def _fit_copies(content: Content, names: Names, problems: list[str]) -> dict[str, nn.Module]:
    copies: dict[str, nn.Module] = {}
    adapted = {names.canonical.get(layer, layer) for layer in content.updates}
    for name, tensors in content.copies.items():
        canonical = names.canonical.get(name)
        if canonical is None:
            problems.append(
                f"the file has a copy of {name}, which this model has not; {did_you_mean(name, names.modules)}"
            )
            continue
        members = copyable_parts(canonical, names)  # of a sequence, as many copies as it has members
        reasons = [reason for member in members if (reason := why_not_copyable(member, names, adapted))]
        if reasons:
            problems += reasons
            continue
        made = {member: pristine_copy(names.modules[member]) for member in members}
        places = {
            f"{member}.{key}".removeprefix(f"{canonical}."): (member, key, tensor)
            for member, copy in made.items()
            for key, tensor in _own_tensors(copy).items()
        }
        before = len(problems)
        problems += [f"{name}: the file lacks {key}" for key in sorted(places.keys() - tensors.keys())]
        unknown = sorted(tensors.keys() - places.keys())
        problems += [f"{name}: the file has {key}, which the module has not" for key in unknown]
        for key in sorted(places.keys() & tensors.keys()):
            wanted, found = places[key][2], tensors[key]
            if wanted.shape != found.shape:
                problems.append(
                    f"{name}.{key} is {tuple(found.shape)} in the file, the model needs {tuple(wanted.shape)}"
                )
            elif isinstance(wanted, nn.Parameter) and wanted.is_floating_point():  # a buffer may hold infinities
                problems += _value_problems(f"{name}.{key}", found, wanted.dtype)
        if len(problems) == before:
            for key, (_, _, wanted) in places.items():
                wanted.data.copy_(tensors[key])
            copies.update(made)
    return copies


def _base_problems(content: Content, names: Names) -> list[str]:
    """A base tensor in the file is ignored when it is the model's own, and an error when it differs."""
    problems = []
    for key, tensor in content.base.items():
        module_name, _, tensor_name = key.rpartition(".")
        module = names.modules.get(module_name)
        own = None if module is None else {**module._parameters, **module._buffers}.get(tensor_name)
        if own is None:
            problems.append(
                f"the file has {key}, for which this model has no place; {did_you_mean(key, _tensor_names(names))}"
            )
        elif own.shape != tensor.shape:
            problems.append(
                f"the file brings the base's {key} as {tuple(tensor.shape)}, here it is {tuple(own.shape)}: another "
                "base, or one with another vocabulary (resize_token_embeddings)"
            )
        elif not torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
            problems.append(f"the file brings the base's {key}, and it differs from this model's: another base")
    return problems


def _tensor_names(names: Names) -> list[str]:
    found = []
    for name, module in names.modules.items():
        found += [f"{name}.{key}" if name else key for key, p in module._parameters.items() if p is not None]
    return found
