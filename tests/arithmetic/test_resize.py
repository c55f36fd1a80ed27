"""resize: the best approximation, its error, the rank for a share of energy; and the same on a model."""

from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank import AdapterError, arithmetic
from lorank.formats.content import Content, gather
from lorank.variants import AdaLoRA, LoHa, LoRA, PiSSA

from .. import models
from .dense import adapter, all_train, close, content, deltas, experts, nearest, random_content


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_the_best_of_its_rank(rank: int) -> None:
    a = random_content({"x": (30, 20), "y": (4, 50)}, 5, 1, scale=-1.5)
    made, report = arithmetic.resize(a, rank)
    for row in report.rows:
        W = deltas(a)[row.label]
        best, error = nearest(W, rank)
        torch.testing.assert_close(deltas(made)[row.label], best)
        assert row.error == pytest.approx(error, abs=1e-12)
        spec = made.updates[row.label].spec
        assert isinstance(spec, LoRA) and (spec.rank, spec.alpha) == (rank, rank)


def test_energy_is_the_lowest_rank_that_keeps_it() -> None:
    Q, _ = torch.linalg.qr(torch.randn(12, 4).double())
    P, _ = torch.linalg.qr(torch.randn(9, 4).double())
    a = content({"x": (P.T, Q * torch.tensor([4.0, 2.0, 1.0, 0.5]).double())})  # squares 16, 4, 1, 0.25 of 21.25
    kept = {0.7: 1, 16 / 21.25: 1, 0.76: 2, 20 / 21.25: 2, 0.95: 3, 0.99: 4, 1.0: 4}
    for energy, rank in kept.items():
        made, report = arithmetic.resize(a, energy=energy)
        assert report.rows[0].rank == rank, energy
        assert 1 - report.rows[0].error ** 2 >= energy - 1e-9
        assert made.updates["x"].spec.rank == rank
    assert str(arithmetic.resize(a, energy=0.95)[1]).startswith("resized to 0.95 of the energy: 1 matrices of rank 3")


def test_energy_one_is_the_rank_that_is_there() -> None:
    a = random_content({"x": (30, 20)}, 3, 1)
    doubled, _ = arithmetic.combine({"a": (a, 1), "b": (a, 1)})
    assert doubled.updates["x"].spec.rank == 6
    made, report = arithmetic.resize(doubled, energy=1.0)
    assert made.updates["x"].spec.rank == 3 and report.error < 1e-12
    assert close(deltas(made), {"x": 2 * deltas(a)["x"]}, 1e-12)


def test_an_untrained_layer_is_left_with_one_row() -> None:
    a = content({"x": (torch.randn(4, 6), torch.zeros(5, 4))})
    made, report = arithmetic.resize(a, energy=0.9)
    assert made.updates["x"].spec.rank == 1 and not deltas(made)["x"].any()
    assert report.rows[0].norm == 0 and report.rows[0].error == 0


def test_a_higher_rank_is_exact_and_trains() -> None:
    model = models.llama()
    a = adapter(model, ["q_proj", "embed_tokens"], LoRA(rank=2))
    made, report = arithmetic.resize(a, 6)
    assert close(deltas(made), deltas(a), 1e-6) and report.error == 0
    lorank.resize(model, rank=6)
    # the output head shares no weight with the embedding here; every new direction must get a gradient
    model(models.ids(4, 20)).logits.square().mean().backward()
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.embed_tokens):
        update = layer.adapters["default"]
        A, B = update.A.grad, update.B.grad
        assert bool(((A.abs().sum(dim=1) > 0) | (B.abs().sum(dim=0) > 0)).all())
    repeated, _ = arithmetic.resize(a, 6)
    assert all(torch.equal(u.pair()[0], repeated.updates[name].pair()[0]) for name, u in made.updates.items())


@pytest.mark.filterwarnings("ignore:rank .* holds:lorank.AdapterWarning")
def test_layers_of_every_kind() -> None:
    conv = models.sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=3))
    for model, targets in (
        (conv, ["0", "1"]),
        (models.gpt2(), ["c_attn[q,v]", "c_proj"]),
        (models.sequential(nn.LSTM(5, 7, 2)), ["0"]),
    ):
        before = deltas(adapter(model, targets, LoRA(rank=5, alpha=3)))
        report = lorank.resize(model, rank=2)
        after = deltas(gather(model, "default"))
        for row in report.rows:
            best, error = nearest(before[row.label], 2)
            torch.testing.assert_close(after[row.label], best, atol=1e-5, rtol=0)
            assert row.error == pytest.approx(error, rel=1e-5)


