"""Targets: the words, names, patterns and functions by which a user says which layers to adapt.

"q_proj"                 whole dotted components from the end of a layer's name
"layers.*.q_proj"        the same, where * stands for any text
"re:.*(q|v)_proj"        a regular expression that the whole name must match
"c_attn[q,v]"            parts of a fused projection, or of an attention: "self_attn[q,out]"
"experts.gate_up_proj"   a parameter of two or three dimensions that belongs to no layer
"all-linear"             every linear-like layer but the output head
"attention"              the query, key, value and output projections of every attention
lambda name, layer: ...  a function
"!lm_head"               leaves out what the rest would select
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from .errors import enumerate_names, nearest
from .hosts import PARAMETER, NoHost, has_host, host_of, registered_host
from .names import Names, find_modules, lies_in

# Why `all-linear` passes something over, where that is as it should be.
OUTPUT_HEAD = "output head"
TRAINED_WHOLE = "trained whole"
BARE_PARAMETER = "a parameter of no layer; name it to adapt it"

Target: TypeAlias = str | Callable[[str, nn.Module], bool]
Targets: TypeAlias = Target | Sequence[Target]

# Direct children of a model that make its output, and what lies in them.
_HEADS = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "cls", "head", "heads"})

# How attention modules call the layers that project their queries, keys, values and output.
_PROJECTIONS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_proj", "key_proj", "value_proj"),
        *("query", "key", "value", "dense", "q_lin", "k_lin", "v_lin", "out_lin", "c_attn", "q_attn", "c_proj"),
        *("query_key_value", "in_proj", "Wqkv", "Wo", "qkv", "proj", "out", "to_q", "to_k", "to_v", "to_out"),
        *("q", "k", "v", "o"),
    }
)


@dataclass
class Selection:
    """What targets select: {layer name: chosen parts, or None for the whole layer}, and what they left."""

    layers: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # layer name -> why a word ("all-linear") passed it over
    by_word: set[str] = field(default_factory=set)  # layers that a word alone selects
    excluded: set[str] = field(default_factory=set)  # every module name that a "!" names
    problems: list[str] = field(default_factory=list)


def select(model: nn.Module, targets: Targets, names: Names) -> Selection:
    """Find the layers that targets select. Problems are collected, not raised."""
    selection = Selection()
    if isinstance(targets, str) or callable(targets):
        wanted: list[Target] = [targets]
    elif isinstance(targets, Iterable):
        wanted = list(targets)
    else:
        selection.problems.append(f"targets are {targets!r}; give a name, a function, or a list of these")
        return selection
    if not wanted:
        selection.problems.append("no targets were given")
    for target in wanted:
        if isinstance(target, str) and target.startswith("!"):
            _exclude(target, model, names, selection)
    for target in wanted:
        if isinstance(target, type):
            selection.problems.append(
                f"target {target.__name__} is a class; select its layers with "
                f"lambda name, layer: isinstance(layer, {target.__name__})"
            )
        elif callable(target):
            _select_by_function(target, names, selection)
        elif not isinstance(target, str):
            selection.problems.append(f"target {target!r} is neither a string nor a function (name, layer) -> bool")
        elif target not in _WORDS and not target.startswith("!"):
            _select_by_name(target, names, selection)
    named = set(selection.layers)
    for target in wanted:
        if isinstance(target, str) and target in _WORDS:
            _WORDS[target](model, names, selection)
    selection.by_word = selection.layers.keys() - named
    for name in selection.layers.keys() & selection.excluded:
        del selection.layers[name]
    for name in selection.left_out.keys() & (selection.excluded | selection.layers.keys()):
        del selection.left_out[name]
    if not selection.layers and not selection.problems:
        only = all(isinstance(target, str) and target.startswith("!") for target in wanted)
        what = "only exclude; add what to select, such as 'all-linear'" if only else "exclude every layer they select"
        selection.problems.append(f"the targets {what}")
    order = {name: i for i, name in enumerate(names.modules)}
    selection.layers = dict(sorted(selection.layers.items(), key=lambda item: order[item[0]]))
    return selection


def exclusions(model: nn.Module, targets: Targets | None, names: Names, method: str, *, allowed: bool) -> Selection:
    """Return what targets exclude, for methods that have places of their own.

    allowed: whether there is anything that they could exclude, which are biases alone.
    """
    selection = Selection()
    wanted = [targets] if isinstance(targets, str) or callable(targets) else list(targets or ())
    for target in wanted:
        if allowed and isinstance(target, str) and target.startswith("!"):
            _exclude(target, model, names, selection)
        else:
            can = ", and can only exclude biases ('!lm_head')" if allowed else ""
            selection.problems.append(f"{method} has its own places; targets say nothing to it{can}")
    return selection


def parse_parts(target: str) -> tuple[str, tuple[str, ...] | None]:
    """Split "c_attn[q,v]" into "c_attn" and ("q", "v"); a target without parts gives None for them."""
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\]", target) if not target.startswith("re:") else None
    if match is None:
        return target, None
    return match[1], tuple(part.strip() for part in match[2].split(","))


def output_heads(model: nn.Module, names: Names) -> set[str]:
    """Return the names of everything that belongs to the model's output head."""
    tops = {name for name in names.modules if name in _HEADS}
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    tops |= {name for name, module in names.modules.items() if name and module is output}
    return {names.canonical[name] for name in names.modules if lies_in(name, tops)}


