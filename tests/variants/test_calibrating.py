"""Methods that start from data: what they see, and what they refuse before they saw it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import EVA, AdapterError, LoRA, LoRAGA
from lorank.variants import Spec, deal_ranks
from lorank.variants.eva import PrincipalDirections

from ..models import disturb
from .cases import Stack, leaves, stacked

CALIBRATED = [EVA(rank=2, alpha=4), LoRAGA(rank=2, alpha=4)]


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.variant)
def test_an_adapter_that_saw_no_data_does_nothing(spec: Spec, tmp_path: Path) -> None:
    model: Any = Stack()
    lorank.adapt(model, spec, ["first", "second"])
    x = torch.randn(9, 6)
    for use in (
        lambda: model(x),
        lambda: lorank.merge(model),
        lambda: lorank.merged(model).__enter__(),
    ):
        with pytest.raises(AdapterError, match=r"starts from data: call lorank\.calibrate"):
            use()
    with pytest.raises(AdapterError, match=r"(?s)first: it has not seen its data yet.*second: it has not"):
        lorank.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with lorank.disabled(model):
        assert model(x).shape == (9, 5)
    lorank.calibrate(model, lambda x: model(x).square().mean(), [x])
    model(x)
    lorank.reset(model)
    with pytest.raises(AdapterError, match="starts from data"):
        model(x)


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.variant)
def test_what_cannot_be_calibrated_is_refused_and_nothing_has_changed(spec: Spec) -> None:
    model: Any = Stack()
    model.unused = nn.Linear(6, 6)
    x = torch.randn(9, 6)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    lorank.adapt(model, spec, ["first", "second"])
    lorank.adapt(model, spec, ["unused"], name="unused", activate=False)
    gradient_is_nan = torch.where(torch.arange(6) < 3, x, torch.nan)
    cases: list[tuple[Callable[[Tensor], Any], list[Tensor], str | None, str]] = [
        (loss, [], None, "there are no batches"),
        (loss, [x], "unused", r"unused: 0 inputs were seen|must return the loss, of which a gradient"),
        (loss, [x], "other", "no adapter 'other'"),
    ]
    if isinstance(spec, EVA):
        cases.append((loss, [x, gradient_is_nan], None, r"(?s)first: its inputs hold NaN or Inf.*second: its inputs"))
        cases.append((loss, [x[:2]], None, r"2 inputs were seen, which have no 2 directions"))
    else:
        cases.append((loss, [gradient_is_nan], None, "the loss of a batch is nan"))
        cases.append((lambda x: model(x), [x], None, "must return the loss"))
        cases.append((lambda x: None, [x], None, "must return the loss"))
        cases.append((lambda x: 0 * loss(x), [x], None, r"(?s)first: the loss has no gradient.*second"))
        zero_to_root = lambda x: (0 * model(x)).abs().sum().sqrt()  # noqa: E731
        cases.append((zero_to_root, [x], None, "its gradient holds NaN or Inf"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for function, batches, name, message in cases:
        with pytest.raises(AdapterError, match=message):
            lorank.calibrate(model, function, batches, name)
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
        assert lorank.active_adapters(model) == ["default"]
        assert all(parameter.grad is None for parameter in model.parameters())
        with pytest.raises(AdapterError, match="starts from data"):
            model(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lorank.calibrate(model, loss, [x[:, :3]])
    assert not any(getattr(module, "watching", False) for module in model.modules())
    assert sum(lorank.calibrate(model, loss, [x]).values()) == 4
    assert model(x).shape == (9, 5)


def test_what_starts_from_no_data_is_not_calibrated() -> None:
    model = stacked(LoRA(rank=2))
    with pytest.raises(AdapterError, match="default starts from no data; it is ready to train"):
        lorank.calibrate(model, model, [torch.randn(9, 6)])


def test_calibrating_leaves_the_gradients_that_were_there() -> None:
    model: Any = nn.ModuleDict({"body": Stack(), "head": nn.Linear(5, 2)})

    def loss(x: Tensor) -> Tensor:
        return model["head"](model["body"](x)).square().mean()

    lorank.adapt(model, LoRAGA(rank=2), ["first", "second"], train_also=["head"], bias="adapted")
    marked = lorank.adapter_parameters(model)["head.adapters.default.bias"]
    marked.grad = torch.full_like(marked, 7)
    lorank.calibrate(model, loss, [torch.randn(4, 6)])
    assert torch.equal(marked.grad, torch.full_like(marked, 7))
    rest = [p for name, p in lorank.adapter_parameters(model).items() if name != "head.adapters.default.bias"]
    assert len(rest) == 7 and all(parameter.grad is None for parameter in rest)


def test_padding_does_not_count_for_eva() -> None:
    model: Any = Stack()
    lorank.adapt(model, EVA(rank=2, rho=1), ["first", "second"])
    x, mask = torch.randn(5, 4, 6), torch.ones(5, 4, dtype=torch.long)
    x[:, 2:] *= 50
    mask[:, 2:] = 0
    calls = []
    lorank.calibrate(model, model, [(x)], mask=lambda batch: calls.append(batch) or mask)
    masked = {name: leaf.A.clone() for name, leaf in leaves(model).items()}
    assert len(calls) == 1
    lorank.calibrate(model, model, [x[:, :2]])
    for name, leaf in leaves(model).items():
        torch.testing.assert_close(leaf.A.T @ leaf.A, masked[name].T @ masked[name], rtol=1e-4, atol=1e-5)
    lorank.calibrate(model, model, [x])
    assert not torch.allclose(leaves(model)["first"].A.abs(), masked["first"].abs(), atol=1e-2)


def test_principal_directions_are_exact_however_the_rows_come() -> None:
    rows = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 5
    _, S, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for sizes in ([40], [3, 30, 7], [1] * 40):
        found = PrincipalDirections(6)
        for batch in rows.split(sizes):
            found.add(batch)
        torch.testing.assert_close(found.shares, S.square() / S.square().sum())
        torch.testing.assert_close((found.directions @ V.T).abs(), torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(found.mean, rows.mean(0))


def test_directions_in_which_nothing_varies_are_still_directions() -> None:
    model: Any = Stack()
    lorank.adapt(model, EVA(rank=2, rho=1), ["first", "second"])
    lorank.calibrate(model, model, [torch.ones(9, 6)])
    for leaf in leaves(model).values():
        torch.testing.assert_close(leaf.A @ leaf.A.T, torch.eye(2))  # or, with B of zeros, it would never train


def test_ranks_go_where_the_inputs_are_explained() -> None:
    model: Any = Stack(16, 16, 16)
    lorank.adapt(model, EVA(rank=4, alpha=8), ["first", "second"])
    x = torch.randn(60, 1) * torch.randn(16)  # of one direction
    x = x + 1e-3 * torch.randn(60, 16)
    ranks = lorank.calibrate(model, lambda x: (model.first(x), model.second(torch.randn(60, 16))), [x])
    assert ranks == {"first": 1, "second": 7}
    assert {leaf.scale for leaf in leaves(model).values()} == {2.0}
    assert [tuple(leaf.A.shape) for leaf in leaves(model).values()] == [(1, 16), (7, 16)]
    deal_ranks([])


def test_ranks_are_dealt_out_from_those_asked_for_however_often() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    lorank.adapt(model, EVA(rank=2, rho=2), "all-linear")
    with torch.no_grad():
        for i in range(1, 6):
            model.get_parameter(f"{i}.weight")[1:] *= 1e-3  # the inputs after it vary in one direction
    scales = {name: leaf.scale for name, leaf in leaves(model).items()}
    rows = torch.randn(200, 16)
    for x in (rows, rows @ rows[:16], rows):
        ranks = lorank.calibrate(model, model, [x])
        assert sum(ranks.values()) == 12 and max(ranks.values()) == 4 and min(ranks.values()) == 1
        assert {name: leaf.scale for name, leaf in leaves(model).items()} == scales


def test_eva_sees_inputs_without_a_batch() -> None:
    model: Any = Stack()
    lorank.adapt(model, EVA(rank=2, rho=3), ["first", "second"])  # all six directions are kept meanwhile
    rows = torch.randn(9, 6)
    lorank.calibrate(model, model, rows)  # one by one
    one_by_one = leaves(model)["first"].A.detach()
    lorank.calibrate(model, model, [rows])
    torch.testing.assert_close(
        (one_by_one @ leaves(model)["first"].A.T).abs(), torch.eye(len(one_by_one)), atol=1e-4, rtol=0
    )


def test_a_tied_embedding_and_head_start_from_the_gradient_of_both() -> None:
    model: Any = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11, bias=False))
    model[2].weight = model[0].weight
    ids = torch.randint(0, 11, (4, 7))

    def loss(ids: Tensor) -> Tensor:
        return model(ids).square().mean()

    loss(ids).backward()
    _, _, V = torch.linalg.svd(model[0].weight.grad.T, full_matrices=False)
    model.zero_grad()
    before = model(ids)
    lorank.adapt(model, LoRAGA(rank=2), ["0", "2"], tie=True)
    lorank.calibrate(model, loss, [ids])
    torch.testing.assert_close(model(ids), before)
    A = leaves(model)["0"].A.detach()
    torch.testing.assert_close((A / A.norm(dim=1, keepdim=True)) @ V[:2].T, torch.eye(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.variant)
def test_others_that_are_active_rest_while_the_base_is_watched(spec: Spec) -> None:
    alone: Any = Stack()
    x = torch.randn(9, 6)

    def loss(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).square().mean()

    both: Any = copy.deepcopy(alone)
    lorank.adapt(both, LoRA(rank=2), ["first", "second"], name="other")
    disturb(both, "other")
    for model in (alone, both):
        lorank.adapt(model, spec, ["first", "second"], name="new", activate=model is alone)
    lorank.activate(both, "other", "new")
    assert lorank.calibrate(both, loss(both), [x]) == lorank.calibrate(alone, loss(alone), [x])
    assert lorank.active_adapters(both) == ["other", "new"]
    for name, leaf in leaves(alone, "new").items():
        assert torch.equal(leaf.A, leaves(both, "new")[name].A)


def test_of_two_that_start_from_data_one_has_to_be_named() -> None:
    model: Any = Stack()
    for name, spec in (("eva", EVA(rank=2, alpha=4)), ("ga", LoRAGA(rank=2, alpha=4))):
        lorank.adapt(model, spec, ["first", "second"], name=name, activate=False)
    lorank.activate(model, "eva", "ga")
    x = torch.randn(9, 6)
    with pytest.raises(AdapterError, match="eva, ga start from data; name one at a time"):
        lorank.calibrate(model, lambda x: model(x).square().mean(), [x])
    for name in ("eva", "ga"):
        lorank.calibrate(model, lambda x: model(x).square().mean(), [x], name)
    assert model(x).shape == (9, 5)


def test_what_stands_for_the_update_of_lora_ga_takes_no_memory() -> None:
    model: Any = Stack()
    lorank.adapt(model, LoRAGA(rank=2), ["first", "second"])
    stored = []

    def loss(x: Tensor) -> Tensor:
        stored.extend(vars(leaf)["probe"].untyped_storage().nbytes() for leaf in leaves(model).values())
        return model(x).square().mean()

    lorank.calibrate(model, loss, [torch.randn(9, 6)] * 2)
    assert stored == [4] * 4