def test_in_place_keeps_what_else_there_is() -> None:
    model = models.bert()
    options: dict[str, Any] = {"train_also": ["classifier"], "bias": "adapted"}
    before = adapter(model, ["query"], LoRA(rank=8, dropout=0.1), "a", 1, **options)
    adapter(model, ["value"], LoRA(rank=2), "b", 2, activate=False)
    report = lorank.resize(model, "a", rank=8)
    assert report.error < 1e-6
    after = gather(model, "a")
    assert {update.spec for update in after.updates.values()} == {LoRA(rank=8, alpha=8, dropout=0.1)}
    assert close(deltas(after), deltas(before), 1e-6)
    assert torch.equal(after.copies["classifier"]["weight"], before.copies["classifier"]["weight"])
    assert after.biases.keys() == before.biases.keys()
    for name, bias in after.biases.items():
        torch.testing.assert_close(bias, before.biases[name])
    assert lorank.active_adapters(model) == ["a"] and set(lorank.adapter_names(model)) == {"a", "b"}
    assert all(p.requires_grad for p in lorank.adapter_parameters(model, "a").values())
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_into_another_name() -> None:
    model = models.llama()
    adapter(model, ["q_proj"], LoHa(rank=3), "a")  # of rank 9 as factors
    report = lorank.resize(model, "a", energy=0.99, into="small")
    assert lorank.active_adapters(model) == ["a"] and lorank.adapter_names(model) == ["a", "small"]
    assert report.error <= 0.1
    made = gather(model, "small")
    assert all(type(update.spec) is LoRA for update in made.updates.values())
    ids = models.ids()
    with torch.no_grad():
        expected = model(ids).logits
        lorank.activate(model, "small")
        assert float((model(ids).logits - expected).norm() / expected.norm()) < 0.2


def test_wrong_arguments() -> None:
    a = random_content({"x": (4, 4)}, 2, 1)
    for options in ({}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(AdapterError, match="give either a rank, or the share of energy"):
            arithmetic.resize(a, **options)
    with pytest.raises(AdapterError, match=r"energy is 1\.5"):
        arithmetic.resize(a, energy=1.5)
    with pytest.raises(AdapterError, match="rank is 0"):
        arithmetic.resize(a, 0)
    model = models.llama()
    adapter(model, ["q_proj"], lorank.DoRA(rank=2), "a")
    with pytest.raises(AdapterError, match=r"cannot resize:\n  model\.layers\.0\.self_attn\.q_proj: DoRA"):
        lorank.resize(model, "a", rank=1)
    with pytest.raises(AdapterError, match="no adapter 'z'"):
        lorank.resize(model, "z", rank=1)
    with pytest.raises(AdapterError, match="'a' is taken"):
        lorank.resize(model, "a", rank=1, into="a")
    assert lorank.active_adapters(model) == ["a"]


def lower_than_its_rank(lookup: bool = False) -> Content:
    """Return a stack whose first ΔW has rank 2, and whose others are zero, in factors of rank 4."""
    A, B = torch.randn(3, 4, 6).double(), torch.randn(3, 5, 4).double()
    A[:, 2:] = A[:, :2]
    B[1:] = 0
    made = content({"x": (A, B)})
    made.updates["x"].lookup = lookup
    return made


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 4}, {"rank": 9}, {"energy": 1.0}])
def test_directions_in_which_there_is_nothing_still_train(options: Any, lookup: bool) -> None:
    a = lower_than_its_rank(lookup)
    made, report = arithmetic.resize(a, **options)
    A, B = made.updates["x"].pair()
    assert all_train(made) and A.shape[-2] == options.get("rank", 2) == report.rows[0].rank
    assert close(deltas(made), deltas(a), 1e-12)
    # One side only, that of a new adapter's which starts at random.
    assert not A[1:].any() if lookup else not B[1:].any()
    repeated, _ = arithmetic.resize(a, **options)
    assert all(torch.equal(*pair) for pair in zip((A, B), repeated.updates["x"].pair(), strict=True))


@pytest.mark.parametrize("spec", [LoRA(rank=4), PiSSA(rank=4), AdaLoRA(rank=6, target_rank=4)], ids=str)
def test_an_adapter_at_its_start_can_be_trained_in_another_rank(spec: Any) -> None:
    model = models.llama()
    lorank.adapt(model, spec, ["q_proj", "embed_tokens"])
    lorank.resize(model, rank=3)
    batch = models.ids(4, 20)
    config = lorank.TrainConfig(steps=3, learning_rate=1e-2)
    for _ in lorank.train(lorank.adapter_parameters(model), lambda ids: model(ids, labels=ids).loss, [batch], config):
        pass
    found = gather(model, "default")
    for update in found.updates.values():
        A, B = update.pair()
        assert bool((A.any(dim=-1) & B.any(dim=-2)).all())


@pytest.mark.filterwarnings("ignore:rank .* holds:lorank.AdapterWarning")
@pytest.mark.parametrize("method", ["exact", "svd", "ties"])
def test_a_sum_of_a_lower_rank_still_trains(method: Any) -> None:
    model: Any = experts()
    lorank.adapt(model, LoRA(rank=3), ["experts", "o_proj"], name="a")
    lorank.adapt(model, LoRA(rank=3), ["experts", "o_proj"], name="b")
    density = 0.5 if method == "ties" else None
    lorank.combine(model, {"a": 1.0, "b": 1.0}, into="of zeros", method=method, rank=3, density=density)
    models.disturb(model, "b")
    lorank.combine(model, {"a": 1.0, "b": 1.0}, into="of one", method=method, rank=4, density=density)
    assert all_train(gather(model, "of zeros")) and all_train(gather(model, "of one"))