def _exclude(target: str, model: nn.Module, names: Names, selection: Selection) -> None:
    pattern, parts = parse_parts(target[1:])
    if parts is not None:
        selection.problems.append(f"'{target}' excludes parts; name the parts that are wanted instead")
        return
    if pattern in _WORDS:
        by_word = Selection()
        _WORDS[pattern](model, names, by_word)
        found = [*by_word.layers, *(name for name in by_word.left_out if name not in output_heads(model, names))]
        problem = None if found else next(iter(by_word.problems), None)
    else:
        found, problem = find_modules(pattern, names)
    if problem:
        selection.problems.append(f"exclusion {problem}")
    for top in found:
        selection.excluded.update(names.canonical[name] for name in names.modules if lies_in(name, [top]))


def _add(name: str, parts: tuple[str, ...] | None, names: Names, selection: Selection) -> None:
    """Select a layer, or parts of it; a part that is a layer inside it is selected as that."""
    host = registered_host(names.modules[name])
    children = host.children(names.modules[name]) if host is not None else {}
    for part, child in children.items():
        inner = f"{name}.{child}"
        if (parts is None or part in parts) and names.canonical[inner] not in selection.excluded:
            _add(names.canonical[inner], None, names, selection)
    if parts is not None and children:
        parts = tuple(part for part in parts if part not in children)
        if not parts:
            return
    if name in selection.layers:
        before = selection.layers[name]
        if (before is None) != (parts is None):
            selection.problems.append(f"{name} is selected once as a whole and once by parts")
            return
        parts = None if parts is None or before is None else tuple(dict.fromkeys(before + parts))
    selection.layers[name] = parts


def _select_by_name(target: str, names: Names, selection: Selection) -> None:
    pattern, parts = parse_parts(target)
    try:
        found = names.matching(pattern)
    except re.error as error:
        selection.problems.append(f"target '{target}' is not a regular expression: {error}")
        return
    is_pattern = pattern.startswith("re:") or "*" in pattern
    chosen = [name for name in found if has_host(names.modules[name])] if is_pattern else found
    chosen = [name for name in chosen if name not in selection.excluded]
    bare = [] if parts is not None else names.parameters_matching(pattern)
    for owner, parameter in bare:
        if owner not in selection.excluded:
            _add_parameter(owner, parameter, names, selection)
    everything = [*found, *(owner for owner, _ in bare)]
    if not chosen and not bare and not (found and selection.excluded.issuperset(everything)):
        selection.problems.append(f"target '{target}' selects no layer; {_hint(pattern, names)}")
    refused: dict[str, list[str]] = {}
    for name in chosen:
        reason = names.why_not(name, parts)
        if reason is None:
            _add(name, parts, names, selection)
        else:
            refused.setdefault(reason, []).append(name)
    for reason, layers in refused.items():
        inside = [
            n.rpartition(".")[2]
            for n in names.modules
            if lies_in(n, layers[:1]) and n != layers[0] and has_host(names.modules[n])
        ]
        hint = f"; layers in it: {enumerate_names(dict.fromkeys(inside))}" if inside else ""
        selection.problems.append(
            f"target '{target}' selects {enumerate_names(layers, 3)}, which cannot be adapted: {reason}{hint}"
        )


