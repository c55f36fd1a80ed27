"""Files between lorank and loralib, the package of the authors: each computes with them what the other computes."""

import copy
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.tree import entries

from .. import models

lora = pytest.importorskip("loralib", reason="loralib is not installed", exc_type=ImportError)

ALPHA = 6
CONVOLUTIONS = [  # in, out, kernel, groups
    *[(4, 6, 3, 1), (3, 5, 1, 1), (4, 6, 2, 2), (6, 12, 3, 3), (8, 8, 2, 4), (6, 6, 3, 2), (4, 8, 4, 2), (6, 6, 1, 6)],
]


def disturb(model: nn.Module, part: str = "lora_") -> None:
    """Give parameters with this in their names random values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def replaced(model: Any, endings: tuple[str, ...], make: Callable[[Any], nn.Module], keep: tuple[str, ...]) -> Any:
    """Return a copy of a model with other layers, which have the weights of those that they take the place of."""
    theirs = copy.deepcopy(model)
    for name, layer in list(theirs.named_modules()):
        if name.endswith(endings):
            made = make(layer)
            inner: Any = getattr(made, "conv", made)
            for key in keep:
                if getattr(layer, key) is not None:
                    getattr(inner, key).data.copy_(getattr(layer, key).data)
            owner, _, child = name.rpartition(".")
            theirs.get_submodule(owner)._modules[child] = made
    return theirs.train()


def linear(layer: Any, r: int = 4) -> nn.Module:
    return lora.Linear(layer.in_features, layer.out_features, r=r, lora_alpha=ALPHA, bias=layer.bias is not None)


def merged(enabled: list[bool], r: int = 2) -> Callable[[Any], nn.Module]:
    def make(layer: Any) -> nn.Module:
        size, transposed = layer.weight.shape, not isinstance(layer, nn.Linear)
        in_, out = size if transposed else (size[1], size[0])
        settings = {"enable_lora": enabled, "fan_in_fan_out": transposed}
        return lora.MergedLinear(in_, out, r=r, lora_alpha=ALPHA, **settings)

    return make


def embedding(layer: Any, r: int = 3) -> nn.Module:
    return lora.Embedding(*layer.weight.shape, r=r, lora_alpha=ALPHA, padding_idx=layer.padding_idx)


def convolution(layer: Any, r: int = 2) -> nn.Module:
    settings = {key: getattr(layer, key) for key in ("stride", "padding", "groups")}
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size[0])
    return lora.Conv2d(*sizes, r=r, lora_alpha=ALPHA, bias=layer.bias is not None, **settings)


def both(base: Any) -> Any:
    """Return a model of transformers without dropout, so that train and eval mode compute the same."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def logits(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, base: Tensor | None = None) -> None:
    """Compare outputs, also where loralib has merged its factors into the weights, and after it took them out again."""
    expected = logits(ours, x)
    assert base is None or not torch.allclose(expected, base, atol=1e-3), "the adapter has no effect"
    for mode in (True, False, True):
        torch.testing.assert_close(logits(theirs.train(mode), x), expected, rtol=1e-5, atol=1e-5)


def saved(model: nn.Module, path: Path) -> tuple[float, list[str]]:
    """Save an adapter; return the alpha to make loralib's layers with, and all that was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorank.save(model, path, format="loralib")
    texts = [str(warning.message) for warning in caught]
    found = re.search(r"lora_alpha=([\d.]+)", texts[0])
    assert found is not None
    return float(found[1]), texts


def exact(path: Path, theirs: nn.Module) -> None:
    """Load a file as loralib's users do, and see that each tensor of it had a place."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    assert theirs.load_state_dict(state, strict=False).unexpected_keys == []


# --- Linear ---


