"""Memory that training takes, counted on the meta device: nothing is loaded, nothing is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import base_modules
from .surgery import adapter_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, by what they hold."""

    base: int
    adapter: int
    gradients: int
    optimiser: int  # AdamW's two moments
    activations: int  # what the forward pass keeps for the backward pass

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimiser + self.activations


def training_memory(model: nn.Module, forward: Callable[[], object]) -> Memory:
    """Return what a step of training the active adapters takes.

    model: an adapted model, in train mode; on the meta device nothing is computed.
    forward: runs it on a batch, through to the loss.

    An estimate: workspace of the kernels, fragmentation and the framework itself come on top.
    """
    parameters = adapter_parameters(model).values()
    adapter = sum(_bytes(parameter) for parameter in parameters)
    trained = {id(parameter) for parameter in parameters}
    base = {
        id(p): _bytes(p)
        for _, m in base_modules(model)
        for p in [*m._parameters.values(), *m._buffers.values()]
        if p is not None
    }
    kept: dict[int, Any] = {}
    known = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor.untyped_storage()  # held, so that no other takes its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return Memory(
        base=sum(size for key, size in base.items() if key not in trained),
        adapter=adapter,
        gradients=adapter,
        optimiser=2 * adapter,
        activations=sum(storage.nbytes() for storage in kept.values()),
    )


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the active adapters' tensors: the size of their file but for its header."""
    return sum(_bytes(parameter) for parameter in adapter_parameters(model).values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def readable(size: float) -> str:
    """Return bytes as people read them: 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
