"""Adapters on packed weights: forward, training, files, and merging into the unpacked weight."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, AdapterWarning, LoRA

from ..models import disturb
from .packing import PACKINGS, Packing, pack_gguf, pack_gguf_embedding, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=PACKINGS)
def packing(request: pytest.FixtureRequest) -> Packing:
    return PACKINGS[request.param]


def packed(packing: Packing) -> nn.Module:
    return packing.pack(plain(packing.dtype)).eval()


def inputs(packing: Packing) -> Tensor:
    return torch.randn(12, 64, dtype=packing.dtype)  # transformers' GGUF kernel for less than nine rows is a GPU's


def adapted(packing: Packing) -> tuple[nn.Module, Tensor]:
    model = packed(packing)
    lorank.adapt(model, LoRA(rank=4), "all-linear")
    disturb(model, size=0.05)
    return model, inputs(packing)


def tolerance(packing: Packing, y: Tensor) -> float:
    """Return how far outputs may be apart: what the quantiser's kernel rounds beside the weights."""
    return packing.kernel_error * float(y.detach().norm())


def test_it_starts_as_the_base_and_then_has_an_effect(packing: Packing) -> None:
    model, x = packed(packing), inputs(packing)
    before = model(x)
    plan = lorank.adapt(model, LoRA(rank=4), "all-linear")
    assert [place.shape for place in plan.places] == [(128, 64), (32, 128)]
    assert plan.base_parameters > 0
    assert (model(x) - before).norm() <= tolerance(packing, before)
    disturb(model)
    assert not torch.allclose(model(x), before, atol=1e-2)
    with lorank.disabled(model):
        assert torch.equal(model(x), before)


def test_training_moves_every_factor_and_nothing_of_the_base(packing: Packing) -> None:
    model, x = packed(packing).train(), inputs(packing)
    before = pickle.dumps([model[0].weight.data, model[2].weight.data])  # pyright: ignore
    lorank.adapt(model, LoRA(rank=4, alpha=8), "all-linear")
    target = torch.randn(12, 32, dtype=packing.dtype)
    losses = []
    for step in lorank.train(
        lorank.adapter_parameters(model).values(),
        lambda x: (model(x) - target).square().mean().float(),
        [x] * 30,
        lorank.TrainConfig(learning_rate=1e-2),
    ):
        losses.append(step.loss)
        lorank.check(model, moved=step.index > 5)
    assert losses[-1] < 0.7 * losses[0]
    assert pickle.dumps([model[0].weight.data, model[2].weight.data]) == before  # pyright: ignore


def test_gradients_reach_what_lies_before(packing: Packing) -> None:
    model, x = adapted(packing)
    x.requires_grad_(True)
    model(x * 1).float().square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.any()


def test_a_file_brings_it_back(packing: Packing, tmp_path: Path) -> None:
    model, x = adapted(packing)
    lorank.save(model, tmp_path)
    other = packed(packing)
    lorank.load(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_a_merged_block_leaves_the_packed_weights_alone(packing: Packing) -> None:
    model, x = adapted(packing)
    y = model(x)
    with lorank.disabled(model):
        effect = y - model(x)
    with lorank.merged(model) as report:
        assert (model(x) - y).norm() <= tolerance(packing, effect)
        assert [row.unpacked for row in report.rows] == [packing.kind] * 2
        with pytest.raises(AdapterError, match=r"is quantised: in `with lorank\.merged"):
            model.state_dict()
    assert (model(x) - y).norm() <= tolerance(packing, effect)
    assert lorank.active_adapters(model) == ["default"]


def test_merging_leaves_ordinary_layers_and_reports_its_error(packing: Packing) -> None:
    model, x = adapted(packing)
    y = model(x)
    with lorank.disabled(model):
        effect = y - model(x)
    report = lorank.merge(model)
    assert (model(x) - y).norm() <= tolerance(packing, effect)
    assert f"unpacked: 2 tensors from {packing.kind}" in str(report)
    assert report.worst is not None and report.worst.relative_error < (1e-6 if packing.dtype == torch.float32 else 0.1)
    for i in (0, 2):
        layer = model[i]  # pyright: ignore
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        assert layer.weight.dtype == packing.dtype
        assert layer.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()
    twin = plain(packing.dtype)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    lorank.adapt(model, LoRA(rank=2), "all-linear")


def test_what_was_trained_packed_is_merged_into_another_base_with_a_warning(packing: Packing, tmp_path: Path) -> None:
    model, _ = adapted(packing)
    lorank.save(model, tmp_path)
    other = plain(packing.dtype)
    with pytest.warns(AdapterWarning, match=rf"{packing.kind} then, .*by .*% of its sampled values"):
        lorank.load(other, tmp_path)
    name = str(packing.dtype).removeprefix("torch.")
    with pytest.warns(AdapterWarning, match=rf"\({packing.kind} then, {name} now\).*times its update"):
        report = lorank.merge(other)
    found = [row.base for row in report.rows]
    assert all(base is not None and 0 < base.difference < packing.error for base in found)


def test_unrelated_weights_are_refused(packing: Packing, tmp_path: Path) -> None:
    model, _ = adapted(packing)
    lorank.save(model, tmp_path)
    other = plain(packing.dtype)
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter)
    with pytest.raises(AdapterError, match="the base differs from the one this adapter was saved on"):
        lorank.load(other, tmp_path)


