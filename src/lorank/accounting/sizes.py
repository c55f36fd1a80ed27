"""Bytes of what is saved, and numbers as people read them."""

from torch import Tensor, nn

from ..surgery import adapter_parameters
from ..tree import active_adapters, entries


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the active adapters' tensors: the size of their file but for its header."""
    trained = {id(parameter): parameter for parameter in adapter_parameters(model).values()}
    kept: dict[int, Tensor] = dict(trained)
    for adapter in active_adapters(model):  # and what is stored beside, such as where PiSSA started
        for _, entry in entries(model, adapter).values():
            kept |= {id(buffer): buffer for buffer in entry.buffers()}
    return _bytes(kept)


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of what a training saves: the active adapters' file; the whole model's where it has none."""
    if active_adapters(model):
        return adapter_bytes(model)
    saved = model.state_dict(keep_vars=True)  # what is tied is the same tensor, and stored once
    return _bytes({id(tensor): tensor for tensor in saved.values()})


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def readable(size: float) -> str:
    """Return bytes as people read them: 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
