"""Experts that saw no token are listed, and are no error; an adapter that does not train still is one."""

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA
from lorank.health import Watch


class Chosen(nn.Module):
    """A mixture of which only the first experts are used."""

    def __init__(self, used: int):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.used):
            x = x + torch.tanh(self.experts[i](x))
        return x


class Stacked(nn.Module):
    """The same with the experts in one parameter."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0].T + x @ self.up[2].T

    def __init__(self) -> None:
        super().__init__()
        self.experts = self.Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def steps(model: nn.Module, watch: Watch | None = None) -> list[str]:
    x, remarks = torch.randn(5, 6), []
    parameters = lorank.adapter_parameters(model)
    for _ in lorank.train(
        parameters, lambda x: model(x).square().mean(), [x] * 6, lorank.TrainConfig(learning_rate=1e-2)
    ):
        remarks += watch() if watch is not None else lorank.check(model)
    return remarks


def test_experts_that_saw_no_token_are_listed() -> None:
    model = Chosen(used=2)
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    assert set(steps(model)) == {"experts: 2 experts saw no token (2, 3)"}


def test_the_watch_lists_them_too() -> None:
    model = Chosen(used=3)
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    assert steps(model, Watch(model, "default", steps=4)) == [
        "experts: 1 experts saw no token (3)",
        "experts: 1 experts saw no token in 4 steps (3)",
    ]


def test_experts_in_one_parameter_are_counted() -> None:
    model = Stacked()
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    assert set(steps(model)) == {"experts[up]: 2 of 4 experts saw no token"}


def test_where_no_expert_trains_it_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Chosen(used=0))
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(AdapterError, match=r"1\.experts\.0\.adapters\.default\.B has no gradient"):
        lorank.check(model)


def test_without_names_the_trainer_says_how_experts_are_known() -> None:
    model = Chosen(used=2)
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    parameters = lorank.adapter_parameters(model).values()
    with pytest.raises(AdapterError, match="give train the parameters with their names"):
        next(iter(lorank.train(parameters, lambda x: model(x).mean(), [torch.randn(2, 6)])))
