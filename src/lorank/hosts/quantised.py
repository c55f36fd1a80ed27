"""Linear layers whose weight is packed by a quantiser: found by the weight's type, before the layer's class.

The layer's own forward runs on the packed weight, the update is added to its output, and nothing is unpacked for
training. Merging puts W + ΔW, with W dequantised, into an ordinary layer: packing it again would lose much of ΔW.

torchao        tensor subclasses in an `nn.Linear` (int8, int4 and others, weight-only or with quantised activations)
bitsandbytes   8-bit (LLM.int8) and 4-bit (NF4, FP4)
GGUF           transformers' layers that keep a file's blocks
"""

from abc import abstractmethod
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Host, NoHost, register, register_weight
from .embedding import EmbeddingHost
from .linear import LinearHost


class QuantisedHost(LinearHost):
    """A linear layer with a packed weight; `matrix` unpacks it into a new tensor, and there is no writing to it."""

    quantised = True

    @abstractmethod
    def matrix(self, layer: Any, part: str) -> Tensor: ...

    def weight(self, layer: Any, part: str) -> nn.Parameter:
        weight = layer._parameters.get("weight")
        if weight is None:
            raise NoHost("its weight is not a parameter of its own")
        return weight

    def shape(self, layer: Any, part: str) -> tuple[int, ...]:
        return layer.out_features, layer.in_features

    def write(self, layer: Any, part: str, W: Tensor) -> None:
        raise NotImplementedError("a packed weight is not written to: `unpacked` takes its place")

    def unpacked(self, layer: Any, W: Tensor) -> nn.Module:
        dense = nn.Linear(layer.in_features, layer.out_features, device="meta")
        bias = layer._parameters.get("bias")
        if bias is not None and bias.dtype != W.dtype:  # bitsandbytes casts it to the dtype that it computes in
            bias = nn.Parameter(bias.detach().to(W.dtype))
        dense._parameters.update(weight=nn.Parameter(W), bias=bias)
        return dense

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return _Product.apply(x, self, layer, False)  # pyright: ignore[reportReturnType]

    def passing(self, layer: Any, x: Tensor) -> Tensor:
        return _Product.apply(x, self, layer, True)  # pyright: ignore[reportReturnType]

    def example(self, layer: Any) -> Tensor:
        raise NoHost(f"{type(layer).__name__} replaces the forward of a layer whose weight is packed")


