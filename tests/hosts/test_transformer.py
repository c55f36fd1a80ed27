"""What PyTorch builds of its attention: encoders, which hand all weights to one kernel, decoders and transformers."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import LoRA

from .checking import adapt, assert_near, counted

pytestmark = [
    pytest.mark.usefixtures("wide"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


def encoder(layers: int = 2, **options: Any) -> Any:
    settings = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "dropout": 0.0} | options
    nested = not settings.get("norm_first", False)
    made = nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), layers, enable_nested_tensor=nested)
    for parameter in made.parameters():  # the layers of an encoder begin as copies of one, and norms as nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


TARGETS: list[Any] = ["all-linear", ["linear1", "linear2"], "self_attn[q,v]", "self_attn[out]", "linear2"]
PADDING = torch.tensor([[False] * 5, [False, False, True, True, True], [False] * 4 + [True]])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_an_encoder_has_its_adapter_in_every_mode(
    targets: Any, norm_first: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = counted(monkeypatch, "_transformer_encoder_layer_fwd")
    nested = counted(monkeypatch, "_nested_tensor_from_mask")
    model, x = encoder(norm_first=norm_first, activation=activation), torch.randn(3, 5, 8)
    adapt(model, targets)
    for padding in (None, PADDING):

        def run(padding: Tensor | None = padding) -> Tensor:
            y = model(x, src_key_padding_mask=padding)
            return y if padding is None else y.masked_fill(padding[..., None], 0)

        model.train()
        y = run()
        model.eval()
        assert not kernel
        assert_near(run(), y)
        assert not kernel  # a gradient is asked for, which the kernel does not give
        with torch.no_grad():
            assert_near(run(), y)
            assert len(kernel) == 2
            assert len(nested) == (padding is not None and not norm_first)
            with lorank.merged(model):
                assert_near(run(), y)
            with lorank.disabled(model):
                assert not torch.allclose(run(), y, atol=1e-2)
        kernel.clear()
        nested.clear()
    model(x).square().sum().backward()
    lorank.check(model, moved=True)


@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn[q]", "self_attn[out]"])
def test_an_adapter_of_an_upper_layer_has_its_effect_in_every_mode(target: str) -> None:
    model, x = encoder(), torch.randn(3, 5, 8)
    adapt(model, f"layers.1.{target}")
    y = model.train()(x)
    model.eval()
    assert_near(model(x), y)  # the lower layer by the kernel, the upper without
    padded = model.train()(x, src_key_padding_mask=PADDING).masked_fill(PADDING[..., None], 0)
    model.eval()
    with torch.no_grad():
        assert_near(model(x), y)
        assert_near(model(x, src_key_padding_mask=PADDING), padded)
        with lorank.merged(model):
            assert_near(model(x, src_key_padding_mask=PADDING), padded)


def test_where_pytorch_makes_nested_tensors_without_need_an_upper_attention_fails_with_and_without_adapters() -> None:
    frozen_below, adapted = encoder().eval(), encoder().eval()
    frozen_below.requires_grad_(False)
    frozen_below.layers[1].requires_grad_(True)
    lorank.adapt(adapted, LoRA(rank=2), "layers.1.self_attn[q]")
    x = torch.randn(3, 5, 8)
    for model in (frozen_below, adapted):  # PyTorch looks at the lowest layer alone to see if a gradient is asked for
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            model(x, src_key_padding_mask=PADDING)
        model.use_nested_tensor = False
        assert model(x, src_key_padding_mask=PADDING).requires_grad


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_nested_tensors_of_the_user_reach_an_adapted_layer(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = counted(monkeypatch, "_transformer_encoder_layer_fwd")
    model = encoder(1).layers[0].eval()
    rows = [torch.randn(length, 8) for length in (5, 2, 3)]
    adapt(model, targets)
    with torch.no_grad():
        expected = [model(row[None])[0] for row in rows]
        kernel.clear()
        found = model(torch.nested.nested_tensor(rows))
        assert len(kernel) == 1
    for one, other in zip(found.unbind(), expected, strict=True):
        assert_near(one, other)


def _decoder_layer(**options: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
    return layer, lambda model: model(x, memory, memory_key_padding_mask=torch.eye(4, dtype=torch.bool)[:3])


def _decoder(**options: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    layer, run = _decoder_layer(**options)
    return nn.TransformerDecoder(layer, 2), run  # pyright: ignore[reportArgumentType]


def _transformer(**options: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    model = nn.Transformer(8, 2, 1, 2, 16, 0.0, batch_first=True, **options)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    return model, lambda model: model(
        x, y, tgt_mask=mask, src_key_padding_mask=PADDING, tgt_is_causal=True, memory_key_padding_mask=PADDING
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", [*TARGETS, "multihead_attn", "multihead_attn[k,out]"], ids=str)
@pytest.mark.parametrize("build", [_decoder_layer, _decoder, _transformer])
def test_decoders_and_whole_transformers_have_their_adapters(build: Any, targets: Any, norm_first: bool) -> None:
    model, run = build(norm_first=norm_first)
    adapt(model, targets)
    y = run(model.train())
    found = [run(model.eval())]
    with torch.no_grad():
        found.append(run(model))
        with lorank.merged(model):
            found.append(run(model))
        with lorank.disabled(model):
            assert not torch.allclose(run(model), y, atol=1e-3)
    for one in found:
        assert_near(one, y)
    y.square().sum().backward()
    lorank.check(model, moved=True)


def test_an_adapter_of_an_encoder_trains_and_is_then_the_same_without_a_gradient() -> None:
    model, x = encoder(dropout=0.1), torch.randn(3, 5, 8)
    target = torch.randn(3, 5, 8)
    lorank.adapt(model, LoRA(rank=2), "all-linear")

    def loss(batch: Tensor) -> Tensor:
        return (model(batch, src_key_padding_mask=PADDING) - target).square().mean()

    config = lorank.TrainConfig(steps=10, learning_rate=2e-2)
    for step in lorank.train(lorank.adapter_parameters(model.train()), loss, itertools.repeat(x), config):
        lorank.check(model, moved=step.index > 1)
    model.eval()
    y = model(x)
    with torch.no_grad():
        assert_near(model(x), y)
    lorank.merge(model)
    assert_near(model(x), y)
