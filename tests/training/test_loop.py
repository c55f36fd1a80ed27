"""The training loop: accumulation is exact, schedules end where they should, and faults stop it."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lorank
from lorank import AdapterError, LoRA, TrainConfig

from .. import models

Batch = tuple[Tensor, Tensor]


def task(examples: int) -> Batch:
    x = torch.randn(examples, 8)
    return x, x[:, :3].argmax(1)


def adapted(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = models.sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    lorank.adapt(model, LoRA(rank=4), "0", train_also="2")
    return model


def mean_loss(model: nn.Module) -> Any:
    return lambda batch: cross_entropy(model(batch[0]), batch[1])


def summed_loss(model: nn.Module) -> Any:
    return lambda batch: (cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1]))


def test_it_learns() -> None:
    model, batch = adapted(), task(64)
    config = TrainConfig(steps=100, learning_rate=3e-2)
    steps = list(lorank.train(lorank.adapter_parameters(model).values(), mean_loss(model), [batch], config))
    assert [step.index for step in steps] == list(range(1, 101))
    assert steps[-1].loss < 0.3 * steps[0].loss
    assert all(step.grad_norm > 0 for step in steps)


def test_accumulating_unequal_batches_is_the_step_of_the_large_batch() -> None:
    x, y = task(24)
    large, small = adapted(), adapted()
    pieces = [(x[a:b], y[a:b]) for a, b in itertools.pairwise((0, 3, 17, 24))]
    config = TrainConfig(steps=5, learning_rate=1e-2)
    one = lorank.train(lorank.adapter_parameters(large).values(), summed_loss(large), [(x, y)], config)
    three = TrainConfig(steps=5, learning_rate=1e-2, accumulate=3)
    many = lorank.train(lorank.adapter_parameters(small).values(), summed_loss(small), pieces, three)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=1e-6)
        assert a.weight == b.weight == 24


def test_a_pass_that_ends_within_a_step_makes_a_smaller_one() -> None:
    model, batches = adapted(), [task(4) for _ in range(5)]
    parameters = lorank.adapter_parameters(model).values()
    config = TrainConfig(schedule="constant", accumulate=2)
    assert [step.weight for step in lorank.train(parameters, mean_loss(model), batches, config)] == [2, 2, 1]
    config = TrainConfig(steps=4, schedule="constant", accumulate=2)
    assert [step.weight for step in lorank.train(parameters, mean_loss(model), batches, config)] == [2, 2, 1, 2]


def test_an_iterator_is_read_once_and_a_list_again() -> None:
    model, batches = adapted(), [task(4) for _ in range(3)]
    parameters = lorank.adapter_parameters(model).values()
    config = TrainConfig(steps=7)
    assert len(list(lorank.train(parameters, mean_loss(model), batches, config))) == 7
    with pytest.warns(lorank.AdapterWarning, match="the batches ran out after 3 of 7 steps"):
        assert len(list(lorank.train(parameters, mean_loss(model), iter(batches), config))) == 3
    assert len(list(lorank.train(parameters, mean_loss(model), batches))) == 3
    with pytest.raises(AdapterError, match="there are no batches"):
        list(lorank.train(parameters, mean_loss(model), []))
    with pytest.raises(AdapterError, match="no parameters"):
        list(lorank.train([], mean_loss(model), batches))


def test_the_caller_may_stop_whenever_it_likes() -> None:
    model, batch = adapted(), task(8)
    steps = lorank.train(lorank.adapter_parameters(model).values(), mean_loss(model), [batch], TrainConfig(steps=50))
    seen = []
    for step in steps:
        seen.append(step.index)
        if step.index == 3:
            break
    assert seen == [1, 2, 3]


def test_schedules_rise_and_fall_as_they_say() -> None:
    linear = TrainConfig(steps=10, learning_rate=1.0, schedule="linear", warmup=4)
    assert [linear.rate(i) for i in range(1, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [linear.rate(i) for i in range(5, 11)] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = TrainConfig(steps=10, learning_rate=1.0, schedule="cosine")
    assert cosine.rate(1) == 1 and cosine.rate(6) == pytest.approx(0.5)
    assert cosine.rate(10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    constant = TrainConfig(learning_rate=1.0, schedule="constant", warmup=1)
    assert [constant.rate(i) for i in (1, 2, 99)] == [0.5, 1, 1]


def test_gradients_are_clipped_to_the_norm() -> None:
    model, batch = adapted(), task(8)
    parameters = list(lorank.adapter_parameters(model).values())
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        config = TrainConfig(steps=2, clip=1e-3)
        norms = [float(s.grad_norm) for s in lorank.train(parameters, mean_loss(model), [batch], config)]
    assert min(norms) > 1e-2
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(value: float) -> None:
    model, batch = adapted(), task(8)
    parameters = lorank.adapter_parameters(model)
    losses = iter([1.0, 1.0, value])
    steps = lorank.train(
        parameters.values(),
        lambda b: mean_loss(model)(b) * next(losses),
        [batch] * 2,
        TrainConfig(steps=5, accumulate=2),
    )
    next(steps)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    with pytest.raises(AdapterError, match=r"the loss of step 2 is (nan|inf); this step has changed nothing"):
        next(steps)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_a_gradient_that_is_not_finite_stops_before_anything_moves() -> None:
    model, batch = adapted(), task(8)
    parameters = lorank.adapter_parameters(model)
    before = {name: parameter.clone() for name, parameter in parameters.items()}

    def loss(batch: Batch) -> Tensor:
        return mean_loss(model)(batch) + (model(batch[0]) * 0).sum().sqrt()  # finite, with the gradient of √0

    with pytest.raises(AdapterError, match=r"the gradient of step 1 is nan though its loss is \d"):
        next(lorank.train(parameters.values(), loss, [batch]))
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_a_loss_that_cannot_train_is_named() -> None:
    model, batch = adapted(), task(8)
    parameters = lorank.adapter_parameters(model).values()
    for loss, reason in [
        (lambda b: model(b[0]), r"must return one number, or \(sum, weight\); it returned \(8, 3\)"),
        (lambda b: 3.0, "it returned float"),
        (lambda b: mean_loss(model)(b).detach(), "does not depend on any trainable parameter"),
        (lambda b: (mean_loss(model)(b), math.nan), "weigh nan"),
    ]:
        with pytest.raises(AdapterError, match=reason):
            next(lorank.train(parameters, loss, [batch]))


def test_check_works_in_the_body_of_the_loop() -> None:
    model, batch = adapted(), task(8)
    steps = lorank.train(lorank.adapter_parameters(model).values(), mean_loss(model), [batch], TrainConfig(steps=3))
    for step in steps:
        assert lorank.check(model, moved=step.index > 1) == []


def test_a_parameter_without_gradient_stops_the_first_step() -> None:
    model, batch = adapted(), task(8)
    idle = nn.Parameter(torch.zeros(5))
    parameters = [*lorank.adapter_parameters(model).values(), idle]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=r"1 of 5 parameters have no gradient.*\(5,\)"):
        next(lorank.train(parameters, mean_loss(model), [batch]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_that_stop_getting_gradients_stop_the_run() -> None:
    model, batch = adapted(), task(8)
    steps = lorank.train(lorank.adapter_parameters(model), mean_loss(model), [batch], TrainConfig(steps=8))
    next(steps)
    lorank.adapt(model, LoRA(rank=2), "0", name="other")  # and so the first is no longer active
    with pytest.raises(AdapterError, match=r"4 of 4 parameters have no gradient.*is their adapter active"):
        next(steps)


def test_a_mapping_of_parameters_will_do_and_a_model_will_not() -> None:
    model, batch = adapted(), task(8)
    assert next(lorank.train(lorank.adapter_parameters(model), mean_loss(model), [batch])).index == 1
    with pytest.raises(AdapterError, match="not the model"):
        next(lorank.train(model, mean_loss(model), [batch]))


def test_batches_without_weight_are_an_error() -> None:
    model, batch = adapted(), task(8)
    with pytest.raises(AdapterError, match="weigh 0"):
        next(lorank.train(lorank.adapter_parameters(model).values(), lambda b: (mean_loss(model)(b), 0), [batch]))


def test_a_config_names_everything_that_is_wrong_with_it() -> None:
    with pytest.raises(AdapterError) as error:
        TrainConfig(steps=0, learning_rate=0, schedule="step", warmup=-1, clip=0, accumulate=0)  # pyright: ignore
    for field in (
        "steps is 0",
        "learning_rate is 0",
        "schedule is 'step'",
        "warmup is -1",
        "clip is 0",
        "accumulate is 0",
    ):
        assert field in str(error.value)
    with pytest.raises(AdapterError, match="a cosine schedule needs `steps`"):
        TrainConfig(schedule="cosine")
