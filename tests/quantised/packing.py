"""Small models whose linear layers are packed by each quantiser, and one with real weights."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn
from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

_APART = Path(sys.prefix) / "apart"  # where requirements.txt goes


def package(name: str) -> Any:
    """Return a package of requirements.txt; skips the test where it is not installed."""
    if _APART.is_dir() and str(_APART) not in sys.path:
        sys.path.append(str(_APART))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module(name)
        except ImportError as error:
            return pytest.skip(f"{name} is not installed (tests/quantised/requirements.txt): {error}")


@dataclass(frozen=True)
class Packing:
    """A quantiser at its work."""

    pack: Callable[[nn.Module], nn.Module]  # a model of linear layers, in place
    kind: str  # what lorank calls it
    error: float  # most that packing moves the weights, relative
    dtype: torch.dtype = torch.float32  # in which the model computes
    kernel_error: float = 1e-4  # of its outputs, relative: of bfloat16, or of quantised activations


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model that is packed: two linear layers with biases, always the same."""
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32)).to(dtype).eval()
    torch.random.set_rng_state(state)
    return model.requires_grad_(False)


def pack_gguf(linear: nn.Linear, kind: str) -> GgufLinear:
    """Return transformers' packed layer with the weights of a linear one."""
    quantisation = gguf.GGMLQuantizationType[kind]
    packed = GgufLinear(linear.in_features, linear.out_features, int(quantisation), bias=linear.bias is not None)
    blocks = gguf.quants.quantize(linear.weight.detach().float().numpy(), quantisation)
    packed.weight.data = torch.from_numpy(blocks.copy())
    if packed.bias is not None:
        packed.bias.data = linear.bias.detach().clone()
    return packed


def pack_gguf_embedding(embedding: nn.Embedding, kind: str) -> GgufEmbedding:
    """Return transformers' packed embedding with the weights of an ordinary one."""
    quantisation = gguf.GGMLQuantizationType[kind]
    packed = GgufEmbedding(embedding.num_embeddings, embedding.embedding_dim, int(quantisation), torch.float32)
    blocks = gguf.quants.quantize(embedding.weight.detach().numpy(), quantisation)
    packed.weight.data = torch.from_numpy(blocks.copy())
    return packed


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, make(module).eval())
    return model


def _torchao(configuration: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def pack(model: nn.Module) -> nn.Module:
        quantization = package("torchao.quantization")
        if "granularity" in options:
            options["granularity"] = package("torchao.quantization.granularity").PerGroup(32)
        quantization.quantize_(model, getattr(quantization, configuration)(**options))
        return model

    return pack


def _bitsandbytes(layer: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def pack(model: nn.Module) -> nn.Module:
        layers = package("bitsandbytes").nn

        def make(linear: nn.Linear) -> nn.Module:
            packed = getattr(layers, layer)(linear.in_features, linear.out_features, **options)
            packed.load_state_dict(linear.state_dict())
            return packed.to("cpu").requires_grad_(False)

        return _replace(model, make)

    return pack


def _gguf(kind: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: _replace(model, lambda linear: pack_gguf(linear, kind))


PACKINGS: dict[str, Packing] = {
    "torchao-int8": Packing(_torchao("Int8WeightOnlyConfig"), "int8 of torchao", 0.01),
    "torchao-int8-bfloat16": Packing(_torchao("Int8WeightOnlyConfig"), "int8 of torchao", 0.02, torch.bfloat16, 0.02),
    "torchao-int4": Packing(
        _torchao(
            "IntxWeightOnlyConfig",
            weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
            granularity=32,
        ),
        "int4 of torchao",
        0.15,
        torch.float32,
        1e-4,
    ),
    "torchao-int8-activations": Packing(
        _torchao("Int8DynamicActivationInt8WeightConfig"), "int8 of torchao", 0.02, kernel_error=0.03
    ),
    "bitsandbytes-nf4": Packing(
        _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
        "nf4 of bitsandbytes",
        0.15,
        kernel_error=0.02,
    ),
    "bitsandbytes-nf4-twice": Packing(
        _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True),
        "nf4 of bitsandbytes",
        0.15,
        kernel_error=0.02,
    ),
    "bitsandbytes-fp4": Packing(
        _bitsandbytes("Linear4bit", quant_type="fp4", compute_dtype=torch.float32),
        "fp4 of bitsandbytes",
        0.2,
        kernel_error=0.02,
    ),
    "bitsandbytes-int8": Packing(
        _bitsandbytes("Linear8bitLt", has_fp16_weights=False), "int8 of bitsandbytes", 0.01, kernel_error=0.03
    ),
    "gguf-q4_1": Packing(_gguf("Q4_1"), "Q4_1 of GGUF", 0.15),
    "gguf-q8_0": Packing(_gguf("Q8_0"), "Q8_0 of GGUF", 0.01),
}
