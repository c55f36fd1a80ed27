"""Modules that are trained whole, as a copy (`train_also`): which can be, of what they consist, and the copy."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .adapted import Adapted, restore_class
from .errors import enumerate_names
from .hosts import overrides_forward, registered_host
from .names import Names, find_modules, lies_in
from .targets import Selection
from .tree import base_modules


def find_copies(
    train_also: str | Sequence[str], names: Names, selection: Selection, problems: list[str]
) -> dict[str, nn.Module]:
    """Return the modules that `train_also` names, by name; what is wrong with them goes into `problems`."""
    found: dict[str, str] = {}
    for pattern in [train_also] if isinstance(train_also, str) else train_also:
        matched, problem = find_modules(pattern, names)
        if problem:
            problems.append(f"train_also {problem}")
        found.update(dict.fromkeys(matched, pattern))
    for name in found:
        above = next((other for other in found if name.startswith(other + ".")), None)
        if above:
            problems.append(f"train_also names {above} and {name}, which lies in it")
    copies: dict[str, nn.Module] = {}
    for name, pattern in found.items():
        for part in copyable_parts(name, names):
            reason = why_not_copyable(part, names, set(selection.layers))
            if reason:
                problems.append(f"train_also '{pattern}': {reason}")
            copies[part] = names.modules[part]
    owners: dict[int, str] = {}
    for part, module in copies.items():
        for parameter in own_parameters(module):
            other = owners.setdefault(id(parameter), part)
            if other != part:
                problems.append(f"train_also: {other} and {part} share a weight, which two copies would not")
    return copies


def copyable_parts(name: str, names: Names) -> list[str]:
    """Return the modules to copy for a module: itself, or what has parameters in it when it is a plain sequence.

    A sequence runs whatever lies in it, so that nothing can be put beside its members.
    """
    module = names.modules[name]
    if not isinstance(module, nn.Sequential) or overrides_forward(module, nn.Sequential) or not name:
        return [name]
    members = [f"{name}.{child}" for child in module._modules if child != "adapters"]
    return [part for member in members if _holds_state(names.modules[member]) for part in copyable_parts(member, names)]


def _holds_state(module: nn.Module) -> bool:
    return any(m._parameters or m._buffers for _, m in base_modules(module))


def _is_packed(module: nn.Module) -> bool:
    host = registered_host(module)
    return host is not None and host.quantised


def why_not_copyable(name: str, names: Names, adapted: set[str]) -> str | None:
    """Return why a module cannot be trained as a copy beside the layers `adapted`; None when it can."""
    module = names.modules[name]
    if name == "":
        return "that is the whole model; for full fine-tuning no adapter is needed"
    if not _holds_state(module):
        return f"{name} has no parameters"
    if any(type(hook).__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()):
        return f"{name}: a hook computes its weight (pruned or normalised); make that permanent first"
    packed = [n for n, m in names.modules.items() if lies_in(n, [name]) and _is_packed(m)]
    if packed:
        return f"the weights of {enumerate_names(packed, 3)} are packed by a quantiser, and no copy of them could train"
    read = [n for n in names.modules if lies_in(n, [name]) and names.read_without_call(n, above=name)]
    if read:
        return f"{read[0]} is read by a module above it without being called, so that a copy of it would have no effect"
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict | nn.Sequential):
        return f"{name} is a {type(module).__name__}, which runs whatever lies in it; name the modules in it"
    if name in adapted:
        return f"{name} would be adapted and trained whole at once"
    inside = [layer for layer in adapted if layer.startswith(name + ".")]
    if inside:
        return f"{name} contains {enumerate_names(sorted(inside), 3)}, which would be adapted; exclude with '!{name}'"
    already = [n for n, m in names.modules.items() if n.startswith(name + ".") and isinstance(m, Adapted)]
    if already:
        return f"{name} contains {enumerate_names(already, 3)}, which another adapter changes"
    return None


def moving_statistics(names: Names, copies: Mapping[str, nn.Module]) -> list[str]:
    """Return a warning for buffers that training moves in the base itself: they are neither frozen nor saved."""
    moving = [
        name
        for name, module in names.modules.items()
        if getattr(module, "track_running_stats", False) and module.training and not lies_in(name, copies)
    ]
    if not moving:
        return []
    return [
        f"{enumerate_names(moving, 3)}: training moves the running statistics of the base, and they are not saved with "
        "the adapter; put these modules in eval mode, or name them in train_also"
    ]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module without those of adapters, each once."""
    found = {id(p): p for _, m in base_modules(module) for p in m._parameters.values() if p is not None}
    return list(found.values())


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers parameters hold; those of a lazy module that has not seen an input count nothing."""
    return sum(p.numel() for p in parameters if not isinstance(p, UninitializedParameter))


_CONFIGURATIONS = ("PretrainedConfig", "PreTrainedConfig")  # transformers' older and newer name

# The hooks of a module itself. They run for the layer, so its copy, which runs in the layer's forward, has none.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def pristine_copy(module: nn.Module) -> nn.Module:
    """Return a trainable deep copy of a module's base, without adapters that others have put on it.

    Parameters of a half-precision base are kept in float32, in which small steps are not rounded away.
    """
    # What is set in the model's configuration later, such as how attention is computed, holds for the copy too.
    held = [value for _, m in base_modules(module) for value in vars(m).values()]
    shared = {id(value): value for value in held if any(c.__name__ in _CONFIGURATIONS for c in type(value).__mro__)}
    copy: nn.Module
    if isinstance(module, Adapted):
        copy = deepcopy(module, {id(module.adapters): nn.Module(), **shared})  # a stand-in: no adapter is copied
        restore_class(copy)
    else:
        copy = deepcopy(module, shared)
    for hooks in _HOOKS:
        copy.__dict__[hooks] = type(copy.__dict__[hooks])()
    for parameter in copy.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return copy
