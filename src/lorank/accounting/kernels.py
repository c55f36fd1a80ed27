"""What runs on real devices, in the place of what PyTorch chooses on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_plain_attention = functional.scaled_dot_product_attention
_plain_dropout = functional.dropout


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Within it operations on meta tensors allocate what a real device allocates; those on other tensors are as ever.

    device: the kind of device, such as "cpu" or "cuda".

    Attention does not keep its matrix, (batch, heads, length, length) numbers a layer, as PyTorch's plain formula does
    on the meta device. On a CPU it does where it has dropout, and dropout keeps its noise in the activations' dtype.
    On a GPU dropout keeps one byte a number, and attention with dropout keeps no matrix either.
    """
    on_cpu = device == "cpu"

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        four = query.dim() == key.dim() == value.dim() == 4
        alike = four and query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[0] == key.shape[0]
        alike = alike and (enable_gqa or query.shape[1] == key.shape[1])
        with_matrix = (dropout_p and on_cpu) or (attn_mask is not None and attn_mask.requires_grad)
        if not query.is_meta or not alike or with_matrix:
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # each layer makes its own, and keeps it
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if input.is_meta and not on_cpu and training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, training)[0]
        return _plain_dropout(input, p, training, inplace)

    # A TorchFunctionMode would not do: it is off while a backward pass computes checkpointed blocks again.
    functional.scaled_dot_product_attention = attention
    functional.dropout = dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = _plain_attention
        functional.dropout = _plain_dropout
