"""The budget of ranks of AdaLoRA: stored and taken up again, and its penalty."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdaLoRA, AdapterError, LoRA

from .cases import leaves, stacked


def trained_with_budget(
    model: Any, budget: lorank.RankBudget, optimiser: torch.optim.Optimizer, steps: range
) -> list[Tensor]:
    losses = []
    for index in steps:
        torch.manual_seed(index)
        optimiser.zero_grad()
        loss = model(torch.randn(7, 6)).square().mean() + budget.penalty()
        loss.backward()
        optimiser.step()
        budget.update(index)
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("cut", [1, 7, 14, 17])
def test_a_budget_goes_on_where_it_was(cut: int) -> None:
    model = stacked(AdaLoRA(rank=4, target_rank=2, interval=2))
    optimiser = torch.optim.SGD(lorank.adapter_parameters(model).values(), lr=0.2)
    budget = lorank.RankBudget(model, 20)
    trained_with_budget(model, budget, optimiser, range(1, cut + 1))
    twin = copy.deepcopy(model)
    stored = {key: tensor.clone() for key, tensor in budget.tensors().items()}
    expected = trained_with_budget(model, budget, optimiser, range(cut + 1, 21))
    again = lorank.RankBudget(twin, 20)
    again.restore(stored)
    other = torch.optim.SGD(lorank.adapter_parameters(twin).values(), lr=0.2)
    assert torch.equal(torch.stack(trained_with_budget(twin, again, other, range(cut + 1, 21))), torch.stack(expected))
    for ours, theirs in zip(leaves(model).values(), leaves(twin).values(), strict=True):
        assert torch.equal(ours.E, theirs.E)
    assert sum(int(leaf.E.count_nonzero()) for leaf in leaves(model).values()) == 4
    assert again.tensors().keys() == budget.tensors().keys()


def test_a_stored_budget_of_another_adapter_is_refused() -> None:
    model = stacked(AdaLoRA(rank=4, target_rank=2))
    budget = lorank.RankBudget(model, 20)
    optimiser = torch.optim.SGD(lorank.adapter_parameters(model).values(), lr=0.2)
    trained_with_budget(model, budget, optimiser, range(1, 4))
    stored = budget.tensors()
    other = lorank.RankBudget(stacked(AdaLoRA(rank=3, target_rank=2)), 20)
    with pytest.raises(AdapterError, match="of another adapter"):
        other.restore(stored)
    with pytest.raises(AdapterError, match=r"of another adapter: odd \(1,\)"):
        budget.restore({"odd": torch.ones(1)})
    with pytest.raises(AdapterError, match=r"lacks second$"):
        budget.restore({key: tensor for key, tensor in stored.items() if key.startswith("first")})
    for late in (14, 15):
        with pytest.raises(AdapterError, match=f"knows nothing of the steps before {late}"):
            lorank.RankBudget(model, 20).update(late)
    with pytest.raises(AdapterError, match="1 step is too few to drop ranks between step 0 and 1"):
        lorank.RankBudget(model, 1)
    with pytest.raises(AdapterError, match="2 steps are too few to drop ranks between step 1 and 1"):
        lorank.RankBudget(stacked(AdaLoRA(rank=3, target_rank=2, warmup=0.5, settle=0.4)), 2)
    with pytest.raises(AdapterError, match="default is no AdaLoRA adapter"):
        lorank.RankBudget(stacked(LoRA(rank=2)), 20)


def test_the_penalty_is_zero_for_orthonormal_factors() -> None:
    model = stacked(AdaLoRA(rank=4, target_rank=2, orthogonality=0.3))
    budget = lorank.RankBudget(model, 20)
    norms = []
    for leaf in leaves(model).values():
        norms += [(leaf.A @ leaf.A.T - torch.eye(4)).norm(), (leaf.B.T @ leaf.B - torch.eye(4)).norm()]
    torch.testing.assert_close(budget.penalty(), 0.3 * torch.stack(norms).mean())
    for leaf in leaves(model).values():
        nn.init.orthogonal_(leaf.A)
        nn.init.orthogonal_(leaf.B)
    assert budget.penalty() < 1e-5
