"""plan: what `adapt` would change, with every problem found before the first layer is touched."""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from .adapted import Adapters, why_not_attachable
from .baselines import Arrangement, Baseline, BitFit
from .companions import Parts, why_no_bias_offset
from .copies import count, find_copies, moving_statistics, own_parameters
from .errors import AdapterError, AdapterWarning, enumerate_names, raise_problems
from .hosts import Host, NoHost
from .names import Names, find_modules, lies_in
from .planned import Bias, Build, Place, Plan
from .targets import BARE_PARAMETER, OUTPUT_HEAD, TRAINED_WHOLE, Selection, Targets, exclusions, parse_parts, select
from .tied import Tie, sharing, tie_of
from .ties import Ties
from .tokens import find_tokens
from .tree import adapter_names, unwrapped
from .variants import Spec

Method: TypeAlias = Spec | Baseline | Sequence[Spec | Baseline]


def plan(
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
) -> Plan:
    """Return what `adapt` with the same arguments would do. Nothing is changed.

    Works on the meta device. Arguments and errors are those of `adapt`.
    """
    model = unwrapped(model)
    update, baselines = methods_of(spec)
    names = Names(model)
    selection = _selection(model, update, baselines, targets, names)
    problems = name_problems(model, name) + selection.problems
    for option, value in (("ranks", ranks), ("alphas", alphas)):
        if value is not None and not isinstance(value, Mapping):
            raise AdapterError(f"cannot adapt: {option} is {value!r}; give {{pattern: value}}")
    if not isinstance(train_also, str | Sequence):
        raise AdapterError(f"cannot adapt: train_also is {train_also!r}; give names of modules")
    notes: list[str] = []

    arranged = [_arranged(baseline, model, names, problems) for baseline in baselines]
    inserted = _inserted(arranged, names, problems)
    own_copies = [f"re:{re.escape(module)}" for arrangement in arranged for module in arrangement.train_also]
    asked = [train_also] if isinstance(train_also, str) else [*train_also]
    _leave_to_copies([*asked, *own_copies], names, selection, problems)
    copies = find_copies([*asked, *own_copies], names, selection, problems)
    bias = "all" if any(arrangement.bias == "all" for arrangement in arranged) else bias
    specs = _specs_by_layer(update, ranks or {}, alphas or {}, names, selection, problems) if update else {}
    places: list[Place] = []
    for layer_name, parts in selection.layers.items():
        places += _places(layer_name, parts, specs[layer_name], names, problems)
    notes += _ranks_above_the_layers_own(places)
    ties = Ties(model)
    tokens = find_tokens(model, train_tokens, names, ties, problems)
    tied: dict[str, tuple[Host, Tie]] = {}
    if tie:
        places = _tied(places, names, ties, tied, problems)
    else:
        notes += _untied(places, names, ties)
    for layer_name, (_, how) in tokens.ties.items():
        tied.setdefault(layer_name, (names.host(layer_name), how))
    biases = _find_biases(bias, names, selection, copies, problems)
    notes += moving_statistics(names, copies)
    adapted = {place.name for place in places} | tied.keys() | tokens.rows.keys()
    adapted |= inserted.keys()
    problems += [
        f"{n} would be adapted and trained whole at once" for n in names.modules if n in adapted & copies.keys()
    ]
    for layer_name in dict.fromkeys([*selection.layers, *copies, *biases, *(n for n in names.modules if n in adapted)]):
        if layer_name not in copies and any(lies_in(layer_name, [copy]) for copy in copies):
            problems.append(f"{layer_name} lies in {enumerate_names(copies)}, of which the adapter trains a copy")
        reason = why_not_attachable(names.modules[layer_name])
        if reason:
            problems.append(f"{layer_name}: {reason}")
    places = _settled(places, problems)
    problems += _behind_no_sum(places, inserted)
    raise_problems("cannot adapt", list(dict.fromkeys(problems)))
    return Plan(
        adapter=name,
        spec=update,
        places=tuple(places),
        copies=copies,
        biases=biases,
        bias=bias,
        left_out=selection.left_out,
        base_parameters=count(own_parameters(model)),
        warnings=tuple(notes),
        tied=tied,
        tokens=tokens.rows,
        token_layers={layer_name: names.modules[layer_name] for layer_name in tokens.rows},
        baselines=baselines,
        inserted=inserted,
        arranged=tuple(copy for copy in copies if any(copy in arrangement.train_also for arrangement in arranged)),
    )


def methods_of(spec: object) -> tuple[Spec | None, tuple[Baseline, ...]]:
    """Return the method of updates and the baselines in what a user gives as the spec; raises AdapterError."""
    given = [spec] if isinstance(spec, Spec | Baseline) or not isinstance(spec, list | tuple) else list(spec)
    updates = [one for one in given if isinstance(one, Spec)]
    baselines = tuple(one for one in given if isinstance(one, Baseline))
    if not given or len(updates) + len(baselines) < len(given):
        wrong = next((one for one in given if not isinstance(one, Spec | Baseline)), "an empty list")
        what = wrong if isinstance(wrong, str | type) else type(wrong).__qualname__
        raise AdapterError(f"cannot adapt: the spec is {what!r}; give one such as lorank.LoRA(rank=8)")
    methods = [one.variant for one in [*updates, *baselines]]
    if len(updates) > 1 or len(set(methods)) < len(methods):
        raise AdapterError(
            f"cannot adapt: {', '.join(methods)} in one adapter; it can have one method of updates, and baselines of "
            "different kinds beside it"
        )
    return (updates[0] if updates else None), baselines


