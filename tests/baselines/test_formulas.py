"""The baselines against their formulas, written out by hand, and against other ways to the same numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorank
from lorank.baselines import AdapterH, AdapterL, AdapterP, BitFit, PrefixEmbedding, PrefixLayer, TopK
from lorank.models import recompute_activations

from .. import models
from .cases import logits, surrounded


def bottleneck(h: Tensor, adapter: Any, activation: Any) -> Tensor:
    return h + activation(h @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias


def test_houlsby_s_adapters_stand_before_the_residual() -> None:
    model, ids = models.roberta(), models.ids()
    lorank.adapt(model, AdapterH(size=4))
    models.disturb(model)
    block, swish = model.roberta.encoder.layer[0], nn.SiLU()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        attended = block.attention.self(x)[0]
        own = block.attention.output
        h = own.LayerNorm(bottleneck(own.dense(attended), own.dropout.adapters["default"], swish) + x)
        fed = block.output
        expected = fed.LayerNorm(
            bottleneck(fed.dense(block.intermediate(h)), fed.dropout.adapters["default"], swish) + h
        )
        found = block(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)
    assert torch.isfinite(logits(model, ids)).all()


def test_pfeiffer_s_adapter_adds_to_the_sum_and_norms_again() -> None:
    model = models.bert()
    block = model.bert.encoder.layer[1]
    seen: dict[str, Tensor] = {}
    block.output.LayerNorm.register_forward_pre_hook(lambda module, inputs: seen.update(u=inputs[0]))
    lorank.adapt(model, AdapterP(size=4))
    models.disturb(model)
    with torch.no_grad():
        found = block(torch.randn(2, 5, 32))
        norm, u = block.output.LayerNorm, seen["u"]
        normed = F.layer_norm(u, (32,), norm.weight, norm.bias, norm.eps)
        added = bottleneck(normed, norm.adapters["default"], torch.relu) - normed
        expected = F.layer_norm(u + added, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_lin_s_adapter_norms_first_and_stands_behind_the_block(make: Any) -> None:
    model, ids = make(), models.ids()
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    lorank.adapt(model, AdapterL(size=4))
    models.disturb(model)
    adapter = blocks[0].adapters["default"]
    seen: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits(model, ids)
    plain: list[Tensor] = []
    with lorank.disabled(model):
        logits(model, ids)
    assert len(seen) == 2
    with torch.no_grad():
        normed = F.layer_norm(seen[1], (32,), adapter.norm, adapter.norm_bias)
        plain.append(seen[1] + bottleneck(normed, adapter, torch.relu) - normed)
    torch.testing.assert_close(seen[0], plain[0])


def step_on(model: Any, parameters: Any, ids: Tensor) -> None:
    optimiser = torch.optim.SGD(parameters, lr=0.3)
    logits_ = model(ids).logits
    logits_.float().log_softmax(-1)[..., 3].mean().backward()
    optimiser.step()


@pytest.mark.parametrize("spec", [BitFit(), TopK(1)])
def test_what_merges_trains_as_the_base_itself_would(spec: Any) -> None:
    model, other, ids = models.gpt2(), models.gpt2(), models.ids()
    other.load_state_dict(model.state_dict())
    lorank.adapt(model, spec)
    step_on(model, lorank.adapter_parameters(model).values(), ids)
    if isinstance(spec, BitFit):
        chosen = [parameter for name, parameter in other.named_parameters() if name.endswith("bias")]
    else:
        chosen = list(other.transformer.h[-1].parameters())
    step_on(other, chosen, ids)
    lorank.merge(model)
    for name, parameter in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter, msg=name)


def test_a_prefix_of_embeddings_is_a_prefix_of_inputs() -> None:
    model, ids = models.gpt2(), models.ids()
    lorank.adapt(model, PrefixEmbedding(3, 2))
    rows = model.transformer.wte.adapters["default"].rows.detach()
    found = logits(model, surrounded(model, ids))
    with torch.no_grad(), lorank.disabled(model):
        words = model.transformer.wte(ids)
        batch = words.shape[0]
        inputs = torch.cat([rows[:3].expand(batch, -1, -1), words, rows[3:].expand(batch, -1, -1)], dim=1)
        expected = model(inputs_embeds=inputs).logits
    torch.testing.assert_close(found, expected)


def test_a_prefix_of_activations_is_put_in_at_every_block() -> None:
    model, ids = models.llama(), models.ids()
    lorank.adapt(model, PrefixLayer(3, 2))
    layers = model.model.layers
    rows = [layer.adapters["default"].rows.detach() for layer in layers]
    found = logits(model, surrounded(model, ids))
    places = torch.tensor([0, 1, 2, 3 + ids.shape[1], 4 + ids.shape[1]])

    def replaced(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return inputs[0].index_copy(1, places, rows[number].expand(len(ids), -1, -1)), *inputs[1:]

        return hook

    with lorank.disabled(model):
        hooks = [layer.register_forward_pre_hook(replaced(number)) for number, layer in enumerate(layers)]
        filled = torch.cat([ids[:, :3] * 0, ids, ids[:, :2] * 0], dim=1)
        expected = logits(model, filled)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spec", [PrefixEmbedding(3, 2), PrefixLayer(3, 2)])
def test_checkpointed_blocks_give_the_same_gradients(spec: Any) -> None:
    """Two batches run before the backward pass, which runs the blocks of both again."""
    model = models.llama()
    lorank.adapt(model, spec)
    first, second = surrounded(model, models.ids(2, 5)), surrounded(model, models.ids(3, 9))
    found: list[list[Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            recompute_activations(model)
        model.train().zero_grad()
        (model(first).logits.square().mean() + model(second).logits[..., 5].mean()).backward()
        found.append([parameter.grad.clone() for parameter in lorank.adapter_parameters(model).values()])  # type: ignore
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_prefix_that_is_left_out_is_an_error() -> None:
    model, ids = models.gpt2(), models.ids()
    lorank.adapt(model, PrefixLayer(2, 2))
    with pytest.raises(lorank.AdapterError, match="the input has none of the 4 special tokens"):
        logits(model, ids)
    whole = surrounded(model, ids)
    cached = model(whole[:, :-1], use_cache=True).past_key_values
    with torch.no_grad():
        step = model(whole[:, -1:], past_key_values=cached).logits
    torch.testing.assert_close(step[:, -1], logits(model, whole)[:, -1])
    model.resize_token_embeddings(120)
    with pytest.raises(lorank.AdapterError, match="the vocabulary has 120 tokens; it had 97"):
        logits(model, whole)


# Figures of the paper's tables that are exact, by the paper's settings (section 5 of its recomputation).
EXACT = [
    ("roberta-base", BitFit(), 102_144),
    ("roberta-base", AdapterP(size=16), 304_320),
    ("roberta-base", AdapterP(size=48), 894_528),
    ("roberta-large", AdapterP(size=64), 3_171_840),
    ("roberta-large", AdapterH(size=64), 6_343_680),
    ("roberta-large", AdapterH(size=8), 835_968),
    ("gpt2-medium", AdapterL(size=6), 368_784),
    ("gpt2-medium", AdapterL(size=224), 11_089_152),
    ("gpt2-medium", AdapterH(size=112), 11_064_576),
    ("gpt2-medium", TopK(2), 25_192_448),
    ("gpt2-medium", PrefixLayer(15, 0), 368_640),
]


@pytest.mark.parametrize("shape, spec, parameters", EXACT)
def test_the_counts_are_the_paper_s(shape: str, spec: Any, parameters: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

    with torch.device("meta"):
        if shape == "gpt2-medium":
            model: Any = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        else:
            width, layers = (768, 12) if shape == "roberta-base" else (1024, 24)
            sizes: dict[str, Any] = {
                "num_hidden_layers": layers,
                "num_attention_heads": width // 64,
                "intermediate_size": 4 * width,
            }
            config = RobertaConfig(hidden_size=width, **sizes)
            model = RobertaModel(config, add_pooling_layer=False)
    assert lorank.plan(model, spec).trainable_parameters == parameters