def _add_parameter(owner: str, parameter: str, names: Names, selection: Selection) -> None:
    """Select a parameter by its own name: as the part of its layer that it is, or as a part of the module it is in."""
    try:
        host = host_of(names.modules[owner])
        if host.parts(names.modules[owner]) == ("weight",) and parameter == "weight":
            _add(owner, None, names, selection)
            return
    except NoHost:
        pass
    _add(owner, (parameter,), names, selection)


def _hint(pattern: str, names: Names) -> str:
    endings = names.endings(has_host)
    if re.search(r"[\\(|^$]", pattern) and not pattern.startswith("re:"):
        return f"for a regular expression write 're:{pattern}'"
    near = nearest(pattern, [*endings, "all-linear", "attention"])
    if near:
        return f"nearest: {', '.join(near)}"
    return f"layers here end in {enumerate_names(endings)}" if endings else "this model has no layer to adapt"


def _select_by_function(target: Callable[[str, nn.Module], bool], names: Names, selection: Selection) -> None:
    chosen = [
        name
        for name, module in names.modules.items()
        if names.canonical[name] == name and has_host(module) and target(name, module)
    ]
    if not chosen:
        selection.problems.append(f"the function {getattr(target, '__name__', target)!r} selects no layer")
    for name in chosen:
        reason = names.why_not(name)
        if reason is None:
            _add(name, None, names, selection)
        else:
            selection.problems.append(f"{name}, which the function selects, cannot be adapted: {reason}")


def _linear_like(names: Names) -> list[str]:
    return [
        name
        for name, module in names.modules.items()
        if names.canonical[name] == name and has_host(module) and not isinstance(module, nn.Embedding)
    ]


def _select_all_linear(model: nn.Module, names: Names, selection: Selection) -> None:
    candidates = _linear_like(names)
    heads = output_heads(model, names)
    chosen = 0
    for name in candidates:
        reason = OUTPUT_HEAD if name in heads else names.why_not(name)
        if reason is None:
            _add(name, None, names, selection)
            chosen += 1
        elif name not in selection.excluded:
            selection.left_out[name] = reason
    selection.left_out.update(dict.fromkeys(_bare_parameters(names), BARE_PARAMETER))
    if not chosen:
        reasons = dict.fromkeys(selection.left_out.get(name, "excluded") for name in candidates)
        reasons |= dict.fromkeys(reason for reason in selection.left_out.values() if reason == BARE_PARAMETER)
        what = f"no linear layer to adapt in this model{': ' if reasons else ''}{'; '.join(reasons)}"
        selection.problems.append(f"target 'all-linear' finds {what}")


def _bare_parameters(names: Names) -> list[str]:
    """Return the names of matrices, and stacks of them, that belong to no layer that lorank knows."""
    return [
        f"{name}.{key}" if name else key
        for name, module in names.modules.items()
        if names.canonical[name] == name and not has_host(module)
        for key in PARAMETER.parts(module)
        if module._parameters[key].dim() < 4  # pyright: ignore[reportOptionalMemberAccess]
        if min(module._parameters[key].shape) > 1  # pyright: ignore[reportOptionalMemberAccess]
    ]


def _select_attention(model: nn.Module, names: Names, selection: Selection) -> None:
    attentions = [name for name, module in names.modules.items() if "attention" in type(module).__name__.lower()]
    linear = _linear_like(names)
    chosen: set[str] = set()
    for attention in attentions:
        if attention in linear:
            chosen.add(attention)
            continue
        inside = [name for name in linear if lies_in(name, [attention])]
        projections = [name for name in inside if name.rpartition(".")[2] in _PROJECTIONS]
        if inside and not projections:
            endings = dict.fromkeys(name.rpartition(".")[2] for name in inside)
            selection.problems.append(
                f"target 'attention' does not know the layers {enumerate_names(endings)} of "
                f"{type(names.modules[attention]).__name__}; name those that you want"
            )
        chosen.update(projections)
    for name in linear:
        if name in chosen:
            reason = names.why_not(name)
            if reason is None:
                _add(name, None, names, selection)
            else:
                selection.left_out[name] = reason
    if not chosen:
        selection.problems.append("target 'attention' finds no attention module in this model; name its layers instead")
    elif chosen <= selection.left_out.keys():
        reasons = dict.fromkeys(selection.left_out[name] for name in sorted(chosen))
        selection.problems.append(f"target 'attention' finds no layer that can be adapted: {'; '.join(reasons)}")


_WORDS = {"all-linear": _select_all_linear, "attention": _select_attention}