def test_another_adapter_stays_on_a_merged_layer(packing: Packing) -> None:
    model, x = adapted(packing)
    lorank.adapt(model, LoRA(rank=2), "0", name="second", activate=False)
    disturb(model, "second", 0.05)
    lorank.activate(model, "default", "second")
    y = model(x)
    lorank.merge(model, "default")
    with lorank.disabled(model):
        effect = y - model(x)
    lorank.activate(model, "second")
    assert (model(x) - y).norm() <= tolerance(packing, effect) + tolerance(packing, y)
    lorank.merge(model)
    assert (model(x) - y).norm() <= 2 * (tolerance(packing, effect) + tolerance(packing, y))


def test_copies_and_removal(packing: Packing) -> None:
    model, x = adapted(packing)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    kinds = [type(packed(packing)[i]) for i in (0, 2)]  # pyright: ignore
    lorank.remove(model)
    assert [type(model[i]) for i in (0, 2)] == kinds  # pyright: ignore
    assert torch.equal(model(x), packed(packing)(x))


def test_a_bias_is_trained_and_merged_too(packing: Packing) -> None:
    model, x = packed(packing), inputs(packing)
    lorank.adapt(model, LoRA(rank=2), "all-linear", bias="adapted")
    disturb(model)
    y = model(x)
    before = model[0].bias.clone()  # pyright: ignore
    with lorank.disabled(model):
        effect = y - model(x)
    with lorank.merged(model):
        assert (model(x) - y).norm() <= tolerance(packing, effect)
    assert torch.equal(model[0].bias, before)  # pyright: ignore
    lorank.merge(model)
    assert (model(x) - y).norm() <= tolerance(packing, effect)


def test_a_packed_embedding(tmp_path: Path) -> None:
    plain_embedding = nn.Embedding(50, 32)
    model = nn.Sequential(pack_gguf_embedding(plain_embedding, "Q8_0"), pack_gguf(nn.Linear(32, 64), "Q4_0"))
    ids = torch.arange(20)
    plan = lorank.adapt(model, LoRA(rank=3), ["0", "1"])
    assert [place.shape for place in plan.places] == [(32, 50), (64, 32)]
    disturb(model)
    y = model(ids)
    y.sum().backward()
    assert lorank.check(model) == ["0: 30 of 50 tokens got no gradient"]
    lorank.save(model, tmp_path)
    lorank.merge(model)
    torch.testing.assert_close(model(ids), y, rtol=1e-5, atol=1e-5)
    assert type(model[0]) is nn.Embedding


def test_a_permuted_input_is_unpacked_in_the_order_in_which_it_comes() -> None:
    layer = pack_gguf(nn.Linear(64, 32), "Q8_0")
    layer.input_permutation = torch.randperm(64)
    model, x = nn.Sequential(layer), torch.randn(10, 64)
    before = model(x)
    lorank.adapt(model, LoRA(rank=2), "0")
    torch.testing.assert_close(model(x), before)
    disturb(model)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