def _selection(
    model: nn.Module, update: Spec | None, baselines: Sequence[Baseline], targets: Targets | None, names: Names
) -> Selection:
    """Return what the targets select for the updates; baselines have places of their own."""
    if update is not None:
        return select(model, targets, names)  # type: ignore[arg-type]  # None is answered as any other mistake
    method = " and ".join(baseline.variant for baseline in baselines)
    return exclusions(model, targets, names, method, allowed=any(isinstance(one, BitFit) for one in baselines))


def _leave_to_copies(train_also: Sequence[str], names: Names, selection: Selection, problems: list[str]) -> None:
    """Take out of a selection what a word selects in modules that are trained whole; nobody named it."""
    copied = [name for pattern in train_also for name in find_modules(pattern, names)[0]]
    both = [name for name in selection.layers if name in selection.by_word and lies_in(name, copied)]
    if both and len(both) == len(selection.layers):
        problems.append("all layers that the targets select are in train_also, and trained whole")
        return
    for name in both:
        del selection.layers[name]
        selection.left_out[name] = TRAINED_WHOLE


def _arranged(baseline: Baseline, model: nn.Module, names: Names, problems: list[str]) -> Arrangement:
    try:
        return baseline.arrange(model, names)
    except AdapterError as error:
        problems.append(str(error))
        return Arrangement()


def _inserted(arranged: Sequence[Arrangement], names: Names, problems: list[str]) -> dict[str, tuple[nn.Module, Build]]:
    """Return what baselines insert, {module name: (module, how to build it)}."""
    found: dict[str, tuple[nn.Module, Build]] = {}
    for arrangement in arranged:
        problems += [f"two baselines would run with {name}" for name in arrangement.inserted if name in found]
        found |= {name: (names.modules[name], build) for name, build in arrangement.inserted.items()}
    return found


def _behind_no_sum(places: Sequence[Place], inserted: Mapping[str, object]) -> list[str]:
    """Return a problem for each layer with something behind it whose update is no sum: that has to come last too."""
    both = [place for place in places if place.name in inserted]
    return [
        f"{place.label}: {place.spec.variant} is no sum with the layer's output, and another method would run behind it"
        for place in both
        if not place.spec.build(place.host, place.layer, place.part, torch.device("meta")).additive
    ]


def _settled(places: Sequence[Place], problems: list[str]) -> list[Place]:
    """Return the places with specs that know of all the matrices, and note for which their method makes no sense."""
    for place in places:
        reason = place.spec.why_not(place.host, place.layer, place.part)
        if reason:
            problems.append(f"{place.label}: {reason}")
    shapes = [place.shape for place in places]
    return [dataclasses.replace(place, spec=place.spec.settled(shapes)) for place in places]


def warn(plan: Plan, stacklevel: int = 3) -> None:
    """Emit a plan's warnings, and one for layers that a word passed over though they are no output head."""
    for text in plan.warnings:
        warnings.warn(text, AdapterWarning, stacklevel=stacklevel)
    passed: dict[str, list[str]] = {}
    for name, reason in plan.left_out.items():
        if reason not in (OUTPUT_HEAD, TRAINED_WHOLE, BARE_PARAMETER):
            passed.setdefault(reason, []).append(name)
    if passed:
        text = "; ".join(f"{enumerate_names(layers, 3)}: {reason}" for reason, layers in passed.items())
        warnings.warn(f"not adapted: {text}", AdapterWarning, stacklevel=stacklevel)


