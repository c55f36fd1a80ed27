"""A training that was stored and taken up again goes on to the bit."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import lorank
from lorank import AdapterError, LoRA, TrainConfig
from lorank.training import TrainState

from .. import models

STEPS = 6
CONFIG = TrainConfig(
    steps=STEPS, learning_rate=1e-2, schedule="cosine", warmup=2, weight_decay=0.1, clip=0.5, accumulate=2
)


def adapted() -> Any:
    torch.manual_seed(3)
    model = models.llama()
    lorank.adapt(model, LoRA(rank=2, dropout=0.2), ["q_proj", "down_proj"], train_also="model.norm")
    return model.train()


def batches(begin: int = 0) -> Iterator[Tensor]:
    """Yield the batches from a number on, without end."""
    number = begin
    while True:
        yield torch.randint(5, models.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(number))
        number += 1


def loss(model: Any) -> Any:
    return lambda batch: model(batch, labels=batch).loss * random.uniform(0.5, 1.5)


def trained(steps: int, model: Any, state: TrainState) -> Any:
    """Train up to a step and return the model; the generator is left as a caller who breaks leaves it."""
    parameters = lorank.adapter_parameters(model)
    for step in lorank.train(parameters, loss(model), batches(state.step * CONFIG.accumulate), CONFIG, state=state):
        if step.index == steps:
            break
    return model


def through_a_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(tensors))


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)


def uninterrupted() -> tuple[dict[str, Tensor], float]:
    """Return the parameters after all steps, and the next number of python's generator."""
    model = adapted()
    seed(11)
    trained(STEPS, model, TrainState())
    return {key: p.detach().clone() for key, p in lorank.adapter_parameters(model).items()}, random.random()


@settings(max_examples=8, deadline=None)
@given(stops=st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=3))
def test_stopping_and_going_on_is_the_uninterrupted_training_to_the_bit(stops: set[int]) -> None:
    expected, next_number = uninterrupted()
    model, state = adapted(), TrainState()
    seed(11)
    for stop in [*sorted(stops), STEPS]:
        trained(stop, model, state)
        assert state.step == stop
        stored = through_a_file(state.tensors() | {f"p.{k}": p for k, p in lorank.adapter_parameters(model).items()})
        model, state = adapted(), TrainState.of({k: t for k, t in stored.items() if not k.startswith("p.")})
        with torch.no_grad():
            for key, parameter in lorank.adapter_parameters(model).items():
                parameter.copy_(stored[f"p.{key}"])
        if stop < STEPS:
            seed(random.randrange(1000))  # whatever happened in between
    assert random.random() == next_number
    for key, parameter in lorank.adapter_parameters(model).items():
        assert torch.equal(parameter, expected[key]), key


@pytest.mark.parametrize("lost", ["optimiser.", "random.torch", "random.python"])
def test_every_part_of_the_state_counts(lost: str) -> None:
    expected, _ = uninterrupted()
    model, state = adapted(), TrainState()
    seed(11)
    trained(3, model, state)
    stored = through_a_file(state.tensors())
    seed(12)
    other = {"random.torch": torch.get_rng_state(), "random.python": torch.tensor([3, *random.getstate()[1]])}
    for key in stored:
        if key.startswith(lost) and not key.endswith("step"):
            stored[key] = other.get(key, torch.zeros_like(stored[key]))
    trained(STEPS, model, TrainState.of(stored))
    parameters = lorank.adapter_parameters(model)
    assert not all(torch.equal(parameter, expected[key]) for key, parameter in parameters.items())


def test_a_state_in_use_can_go_on_and_what_was_stored_stays_as_it_was() -> None:
    expected, _ = uninterrupted()
    model, state = adapted(), TrainState()
    seed(11)
    trained(2, model, state)
    stored = through_a_file(state.tensors())
    kept = {key: tensor.clone() for key, tensor in stored.items()}
    trained(4, model, state)  # the object itself, not a stored copy
    trained(STEPS, model, state)
    for key, parameter in lorank.adapter_parameters(model).items():
        assert torch.equal(parameter, expected[key]), key
    trained(STEPS, adapted(), TrainState.of(stored))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in stored.items())


