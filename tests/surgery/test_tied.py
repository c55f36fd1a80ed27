"""Layers that share one weight, adapted as one (tie=True); and rows of new tokens (train_tokens)."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.variants import LoRAAdapter, Update

from .. import models
from ..models import Plain, disturb, ids


def tied_llama() -> nn.Module:
    return models.llama(tie_word_embeddings=True)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


@pytest.fixture(params=["plain", "llama", "gpt2", "bert"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "plain":
        return Plain(tied=True).eval()
    if request.param == "bert":
        from transformers import BertForMaskedLM

        return BertForMaskedLM(models.bert().config).eval()
    return {"llama": tied_llama, "gpt2": models.gpt2}[request.param]()


def head_and_embedding(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    if isinstance(model, Plain):
        return model.head, model.embed
    return model.get_output_embeddings(), model.get_input_embeddings()  # pyright: ignore


def targets_of(model: nn.Module) -> list[str]:
    head, embedding = head_and_embedding(model)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(embedding)], names[id(head)]]


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_they_are_adapted_as_one_and_merged_without_breaking_the_tie(model: nn.Module, which: str) -> None:
    x = ids()
    embedding, head = targets_of(model)
    targets = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[which]
    before = logits(model, x)
    plan = lorank.adapt(model, LoRA(rank=3, alpha=6), targets, tie=True)
    assert plan.layers == [embedding] and list(plan.tied) == [head]
    assert f"tied: {head} has the weight of {embedding}" in str(plan)
    parameters = lorank.adapter_parameters(model)
    assert len(parameters) == 2 and sum(p.numel() for p in parameters.values()) == plan.trainable_parameters
    assert torch.equal(logits(model, x), before)
    disturb(model)
    y = logits(model, x)
    assert not torch.allclose(y, before, atol=1e-3)
    logits(model, x).square().mean().backward()
    lorank.check(model)
    with lorank.merged(model):
        torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    lorank.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)
    output, input_ = head_and_embedding(model)
    assert output.weight is input_.weight
    assert not lorank.adapter_names(model)
    lorank.remove(twin)
    assert torch.equal(logits(twin, x), before)


def test_both_directions_of_gradient_reach_the_shared_factors() -> None:
    model, x = Plain(tied=True), ids()
    lorank.adapt(model, LoRA(rank=2), "head", tie=True)
    disturb(model)
    W = model.embed.weight.detach().clone().requires_grad_()
    lora: Any = model.embed.adapters["default"]  # pyright: ignore
    A, B = (factor.detach().clone().requires_grad_() for factor in (lora.A, lora.B))
    delta = lora.scale * (B @ A).T
    weights = {**Plain(tied=True).state_dict(), "embed.weight": W + delta, "head.weight": W + delta}
    weights |= {name: p.detach() for name, p in model.named_parameters() if name.startswith("blocks.")}
    reference = torch.func.functional_call(Plain(tied=True), weights, (x,), tie_weights=False)
    reference.square().mean().backward()
    model(x).square().mean().backward()
    torch.testing.assert_close(lora.A.grad, A.grad)
    torch.testing.assert_close(lora.B.grad, B.grad)


def test_without_tie_the_plan_warns_and_merge_refuses() -> None:
    model = tied_llama()
    with pytest.warns(AdapterWarning, match=r"shares its weight with lm_head.*tie=True adapts them as one"):
        lorank.adapt(model, LoRA(rank=2), "embed_tokens")
    with pytest.raises(AdapterError, match=r"shares its weight with lm_head.*tie=True"):
        lorank.merge(model)


def test_files_bring_ties_back(model: nn.Module, tmp_path: Path) -> None:
    x = ids()
    lorank.adapt(model, LoRA(rank=3), targets_of(model), tie=True)
    disturb(model)
    y = logits(model, x)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    plan = lorank.load(model, tmp_path)
    assert list(plan.tied) == targets_of(model)[1:]
    assert torch.equal(logits(model, x), y)
    lorank.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)


def test_a_file_with_a_tie_is_refused_where_the_model_has_none(tmp_path: Path) -> None:
    model = Plain(tied=True)
    lorank.adapt(model, LoRA(rank=2), "head", tie=True)
    lorank.save(model, tmp_path)
    with pytest.raises(AdapterError, match="which have no common weight in this model"):
        lorank.load(Plain(), tmp_path, allow_other_base=True)


def test_two_adapters_of_one_tie(model: nn.Module) -> None:
    x = ids()
    for name in ("a", "b"):
        lorank.adapt(model, LoRA(rank=2), targets_of(model), tie=True, name=name)
        disturb(model, name)
    lorank.activate(model, "a", "b")
    y = logits(model, x)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied, x), y)
    lorank.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-4, atol=1e-4)


def test_layers_of_one_kind_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    lorank.adapt(model, LoRA(rank=2), "all-linear", tie=True)
    disturb(model)
    x = torch.randn(3, 8)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)
    assert model[2].weight is model[0].weight


def test_a_method_that_cannot_be_mirrored_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRAAdapter, "run_mirrored", Update.run_mirrored)
    model = Plain(tied=True)
    with pytest.raises(AdapterError, match=r"head has the weight of embed transposed, and LoRAAdapter has no form"):
        lorank.adapt(model, LoRA(rank=2), "head", tie=True)
    assert not lorank.adapter_names(model)


def test_a_state_dict_goes_round(model: nn.Module) -> None:
    x = ids()
    lorank.adapt(model, LoRA(rank=2), targets_of(model), tie=True)
    disturb(model)
    y, state = logits(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    lorank.reset(model)
    model.load_state_dict(state)
    assert torch.equal(logits(model, x), y)


# ---- new tokens


def test_only_the_rows_of_new_tokens_train(model: nn.Module, tmp_path: Path) -> None:
    x, new = ids(), [90, 95]
    x[0, 1], x[1, 2] = new
    before, bits = logits(model, x), {name: p.clone() for name, p in model.named_parameters()}
    embedding, _ = targets_of(model)
    targets = {"plain": ["up"], "llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}
    kind = "plain" if isinstance(model, Plain) else str(model.config.model_type)  # pyright: ignore
    plan = lorank.adapt(model, LoRA(rank=2), targets[kind], train_tokens={embedding: new})
    rows = model.get_submodule(embedding).weight.shape[1] * 2  # pyright: ignore
    assert plan.tokens == {embedding: (90, 95)}
    assert plan.trainable_parameters == sum(p.numel() for p in lorank.adapter_parameters(model).values())
    assert sum("offset" in name for name in lorank.adapter_parameters(model)) == 1
    assert torch.equal(logits(model, x), before)
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: logits(model, x).square().mean(), [x] * 3):
        pass
    lorank.check(model)
    disturb(model)
    y = logits(model, x)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters() if name in bits)
    lorank.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for key, t in stored.items() if "token" in key and "lora" not in key) == rows
    fresh = copy.deepcopy(model)
    lorank.remove(fresh)
    lorank.load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh, x), y, rtol=1e-5, atol=1e-5)
    lorank.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)
    changed = (model.get_submodule(embedding).weight != bits[f"{embedding}.weight"]).any(dim=1)  # pyright: ignore
    assert changed.nonzero().flatten().tolist() == new


def test_token_numbers_alone_mean_embedding_and_head() -> None:
    tied, untied, x = tied_llama(), models.llama(), ids()
    assert lorank.plan(tied, LoRA(), "q_proj", train_tokens=[3]).tokens == {"model.embed_tokens": (3,)}
    plan = lorank.adapt(untied, LoRA(), "q_proj", train_tokens=[96, 3])
    assert plan.tokens == {"model.embed_tokens": (3, 96), "lm_head": (3, 96)}
    disturb(untied)
    y = untied(x).logits
    lorank.merge(untied)
    torch.testing.assert_close(untied(x).logits, y, rtol=1e-5, atol=1e-5)


def test_after_resize_token_embeddings_new_rows_train() -> None:
    model = tied_llama()
    model.resize_token_embeddings(100, mean_resizing=False)  # pyright: ignore
    plan = lorank.adapt(model, LoRA(rank=2), "q_proj", train_tokens=range(97, 100))
    assert plan.tokens == {"model.embed_tokens": (97, 98, 99)}
    assert "3 rows x 32" in str(plan)


def test_tokens_and_a_tied_update_of_the_same_layer(tmp_path: Path) -> None:
    model, x = tied_llama(), ids()
    x[0, 0] = 7
    lorank.adapt(model, LoRA(rank=2), "embed_tokens", train_tokens=[7], tie=True)
    disturb(model)
    y = logits(model, x)
    lorank.save(model, tmp_path)
    fresh = copy.deepcopy(model)
    lorank.remove(fresh)
    lorank.load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh, x), y, rtol=1e-5, atol=1e-5)
    lorank.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_scales_its_output() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(20, 6, 0, embed_scale=3.5), nn.Linear(6, 4))
    lorank.adapt(model, LoRA(rank=2), "1", train_tokens=[4, 9])
    disturb(model)
    x = torch.tensor([[4, 9, 3, 19]])
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([97], "there is no token 97 in a vocabulary of 97; resize_token_embeddings"),
        ([-1], "there is no token -1"),
        ([3, 3], "a token is named twice"),
        (["<new>"], "token numbers are whole numbers"),
        ("<new>", "give token numbers"),
        ({"embd": [3]}, "'embd' names no module; nearest: embed"),
        ({"norm": [3]}, "no host for"),
    ],
)
def test_what_is_no_token_is_refused(tokens: object, message: str) -> None:
    model = Plain()
    with pytest.raises(AdapterError, match=message):
        lorank.adapt(model, LoRA(), "up", train_tokens=tokens)  # pyright: ignore
    assert not lorank.adapter_names(model)