def name_problems(model: nn.Module, name: str) -> list[str]:
    """Return what is wrong with an adapter name: not usable, or taken."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        return [f"adapter name {name!r} must be a non-empty string without '.' and '/'"]
    if hasattr(Adapters(), name):
        return [f"adapter name '{name}' is an attribute that every torch module has; choose another"]
    taken = adapter_names(model)
    if name in taken:
        return [
            f"adapter name '{name}' is taken (adapters here: {', '.join(taken)}); choose another or remove it first"
        ]
    return []


def _tied(
    places: list[Place], names: Names, ties: Ties, tied: dict[str, tuple[Host, Tie]], problems: list[str]
) -> list[Place]:
    """Return the places with those moved to the first of layers that share a weight; the others go into `tied`."""
    order = {name: i for i, name in enumerate(names.modules)}
    kept: dict[tuple[str, str], Place] = {}
    for place in places:
        group = [place.name, *sharing(place.name, place.part, place.host, names, ties)]
        source = min(group, key=order.__getitem__)
        try:
            if len(group) > 1 and place.part != "weight":
                raise NoHost("parts of a weight that is shared cannot be adapted as one; adapt the whole layer")
            host = names.host(source) if source != place.name else place.host
            tied.update({name: tie_of(name, source, host, names) for name in group if name != source})
        except NoHost as error:
            problems.append(f"{place.name}: {error}")
            continue
        if source != place.name:
            layer = names.modules[source]
            place = dataclasses.replace(place, name=source, layer=layer, host=host, shape=host.shape(layer, "weight"))
        if kept.setdefault((place.name, place.part), place).spec != place.spec:
            problems.append(f"{place.name} and a layer that shares its weight are given two specs")
    return list(kept.values())


def _untied(places: Sequence[Place], names: Names, ties: Ties) -> list[str]:
    """Return a warning for each weight that several layers have, and not all of them would change."""
    notes = []
    for place in places:
        others = sharing(place.name, place.part, place.host, names, ties)
        if others:
            notes.append(
                f"{place.label} shares its weight with {enumerate_names(others)}, which this adapter would not change "
                "with it, so that merge will refuse it; tie=True adapts them as one"
            )
    return notes


def _ranks_above_the_layers_own(places: Sequence[Place]) -> list[str]:
    """Return a warning for each rank and limit, however many layers there are of it."""
    above: dict[tuple[int, int], list[str]] = {}
    for place in places:
        limit = min(place.shape[-2:])
        if place.spec.bounded and place.spec.rank > limit:
            above.setdefault((place.spec.rank, limit), []).append(place.label)
    return [
        f"{enumerate_names(labels, 3)}: rank {rank} is above the layer's own, {limit}; the update cannot use more"
        for (rank, limit), labels in above.items()
    ]


def _specs_by_layer(
    spec: Spec,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    names: Names,
    selection: Selection,
    problems: list[str],
) -> dict[str, Spec]:
    overrides: dict[str, dict[str, float]] = {name: {} for name in selection.layers}
    for key, patterns in (("rank", ranks), ("alpha", alphas)):
        for pattern, value in patterns.items():
            if parse_parts(pattern)[1] is not None:
                problems.append(f"{key}s '{pattern}' names parts; all parts of a layer have the same {key}")
                continue
            found, problem = find_modules(pattern, names)
            matched = [name for name in found if name in selection.layers]
            if not matched:
                problems.append(
                    f"{key}s {problem}" if problem else f"{key}s '{pattern}' matches no layer that is adapted"
                )
            for name in matched:
                if overrides[name].setdefault(key, value) != value:
                    problems.append(f"{key}s give {name} two values, {overrides[name][key]} and {value} ('{pattern}')")
    specs = {}
    for name, fields in overrides.items():
        try:
            specs[name] = spec.overridden(**fields)
        except (AdapterError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
            specs[name] = spec
    return specs


def _places(name: str, parts: tuple[str, ...] | None, spec: Spec, names: Names, problems: list[str]) -> list[Place]:
    layer = names.modules[name]
    try:
        host = names.host(name, parts)
        known = host.parts(layer)
        wanted = known if parts is None else tuple(part for part in known if part in parts)
        problems += [
            f"{name}.{part}: an adapter has an attribute of this name, and could not keep a part under it; rename it"
            for part in wanted
            if hasattr(Parts({}), part)
        ]
        return [Place(name, part, layer, host, spec, host.shape(layer, part)) for part in wanted]
    except NoHost as error:
        problems.append(f"{name}: {error}")
        return []


def _find_biases(
    bias: Bias, names: Names, selection: Selection, copies: dict[str, nn.Module], problems: list[str]
) -> dict[str, nn.Module]:
    if bias == "none":
        return {}
    if bias not in ("adapted", "all"):
        problems.append(f"bias is {bias!r}; it must be 'none', 'adapted' or 'all'")
        return {}
    candidates = selection.layers if bias == "adapted" else names.modules
    chosen: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for name in candidates:
        module = names.modules[name]
        if lies_in(name, copies) or name in selection.excluded:
            continue
        if bias == "all" or name in selection.layers:
            others = [key for key, p in module._parameters.items() if p is not None and "bias" in key and key != "bias"]
            if others:
                problems.append(f"bias='{bias}' cannot train {name}.{others[0]}; exclude it with '!{name}'")
        if module._parameters.get("bias") is None:
            continue
        reason = why_no_bias_offset(module)
        if reason is not None:
            refused[name] = reason
        elif names.canonical[name] == name:
            chosen[name] = module
    trained = {id(module._parameters["bias"]) for module in chosen.values()}
    for name, reason in refused.items():
        if id(names.modules[name]._parameters["bias"]) not in trained:  # a head's own bias is often its decoder's too
            problems.append(f"bias='{bias}': {name}: {reason}; exclude it with '!{name}'")
    if not chosen and not problems:
        problems.append(
            f"bias='{bias}' finds no bias to train" + (" in the adapted layers" if bias == "adapted" else "")
        )
    return chosen