class _Product(torch.autograd.Function):
    """x Wᵀ + b with a packed W, which is unpacked for the backward instead of being kept for it.

    With `own` the layer's own forward computes it, and the gradient is that of the unpacked product (straight through).
    """

    @staticmethod
    def forward(x: Tensor, host: QuantisedHost, layer: Any, own: bool) -> Tensor:
        if own:
            return layer.base_forward(x)
        bias = layer._parameters.get("bias")
        return F.linear(x, host.matrix(layer, "weight").to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.host, ctx.layer, _ = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.host.matrix(ctx.layer, "weight").to(gradient.dtype), None, None, None


@register_weight("torchao.utils.TorchAOBaseTensor")
class TorchaoHost(QuantisedHost):
    def matrix(self, layer: Any, part: str) -> Tensor:
        return self.weight(layer, part).dequantize()  # pyright: ignore[reportReturnType]

    def unpacked_dtype(self, layer: Any) -> torch.dtype:
        return self.weight(layer, "weight").dtype

    may_block = True

    def blocks(self, layer: Any) -> bool:
        return getattr(self.own(layer), "act_quant_kwargs", None) is not None  # rounding inputs has a gradient of zero

    def dtype_name(self, layer: Any, part: str) -> str:
        weight: Any = self.weight(layer, part)
        packed = getattr(weight, "qdata", None)
        bits = getattr(weight, "target_dtype", getattr(packed, "dtype", "packed"))
        return f"{str(bits).removeprefix('torch.')} of torchao"


@register_weight("bitsandbytes.nn.modules.Params4bit")
class FourBitHost(QuantisedHost):
    may_block = True

    def blocks(self, layer: Any) -> bool:
        # In eval mode on a CPU the layer packs its weight anew, for a kernel that passes no gradient on.
        return self.own(layer).device.type == "cpu"

    def matrix(self, layer: Any, part: str) -> Tensor:
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        weight: Any = self.weight(layer, part)
        state, data = weight.quant_state or layer.quant_state, weight.data
        if state is None:
            raise NoHost("its 4-bit weight is not packed yet; move the layer to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            largest = state.absmax.T.reshape(-1).float()  # of each block, as that kernel reads them
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy(state))  # it changes the state
            state.absmax, state.nested = largest, False
        return functional.dequantize_4bit(data, state).view(layer.out_features, layer.in_features)

    def dtype_name(self, layer: Any, part: str) -> str:
        weight: Any = self.weight(layer, part)
        return f"{weight.quant_type} of bitsandbytes"


@register_weight("bitsandbytes.nn.modules.Int8Params")
class EightBitHost(QuantisedHost):
    def matrix(self, layer: Any, part: str) -> Tensor:
        weight: Any = self.weight(layer, part)
        if weight.dtype != torch.int8:
            raise NoHost("its 8-bit weight is not packed yet; move the layer to its device first")
        largest = weight.SCB if weight.SCB is not None else layer.state.SCB  # of each row; the first forward moves it
        return weight.data.float() * (largest.float().view(-1, 1) / 127)

    def dtype_name(self, layer: Any, part: str) -> str:
        return "int8 of bitsandbytes"


@register("transformers.integrations.gguf.utils.GgufLinear")
class GgufHost(QuantisedHost):
    may_block = True

    def blocks(self, layer: Any) -> bool:
        return True  # the kernel for few rows does

    def passing(self, layer: Any, x: Tensor) -> Tensor:
        on_cpu = self.own(layer).device.type == "cpu"  # where that kernel is not
        return self.apply(layer, x) if on_cpu else super().passing(layer, x)

    def matrix(self, layer: Any, part: str) -> Tensor:
        W = _unpacked_blocks(layer, layer.out_features, layer.in_features)
        if layer.input_permutation is None:
            return W
        return torch.empty_like(W).index_copy_(1, layer.input_permutation, W)  # for the input as it comes

    def dtype_name(self, layer: Any, part: str) -> str:
        return _ggml_name(layer)

    def example(self, layer: Any) -> Tensor:
        return torch.linspace(-1, 1, layer.in_features, device=layer.weight.device).expand(9, -1)


@register("transformers.integrations.gguf.utils.GgufEmbedding")
class GgufEmbeddingHost(EmbeddingHost):
    quantised = True

    def weight(self, layer: Any, part: str) -> nn.Parameter:
        return layer._parameters["weight"]

    def shape(self, layer: Any, part: str) -> tuple[int, ...]:
        return layer.embedding_dim, layer.num_embeddings

    def matrix(self, layer: Any, part: str) -> Tensor:
        return _unpacked_blocks(layer, layer.num_embeddings, layer.embedding_dim).T

    def unpacked_dtype(self, layer: Any) -> torch.dtype:
        return layer.compute_dtype

    def unpacked(self, layer: Any, W: Tensor) -> nn.Module:
        return nn.Embedding(layer.num_embeddings, layer.embedding_dim, _weight=W.T.contiguous())

    def down(self, layer: Any, part: str, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T).to(layer.compute_dtype)

    def scaled(self, layer: Any, found: Tensor) -> Tensor:
        return found

    def dtype_name(self, layer: Any, part: str) -> str:
        return _ggml_name(layer)


@register("transformers.integrations.gguf.utils.GgufExperts")
class GgufExpertsHost(Host):
    """No host yet: the experts' kernel takes packed weights alone, and has no place for an update."""

    def parts(self, layer: Any) -> tuple[str, ...]:
        raise NoHost("its experts are packed GGUF blocks, which only their kernel reads; load with dequantize=True")

    def matrix(self, layer: Any, part: str) -> Tensor:
        raise NotImplementedError

    def stored(self, layer: Any, part: str, W: Tensor) -> Tensor:
        raise NotImplementedError


def _unpacked_blocks(layer: Any, rows: int, columns: int) -> Tensor:
    from transformers.integrations.gguf.kernels import dequantize_blocks

    return dequantize_blocks(layer._parameters["weight"].data, layer.ggml_type, rows, columns, torch.float32)


def _ggml_name(layer: Any) -> str:
    from transformers.integrations.gguf.dequant import GGML_NAME

    return f"{GGML_NAME.get(layer.ggml_type, layer.ggml_type)} of GGUF"
