"""Memory that training takes, counted on the meta device: nothing is loaded, nothing is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .surgery import adapter_parameters
from .tree import active_adapters, base_modules, entries


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

    An estimate: workspace of the kernels, fragmentation and the framework itself come on top; with gradient
    checkpointing, so do the activations of the one block that is computed again. Dropout inside the attention is
    counted as on a CPU, which keeps its matrix then; on a GPU it is not kept.
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

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return Memory(
        base=sum(size for key, size in base.items() if key not in trained),
        adapter=adapter,
        gradients=adapter,
        optimiser=2 * adapter,
        activations=sum(storage.nbytes() for storage in kept.values()),
    )


class _FusedAttention(TorchFunctionMode):
    """Computes attention on the meta device as kernels on real devices do: without keeping its matrix.

    There PyTorch would choose the plain formula, which keeps (batch, heads, length, length) numbers a layer.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    plain: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]
    if not query.is_meta or not alike or dropout_p or (attn_mask is not None and attn_mask.requires_grad):
        return plain(query, key, value, attn_mask, dropout_p, is_causal, **others)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=others.get("scale"))[0]


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the active adapters' tensors: the size of their file but for its header."""
    trained = {id(parameter): parameter for parameter in adapter_parameters(model).values()}
    kept: dict[int, Tensor] = dict(trained)
    for adapter in active_adapters(model):  # and what is stored beside, such as where PiSSA started
        for _, entry in entries(model, adapter).values():
            kept |= {id(buffer): buffer for buffer in entry.buffers()}
    return sum(map(_bytes, kept.values()))


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