def test_a_training_that_is_done_makes_no_further_step() -> None:
    model, state = adapted(), TrainState()
    trained(STEPS, model, state)
    done = TrainState.of(through_a_file(state.tensors()))
    assert done.step == STEPS
    assert list(lorank.train(lorank.adapter_parameters(model), loss(model), batches(), CONFIG, state=done)) == []


def test_a_state_that_was_never_used_has_nothing_to_store() -> None:
    assert TrainState().tensors() == {}


def a_state() -> dict[str, Tensor]:
    state = TrainState()
    trained(1, adapted(), state)
    return state.tensors()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"step": None}, "no state of a training: it lacks step"),
        ({"random.python": None, "random.torch": None}, r"it lacks random\.python, random\.torch"),
        ({"step": torch.zeros(2)}, r"its step has the shape \(2,\)"),
        ({"random.torch": torch.zeros(7, dtype=torch.uint8)}, "random generators cannot be set"),
        ({"random.python": torch.arange(9)}, "random generators cannot be set"),
        ({"random.python": torch.zeros(0)}, "random generators cannot be set"),
        ({"optimiser.0.exp_avg_sq": None}, "not AdamW's: of parameter 0 it has exp_avg, step"),
        ({"optimiser.0.momentum_buffer": torch.zeros(1)}, "not AdamW's: of parameter 0 it has exp_avg, exp_avg_sq, m"),
        ({"optimiser.1.exp_avg": torch.zeros(3, 1)}, r"other parameters.*number 1 had the shape \(3, 1\)"),
    ],
)
def test_what_is_no_state_is_refused(changes: dict[str, Tensor | None], reason: str) -> None:
    stored = {key: tensor for key, tensor in (a_state() | changes).items() if tensor is not None}
    model = adapted()
    before = {key: p.detach().clone() for key, p in lorank.adapter_parameters(model).items()}
    with pytest.raises(AdapterError, match=reason):
        trained(2, model, TrainState.of(stored))
    assert all(torch.equal(p, before[key]) for key, p in lorank.adapter_parameters(model).items())


def test_a_state_of_other_parameters_is_refused() -> None:
    stored = a_state()
    count = len(lorank.adapter_parameters(adapted()))
    other = models.llama()
    lorank.adapt(other, LoRA(rank=2), ["q_proj", "down_proj"])  # as before, without the copy: the first ones fit
    with pytest.raises(AdapterError, match=f"{count} then, {count - 1} now"):
        trained(2, other, TrainState.of(stored))
    lorank.adapt(
        other, LoRA(rank=2, dropout=0.2), ["q_proj", "down_proj"], "more", train_also=["model.norm", "lm_head"]
    )
    with pytest.raises(AdapterError, match=f"{count} then, {count + 1} now"):
        trained(2, other, TrainState.of(stored))
    lorank.adapt(other, LoRA(rank=3), ["q_proj", "down_proj"], "wider", train_also="model.norm")
    with pytest.raises(AdapterError, match=rf"{count} then, {count} now, and number 0 had the shape \(2, "):
        trained(2, other, TrainState.of(stored))
    with pytest.raises(AdapterError, match=f"0 then, {count} now"):
        trained(2, adapted(), TrainState.of({k: t for k, t in stored.items() if not k.startswith("optimiser.")}))


def test_lora_plus_goes_on_to_the_bit_in_two_groups() -> None:
    config = TrainConfig(steps=4, learning_rate=1e-2, lora_plus=8)

    def steps(model: Any, state: TrainState, stop: int) -> None:
        following = itertools.islice(batches(), state.step, None)
        for step in lorank.train(lorank.adapter_parameters(model), loss(model), following, config, state=state):
            assert state._optimiser is not None
            rates = [group["lr"] for group in state._optimiser.param_groups]
            assert rates == [config.learning_rate, 8 * config.learning_rate]  # a kernel each, and not one a parameter
            if step.index == stop:
                break

    whole, model = adapted(), adapted()
    seed(11)
    steps(whole, TrainState(), 4)
    seed(11)
    state = TrainState()
    steps(model, state, 2)
    stored, again = through_a_file(state.tensors()), adapted()
    again.load_state_dict(model.state_dict())
    steps(again, TrainState.of(stored), 4)
    expected = lorank.adapter_parameters(whole)
    for key, parameter in lorank.adapter_parameters(again).items():
        assert torch.equal(parameter, expected[key]), key