def test_linear_layers_both_ways(tmp_path: Path) -> None:
    base, x = both(models.roberta()), models.ids()
    before = logits(base, x)
    theirs = replaced(base, ("query", "value", "dense"), linear, ("weight", "bias"))
    disturb(theirs)
    torch.save(lora.lora_state_dict(theirs), tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    plan = lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    assert plan.spec == LoRA(4, alpha=ALPHA) and not plan.copies and plan.bias == "none"
    assert_same(ours, theirs, x, before)
    alpha, _ = saved(ours, tmp_path / "ours.pt")
    assert alpha == ALPHA
    assert_same_files(tmp_path / "theirs.pt", tmp_path / "ours.pt")
    fresh = replaced(base, ("query", "value", "dense"), linear, ("weight", "bias"))
    exact(tmp_path / "ours.pt", fresh)
    assert_same(ours, fresh, x)


def assert_same_files(one: Path, other: Path) -> None:
    a, b = torch.load(one, weights_only=True, map_location="cpu"), torch.load(other, weights_only=True)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        if key.endswith("bias"):  # kept as what was added to the base's
            torch.testing.assert_close(b[key], tensor)
        else:
            assert torch.equal(b[key], tensor) and b[key].dtype == tensor.dtype, key


def test_a_model_that_loralib_has_trained(tmp_path: Path) -> None:
    base, x = both(models.roberta()), models.ids()
    theirs = replaced(base, ("query", "value"), linear, ("weight", "bias"))
    lora.mark_only_lora_as_trainable(theirs)
    for parameter in theirs.classifier.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(x, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    head = {key: value for key, value in theirs.state_dict().items() if "lora_" in key or key.startswith("classifier")}
    torch.save(head, tmp_path / "theirs.bin")
    ours = copy.deepcopy(base)
    plan = lorank.load(ours, tmp_path / "theirs.bin", alpha=ALPHA, allow_pickle=True)
    assert list(plan.copies) == ["classifier"]
    assert_same(ours, theirs, x, logits(base, x))
    saved(ours, tmp_path / "ours.bin")
    assert_same_files(tmp_path / "theirs.bin", tmp_path / "ours.bin")


def test_the_names_of_deberta(tmp_path: Path) -> None:
    base, x = both(models.deberta()), models.ids()
    theirs = replaced(base, (".query_proj", ".value_proj"), linear, ("weight", "bias"))
    disturb(theirs)
    disturb(theirs, "classifier")
    disturb(theirs, "pooler")
    parts = ("lora_", "classifier", "pooler")
    stored = {key: value for key, value in theirs.state_dict().items() if any(part in key for part in parts)}
    torch.save(stored, tmp_path / "x.bin")
    plan = lorank.load(base, tmp_path / "x.bin", alpha=ALPHA, allow_pickle=True)
    assert set(plan.copies) == {"classifier", "pooler"} and len(plan.places) == 4
    assert_same(base, theirs, x)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases(bias: str, tmp_path: Path) -> None:
    base, x = both(models.roberta()), models.ids()
    theirs = replaced(base, ("query", "value"), linear, ("weight", "bias"))
    disturb(theirs)
    lora.mark_only_lora_as_trainable(theirs, bias)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(lora.lora_state_dict(theirs, bias), tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    plan = lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    assert plan.bias == {"lora_only": "adapted", "all": "all"}[bias]
    assert_same(ours, theirs, x, logits(base, x))
    saved(ours, tmp_path / "ours.pt")
    fresh = replaced(base, ("query", "value"), linear, ("weight", "bias"))
    exact(tmp_path / "ours.pt", fresh)
    assert_same(ours, fresh, x)
    assert torch.load(tmp_path / "ours.pt").keys() == lora.lora_state_dict(theirs, bias).keys()


# --- Embedding ---


def test_embeddings_both_ways(tmp_path: Path) -> None:
    base, x = models.Plain().eval(), models.ids()
    theirs = replaced(base, ("embed",), embedding, ("weight",))
    disturb(theirs)
    torch.save(lora.lora_state_dict(theirs), tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    assert_same(ours, theirs, x, base(x))
    saved(ours, tmp_path / "ours.pt")
    assert_same_files(tmp_path / "theirs.pt", tmp_path / "ours.pt")


# --- MergedLinear ---


@pytest.mark.parametrize(
    ("enabled", "nested"),
    [([True, False, True], True), ([True, True, True], False), ([False, True, False], False)],
)
def test_parts_of_the_projection_of_gpt2(enabled: list[bool], nested: bool, tmp_path: Path) -> None:
    base, x = both(models.gpt2()), models.ids()
    theirs = replaced(base, ("c_attn",), merged(enabled), ("weight", "bias"))
    disturb(theirs)
    state = lora.lora_state_dict(nn.DataParallel(theirs) if nested else theirs)
    assert all(key.startswith("module.") == nested for key in state)
    torch.save({"model_state_dict": state} if nested else state, tmp_path / "theirs.pt")
    parts = [part for part, is_on in zip("qkv", enabled, strict=True) if is_on]
    ours = copy.deepcopy(base)
    if not all(enabled):
        reason = f"the file adapts {len(parts)} parts of a fused projection, and does not say which of q, k, v"
        with pytest.raises(AdapterError, match=reason):
            lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    plan = lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True, parts=parts)
    assert [place.part for place in plan.places] == 2 * parts and plan.spec == LoRA(2, alpha=ALPHA)
    assert_same(ours, theirs, x, logits(base, x))
    _, texts = saved(ours, tmp_path / "ours.pt")
    assert f"MergedLinear with enable_lora={enabled}" in texts[0]
    fresh = replaced(base, ("c_attn",), merged(enabled), ("weight", "bias"))
    exact(tmp_path / "ours.pt", fresh)
    assert_same(ours, fresh, x)


def test_parts_of_unequal_rank_and_scale_become_equal(tmp_path: Path) -> None:
    base, x = both(models.gpt2()), models.ids()
    ours = copy.deepcopy(base)
    lorank.adapt(ours, LoRA(2, alpha=5), ["c_attn[q,v]"], name="x")
    for _, entry in entries(ours, "x").values():
        parts: Any = entry
        parts.v.scale = 3.0
        parts.v.spec = LoRA(1, alpha=3)
        parts.v.A, parts.v.B = nn.Parameter(parts.v.A[:1].clone()), nn.Parameter(parts.v.B[:, :1].clone())
    models.disturb(ours)
    alpha, texts = saved(ours, tmp_path / "ours.pt")
    assert any("parts brought to one rank and scale: v" in text for text in texts)
    theirs = replaced(base, ("c_attn",), merged([True, False, True]), ("weight", "bias"))
    for module in theirs.modules():
        if isinstance(module, lora.MergedLinear):
            module.scaling = alpha / 2
    exact(tmp_path / "ours.pt", theirs)
    assert_same(ours, theirs, x, logits(base, x))


@pytest.mark.parametrize(("enabled", "parts"), [([True, False, True, False], ("0", "2")), ([True] * 4, ())])
def test_rows_of_a_layer_that_nothing_is_known_of(enabled: list[bool], parts: tuple[str, ...], tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3)), torch.randn(4, 8)
    theirs = replaced(base, ("0",), merged(enabled, r=3), ("weight", "bias"))
    disturb(theirs)
    torch.save(lora.lora_state_dict(theirs), tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    plan = lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True, parts=parts)
    assert plan.spec == LoRA(3 * sum(enabled), alpha=ALPHA * sum(enabled))
    assert_same(ours, theirs, x, base(x))
    saved(ours, tmp_path / "ours.pt")
    fresh = replaced(base, ("0",), lambda layer: linear(layer, r=3 * sum(enabled)), ("weight", "bias"))
    fresh[0].scaling = ALPHA / 3
    exact(tmp_path / "ours.pt", fresh)
    assert_same(ours, fresh, x)


# --- Conv2d ---


class Convolutions(nn.Module):
    """Convolutions of several sizes side by side."""

    def __init__(self, *sizes: tuple[int, int, int, int]) -> None:
        super().__init__()
        made = [nn.Conv2d(i, out, k, groups=groups, stride=2, padding=1) for i, out, k, groups in sizes]
        self.branches = nn.ModuleDict({f"at{i}": layer for i, layer in enumerate(made)})
        self.inputs = [torch.randn(2, size[0], 7, 6) for size in sizes]

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.branches.values(), self.inputs, strict=True)
        return torch.cat([layer(x * own).flatten() for layer, own in pairs])


def test_convolutions_of_loralib(tmp_path: Path) -> None:
    base, x = Convolutions(*CONVOLUTIONS), torch.randn(())
    theirs = replaced(base, tuple(base.branches), convolution, ("weight", "bias"))
    disturb(theirs)
    disturb(theirs, "conv.bias")
    torch.save(lora.lora_state_dict(theirs, "all"), tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    assert_same(ours, theirs, x, base(x))
    alpha, _ = saved(ours, tmp_path / "ours.pt")
    assert alpha == ALPHA
    assert_same_files(tmp_path / "theirs.pt", tmp_path / "ours.pt")


def test_convolutions_of_lorank(tmp_path: Path) -> None:
    base, x = Convolutions(*CONVOLUTIONS), torch.randn(())
    ours = copy.deepcopy(base)
    lorank.adapt(ours, LoRA(2, alpha=5), [*base.branches], bias="adapted", ranks={"at1": 3, "at7": 1})
    models.disturb(ours)
    alpha, _ = saved(ours, tmp_path / "ours.pt")
    state = torch.load(tmp_path / "ours.pt")
    ranks = [state[f"branches.at{i}.lora_A"].shape[0] // size[2] for i, size in enumerate(CONVOLUTIONS)]
    theirs = replaced(base, tuple(base.branches), convolution, ("weight", "bias"))
    for rank, (name, layer) in zip(ranks, base.branches.items(), strict=True):
        theirs.branches[name] = convolution(layer, r=rank)
        theirs.branches[name].conv.load_state_dict(layer.state_dict())
        theirs.branches[name].scaling = alpha / rank
    exact(tmp_path / "ours.pt", theirs)
    assert_same(ours, theirs, x, base(x))
    again = copy.deepcopy(base)
    lorank.load(again, tmp_path / "ours.pt", alpha=alpha, allow_pickle=True)
    assert_same(again, theirs, x)


# --- whole state dicts ---


def test_a_state_dict_with_the_base_in_it(tmp_path: Path) -> None:
    base, x = both(models.roberta()), models.ids()
    theirs = replaced(base, ("query", "value"), linear, ("weight", "bias"))
    disturb(theirs)
    disturb(theirs, "classifier")
    disturb(theirs, "layer.0.attention.self.query.bias")
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "theirs.pt")
    ours = copy.deepcopy(base)
    with pytest.warns(AdapterWarning, match="the file holds epoch beside the adapter"):
        plan = lorank.load(ours, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    assert list(plan.copies) == ["classifier"]
    assert list(plan.biases) == ["roberta.encoder.layer.0.attention.self.query"]
    assert_same(ours, theirs, x, logits(base, x))


def test_a_state_dict_that_was_saved_merged_is_told(tmp_path: Path) -> None:
    base = both(models.roberta())
    theirs = replaced(base, ("query", "value"), linear, ("weight", "bias"))
    disturb(theirs)
    torch.save(theirs.eval().state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(AdapterError, match=r"query\.weight with the update merged into it.* model\.train\(\)"):
        lorank.load(base, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    with pytest.raises(AdapterError, match=r"another base, or one with an update merged into it"):
        lorank.load(base, tmp_path / "theirs.pt", alpha=3 * ALPHA, allow_pickle=True)
    theirs.train()
    disturb(theirs, "word_embeddings")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(AdapterError, match=r"word_embeddings\.weight, and it differs from this model's"):
        lorank.load(base, tmp_path / "theirs.pt", alpha=16, allow_pickle=True)
    assert lorank.adapter_names(base) == []


def test_a_merged_convolution_and_a_merged_projection_are_told(tmp_path: Path) -> None:
    base = Convolutions((4, 6, 3, 1))
    theirs = replaced(base, ("at0",), convolution, ("weight", "bias"))
    disturb(theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    lorank.load(copy.deepcopy(base), tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    torch.save(theirs.eval().state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(AdapterError, match=r"at0\.weight with the update merged into it"):
        lorank.load(base, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True)
    gpt2 = models.gpt2()
    theirs = replaced(gpt2, ("c_attn",), merged([True, False, True]), ("weight", "bias"))
    disturb(theirs)
    torch.save(theirs.eval().state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(AdapterError, match=r"c_attn\.weight with the update merged into it"):
        lorank.load(gpt2, tmp_path / "theirs.pt", alpha=ALPHA, allow_pickle=True, parts=("q", "v"))


# --- what loralib's reader has to know ---


def test_layers_of_several_scales_are_folded_into_one_alpha(tmp_path: Path) -> None:
    base, x = both(models.roberta()), models.ids()
    ours = copy.deepcopy(base)
    lorank.adapt(ours, LoRA(4, alpha=8), ["query", "value"], ranks={"value": 2}, alphas={"layer.1.*.value": 5})
    models.disturb(ours)
    alpha, texts = saved(ours, tmp_path / "ours.pt")
    assert alpha == 8 and "r=4 for" in texts[0] and "r=2 for" in texts[0]
    assert any("scale folded into B, where alpha is not 8: roberta.encoder.layer.1" in text for text in texts)
    theirs = replaced(base, ("query",), linear, ("weight", "bias"))
    theirs = replaced(theirs, ("value",), lambda layer: linear(layer, r=2), ("weight", "bias"))
    for module in theirs.modules():
        if isinstance(module, lora.Linear):
            module.scaling = alpha / module.r
    exact(tmp_path / "ours.pt", theirs)
    assert_same(ours, theirs, x, logits(base, x))


def test_a_weight_that_others_read_is_not_merged(tmp_path: Path) -> None:
    base, x = models.Plain(tied=True).eval(), models.ids()
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # that the head is another then
        lorank.adapt(ours, LoRA(3, alpha=ALPHA), ["embed"])
    models.disturb(ours)
    _, texts = saved(ours, tmp_path / "ours.pt")
    assert any("others have the weight of embed too: make these with merge_weights=False" in text for text in texts)
    theirs: Any = copy.deepcopy(base)
    theirs.embed = lora.Embedding(97, 16, r=3, lora_alpha=ALPHA, merge_weights=False)
    theirs.embed.weight = theirs.head.weight
    exact(tmp_path / "ours.pt", theirs)
    assert_same(ours, theirs, x, base(x))


# --- the published checkpoint ---


def test_the_published_adapter_of_roberta_for_mnli(tmp_path: Path) -> None:
    data = os.environ.get("LORANK_DATA")
    if not data:
        pytest.skip("LORANK_DATA names no folder with the published checkpoint")
    file = Path(data) / "checkpoints" / "roberta_base_lora_mnli.bin"
    sizes: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "num_labels": 3}
    model = RobertaForSequenceClassification(RobertaConfig(type_vocab_size=1, **sizes)).eval()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    published = torch.load(file, weights_only=True, map_location="cpu")
    plan = lorank.load(model, file, name="mnli", alpha=16, allow_pickle=True)
    assert plan.spec == LoRA(8, alpha=16) and len(plan.places) == 24 and list(plan.copies) == ["classifier"]
    parameters = lorank.adapter_parameters(model, "mnli")
    factors = sum(p.numel() for name, p in parameters.items() if name.endswith((".A", ".B")))
    assert factors == 294_912 and len(parameters) == 48 + 4
    assert sum(p.numel() for p in parameters.values()) == 887_811
    now = dict(model.named_parameters())
    assert all(now[name] is parameter and torch.equal(parameter, was) for name, (parameter, was) in before.items())

    x = torch.randint(5, 50265, (2, 9))
    theirs = replaced(model_without(model), ("query", "value"), published_layer, ("weight", "bias"))
    exact(file, theirs.eval())
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-5)

    alpha, _ = saved(model, tmp_path / "again.bin")
    again = torch.load(tmp_path / "again.bin", weights_only=True)
    assert alpha == 16 and again.keys() == published.keys()
    assert all(torch.equal(again[key], published[key]) for key in published)
    lorank.remove(model, "mnli")
    assert dict(model.named_parameters()).keys() == before.keys()


def published_layer(layer: Any) -> nn.Module:
    return lora.Linear(768, 768, r=8, lora_alpha=16, merge_weights=False)


def model_without(model: Any) -> Any:
    """Return a copy of a model as it was before its adapter."""
    plain = copy.deepcopy(model)
    lorank.remove(plain, "mnli")
    return plain
