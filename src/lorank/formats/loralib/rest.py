"""What a file of loralib holds beside factors: biases, trained heads, and the weights of the base.

`lora_state_dict(model, bias)` adds the biases of the adapted layers, or all. The published files add the head's
tensors; a state dict saved whole has everything. Which of these a tensor is, the file does not say.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...companions import why_no_bias_offset
from ...copies import why_not_copyable
from ...hosts import NoHost
from ...lowrank import delta
from ...names import Names, lies_in
from ..content import Content

_MASK = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")  # GPT-2's causal mask, once a buffer and so in its state dicts


def decode_rest(tensors: Mapping[str, Tensor], layers: set[str], names: Names | None, content: Content) -> None:
    """Sort tensors that are no factors into the content's biases, copies and base.

    layers: those that have factors.
    """
    rest = {
        _without_wrapper(key, layers, names): tensor
        for key, tensor in tensors.items()
        if not (_MASK.search(key) and tensor.dim() in (0, 4))
    }
    if any(_joined(layer, "weight") in rest for layer in layers):
        _decode_whole_state(rest, layers, names, content)
        return
    for key, tensor in rest.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "bias" and _is_bias_alone(module, tensor, rest, names):
            content.biases[module] = tensor
        else:
            _copy(key, tensor, rest, layers, names, content)


def _decode_whole_state(rest: Mapping[str, Tensor], layers: set[str], names: Names | None, content: Content) -> None:
    """Sort the tensors of a state dict that has the base's weights too: what is as in this model is the base's."""
    changed = {key for key in rest if names is not None and _differs(key, rest[key], names)}
    trained = set()
    for key in sorted(changed):
        module, _, leaf = key.rpartition(".")
        weight = _joined(module, "weight")
        if module in layers and leaf == "weight":
            content.problems.append(_why_changed(module, rest[key], names, content))
        elif leaf == "bias" and weight in rest and weight not in changed:
            content.biases[module] = rest[key]
        elif not any(lies_in(layer, [key.partition(".")[0]]) for layer in layers):  # a head, beside the base
            trained.add(key.partition(".")[0])
        else:
            content.base[key] = rest[key]  # `fit` says that it differs
    for key, tensor in rest.items():
        if key.partition(".")[0] in trained:
            _copy(key, tensor, rest, layers, names, content)
        elif key not in changed:
            content.base[key] = tensor


def _copy(
    key: str, tensor: Tensor, rest: Mapping[str, Tensor], layers: set[str], names: Names | None, content: Content
) -> None:
    """Put a tensor into the copy of the largest module that the file has whole; of the base, where there is none."""
    module, _, _ = key.rpartition(".")
    top = None
    if names is None:
        components = module.split(".")
        paths = [".".join(components[: i + 1]) for i in range(len(components))]
        top = next((path for path in paths if not _touches(path, layers)), None)
    elif module in names.modules and not _touches(module, layers):
        top = module
        adapted = {names.canonical.get(layer, layer) for layer in layers}
        while above := top.rpartition(".")[0]:
            if why_not_copyable(above, names, adapted) or not _state(above, names) <= rest.keys():
                break
            top = above
    if top:
        content.copies.setdefault(top, {})[key.removeprefix(f"{top}.")] = tensor
    else:
        content.base[key] = tensor


def _touches(path: str, layers: Iterable[str]) -> bool:
    """Tell whether a module is one of the layers, lies in one, or has one in it."""
    return any(lies_in(layer, [path]) or lies_in(path, [layer]) for layer in layers)


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _without_wrapper(key: str, layers: set[str], names: Names | None) -> str:
    """Return a name as the plain model has it: loralib's convolution holds the plain one as `conv`."""
    module, _, leaf = key.rpartition(".")
    layer = module.removesuffix("conv").removesuffix(".")
    wrapped = module.rpartition(".")[2] == "conv" and layer in layers
    return _joined(layer, leaf) if wrapped and (names is None or module not in names.modules) else key


def _is_bias_alone(module: str, value: Tensor, rest: Mapping[str, Tensor], names: Names | None) -> bool:
    """Tell whether a bias was trained without the module's other parameters."""
    if any(key.rpartition(".")[0] == module and key != _joined(module, "bias") for key in rest):
        return False
    if names is None or module not in names.modules:
        return names is None
    layer = names.modules[module]
    if layer._parameters.get("bias") is None or _state(module, names) == {_joined(module, "bias")}:
        return False
    return _differs(_joined(module, "bias"), value, names) or why_no_bias_offset(layer) is None


def _state(name: str, names: Names) -> set[str]:
    """Return the names of the tensors that a module's state dict has without adapters, from the top of the model."""
    return {
        _joined(path, key)
        for path, module in names.modules.items()
        if lies_in(path, [name])
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and key not in module._non_persistent_buffers_set
    }


def _own(key: str, names: Names) -> Tensor | None:
    module = names.modules.get(key.rpartition(".")[0])
    return None if module is None else {**module._parameters, **module._buffers}.get(key.rpartition(".")[2])


def _differs(key: str, stored: Tensor, names: Names) -> bool:
    """Tell whether a tensor is another than the model's own; on the meta device nothing can be compared."""
    own = _own(key, names)
    if own is None or own.shape != stored.shape:
        return True
    return not own.is_meta and not torch.equal(own.detach().cpu(), stored.to(own.dtype))


def _why_changed(name: str, stored: Tensor, names: Names | None, content: Content) -> str:
    """Return why the file's weight of an adapted layer is not the model's: another base, or one with the update in."""
    assert names is not None, "without a model nothing is compared"
    update, key = content.updates.get(name), _joined(name, "weight")
    own = _own(key, names)
    if own is None or own.shape != stored.shape:
        return f"the file brings the base's {key}, which this model has not, or in another shape"
    change = None
    if update is not None:
        try:
            layer, host = names.modules[name], names.host(name, update.tensors if update.by_parts else None)
            changes = [
                host.stored(layer, part, delta(*update.pair(part), update.spec_of(part).scale))
                for part in update.tensors
            ]
            change = torch.stack(changes).sum(0)
        except (NoHost, RuntimeError):  # of another shape, which `fit` says
            change = None
    if change is not None and change.shape == own.shape:
        left = torch.linalg.vector_norm(stored.float() - own.detach().cpu().float() - change)
        if left <= 0.01 * torch.linalg.vector_norm(change):
            return (
                f"the file brings the base's {key} with the update merged into it: loralib adds it in eval mode. Save "
                "the state dict after model.train(), or loralib.lora_state_dict(model) alone"
            )
    return (
        f"the file brings the base's {key}, and it differs from this model's: another base, or one with an update "
        "merged into it, as loralib does in eval mode (save after model.train())"
    )
