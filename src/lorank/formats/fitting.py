"""Put what an adapter file says on a model: every tensor has to find its place, before anything is changed."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..adapted import why_not_attachable
from ..companions import BiasOffset, join, why_no_bias_offset
from ..copies import copyable_parts, count, own_parameters, pristine_copy, why_not_copyable
from ..errors import AdapterError, did_you_mean, raise_problems
from ..fingerprint import Comparison, compare, other_base
from ..hosts import Host, NoHost, own_parameter
from ..names import Names
from ..planned import Place, Plan
from ..planning import name_problems
from ..surgery import install, require_no_inference_mode
from ..tied import TOKENS, Tie, mirrors, sharing, tie_of
from ..ties import Ties
from ..tokens import TokenRows, find_tokens
from ..variants import Adapter, Update
from .checking import tensors_problems, value_problems
from .content import Content, LayerUpdate, note_layer, own_tensors
from .inserting import fit_inserted, landmark_problems


def fit(model: nn.Module, content: Content, name: str, *, activate: bool, allow_other_base: bool) -> Plan:
    """Put an adapter on a model. Everything is checked first; on an error nothing has changed."""
    require_no_inference_mode("cannot load")
    names = Names(model)
    problems = name_problems(model, name) + content.obstacles()
    parts: dict[str, dict[str, Adapter]] = {}
    places = _fit_updates(content, names, parts, problems, allow_other_base)
    ties = Ties(model)
    token_ties = _fit_tokens(model, content, names, ties, parts, problems)
    tied = _fit_ties(content, names, ties, parts, problems)
    biases = _fit_biases(content, names, parts, problems)
    copies = _fit_copies(content, names, problems)
    inserted = fit_inserted(model, content, names, parts, problems)
    problems += landmark_problems(content, names, allow_other_base)
    for layer_name, mirrored in [*mirrors(token_ties, parts, False).items(), *mirrors(tied, parts, True).items()]:
        parts.setdefault(layer_name, {}).update(mirrored)
    built: dict[str, nn.Module] = {layer: join(adapters) for layer, adapters in parts.items()}
    problems += [f"{layer}: the file adapts it, and has a copy of it" for layer in built.keys() & copies.keys()]
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
        spec=content.spec if content.updates else None,
        places=tuple(places),
        copies={module_name: names.modules[module_name] for module_name in copies},
        biases=biases,
        bias=content.bias,
        left_out={},
        base_parameters=count(own_parameters(model)),
        warnings=tuple(content.remarks),
        tied=token_ties | tied,
        tokens={layer: tuple(ids) for layer, (ids, _) in content.tokens.items()},
        token_layers={layer: names.modules[layer] for layer in content.tokens},
        baselines=content.baselines,
        inserted=inserted,
    )


def _fit_ties(
    content: Content, names: Names, ties: Ties, parts: Mapping[str, Mapping[str, Adapter]], problems: list[str]
) -> dict[str, tuple[Host, Tie]]:
    """Return how layers mirror others, as the file says and as the model has it."""
    found: dict[str, tuple[Host, Tie]] = {}
    for name, tie in content.tied.items():
        source, mirror = (names.canonical.get(layer) for layer in (tie.source, name))
        update = parts.get(source or "", {}).get("weight")
        if source is None or mirror is None or not isinstance(update, Update):
            problems.append(f"the file ties {name} with {tie.source}, and this model has not both")
        elif mirror not in sharing(source, "weight", update.host, names, ties):
            problems.append(f"the file ties {name} with {source}, which have no common weight in this model")
        else:
            try:
                found[mirror] = tie_of(mirror, source, update.host, names)
            except NoHost as error:
                problems.append(f"{name}: {error}")
    return found


def _fit_tokens(
    model: nn.Module,
    content: Content,
    names: Names,
    ties: Ties,
    parts: dict[str, dict[str, Adapter]],
    problems: list[str],
) -> dict[str, tuple[Host, Tie]]:
    """Build the trained rows of tokens into `parts`; return the layers that have the same weight."""
    unknown = [name for name in content.tokens if name not in names.modules]
    problems += [f"the file has rows of tokens for {n}, which this model has not" for n in unknown]
    wanted = {names.canonical[n]: ids for n, (ids, _) in content.tokens.items() if n not in unknown}
    before = len(problems)
    found = find_tokens(model, {f"re:{re.escape(name)}": ids for name, ids in wanted.items()}, names, ties, problems)
    if len(problems) > before:
        return {}
    for name, (ids, values) in content.tokens.items():
        if name in unknown:
            continue
        canonical = names.canonical[name]
        layer = names.modules[canonical]
        if canonical not in found.rows:
            problems.append(f"the file has rows of tokens for {name} and not for the layer whose weight it shares")
            continue
        rows = TokenRows(names.host(canonical), layer, ids)
        if values.shape != rows.offset.shape or sorted(ids) != list(ids):
            problems.append(f"{name}: rows of tokens are {tuple(values.shape)} in the file, for {len(ids)} tokens")
            continue
        problems += value_problems(f"{name}: rows of tokens", values, rows.offset.dtype)
        rows.offset.data.copy_(values.to(rows.offset.device, rows.offset.dtype) - rows.rows_of_base(layer))
        parts.setdefault(canonical, {})[TOKENS] = rows
    return found.ties


def bind(model: nn.Module, content: Content, problems: list[str]) -> None:
    """Note in what was read from a file which layers of a model it is for; what does not fit goes into `problems`.

    The model may be on the meta device, and is not changed.
    """
    names = Names(model)
    for canonical, host, update in located(content, names, problems):
        layer = names.modules[canonical]
        unknown = update.tensors.keys() - host.parts(layer)
        problems += [f"{canonical} has no part {part}, which the file adapts" for part in unknown]
        for part in update.tensors.keys() - unknown:
            place = Place(canonical, part, layer, host, update.spec_of(part), host.shape(layer, part))
            problems += tensor_problems(place, update.tensors[part])
        note_layer(update, layer, host)


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
        problems += [f"{canonical} has no part {part}, which the file adapts" for part in update.tensors.keys() - known]
        for part in (part for part in known if part in update.tensors):
            tensors = update.tensors[part]
            place = Place(canonical, part, layer, host, update.spec_of(part), host.shape(layer, part))
            wrong = tensor_problems(place, tensors)
            if host.weight(layer, part).device.type == "meta":
                wrong.append(f"{place.label}: the model is on the meta device; load its weights first")
            problems += wrong
            if wrong:
                continue
            places.append(place)
            parts.setdefault(canonical, {})[part] = adapter = filled(place, tensors)
            if part in update.fingerprints:
                adapter.base, adapter.other_base_allowed = update.fingerprints[part], allow_other_base
                compared[place.label] = compare(adapter.base, host.matrix(layer, part), host.dtype_name(layer, part))
    problems += other_base(compared, allow_other_base, content.remarks)
    order = {name: i for i, name in enumerate(names.modules)}
    return sorted(places, key=lambda place: order[place.name])


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
        bias = own_parameter(module, "bias").detach()
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
        return canonical, names.host(canonical, update.tensors if update.by_parts else None)
    except NoHost as error:
        raise AdapterError(f"the file adapts {name}, which cannot be adapted: {error}") from None


def tensor_problems(place: Place, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with a file's tensors for one matrix of a model: names, shapes and values."""
    reason = place.spec.why_not(place.host, place.layer, place.part)
    if reason:
        return [f"{place.label}: {reason}"]
    needed = place.spec.build(place.host, place.layer, place.part, torch.device("meta")).tensors()
    return tensors_problems(place.label, str(place.spec), needed, tensors)


def filled(place: Place, tensors: Mapping[str, Tensor]) -> Update:
    """Return the adapter that a file's tensors make for one matrix of a model."""
    weight = place.host.weight(place.layer, place.part)
    adapter = place.spec.build(place.host, place.layer, place.part, torch.device("meta"))
    adapter.fill(tensors, weight.device)
    return adapter


def _bias_problem(name: str, module: nn.Module, value: Tensor) -> str | None:
    reason = why_no_bias_offset(module)
    if reason:
        return f"the file has a bias for {name}: {reason}"
    bias = own_parameter(module, "bias")
    if value.shape != bias.shape:
        return f"{name}.bias is {tuple(value.shape)} in the file, the model needs {tuple(bias.shape)}"
    return next(iter(value_problems(f"{name}.bias", value, torch.promote_types(bias.dtype, torch.float32))), None)


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
            for key, tensor in own_tensors(copy).items()
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
                problems += value_problems(f"{name}.{key}", found, wanted.dtype)
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
