"""Faults of other tools, by the thread that reports them: adapters that never trained."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models


def backward(model: nn.Module, x: Tensor) -> None:
    model(x, labels=x).loss.backward()


@pytest.mark.parametrize("thread", ["peft#1959", "peft#3554", "peft#3658", "peft#3693"])
def test_one_wrong_name_of_several_is_an_error(thread: str) -> None:
    model = models.llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(AdapterError, match=r"'v_porj' selects no layer; nearest: v_proj"):
        lorank.adapt(model, LoRA(), ["q_proj", "v_porj"])
    assert [type(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_793_a_trained_adapter_is_not_the_base() -> None:
    model, x = models.llama(), models.ids()
    base = model(x).logits
    lorank.adapt(model, LoRA(), ["q_proj", "v_proj"])
    config = lorank.TrainConfig(steps=3, learning_rate=1e-2)
    for _ in lorank.train(lorank.adapter_parameters(model).values(), lambda x: model(x, labels=x).loss, [x], config):
        pass
    assert not torch.allclose(model(x).logits, base, atol=1e-3)


def test_peft_2115_loading_onto_an_adapted_model_is_an_error_or_takes_effect(tmp_path: Path) -> None:
    trained, x = models.llama(), models.ids()
    base = copy.deepcopy(trained)
    lorank.adapt(trained, LoRA(), ["q_proj"])
    models.disturb(trained)
    lorank.save(trained, tmp_path)
    lorank.adapt(base, LoRA(), ["q_proj"])
    with pytest.raises(AdapterError, match="adapter name 'default' is taken"):
        lorank.load(base, tmp_path)
    lorank.load(base, tmp_path, name="trained")
    assert torch.equal(base(x).logits, trained(x).logits)


def test_trl_3926_adapting_again_does_not_freeze_the_first_adapter() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"], name="first")
    lorank.adapt(model, LoRA(), ["v_proj"], name="second")
    assert all(parameter.requires_grad for parameter in lorank.adapter_parameters(model, "first").values())
    lorank.activate(model, "first", "second")
    backward(model, x)
    assert lorank.check(model) == []


def test_trl_3926_an_adapter_that_a_trainer_froze_is_named() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AdapterError, match="does not depend on any trainable parameter"):
        next(lorank.train(lorank.adapter_parameters(model), lambda x: model(x, labels=x).loss, [x]))
    model.model.layers[0].self_attn.q_proj.adapters["default"].requires_grad_(True)
    backward(model, x)
    with pytest.raises(AdapterError, match=r"1\.self_attn\.q_proj\.adapters\.default\.A has requires_grad=False"):
        lorank.check(model)


@pytest.mark.parametrize("thread", ["peft#3290", "ms-swift#9452"])
def test_saving_and_loading_another_adapter_does_not_stop_training(thread: str, tmp_path: Path) -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj", "v_proj"], name="trained")
    parameters = lorank.adapter_parameters(model, "trained")
    norms = []
    steps = lorank.train(
        parameters.values(), lambda x: model(x, labels=x).loss, [x], lorank.TrainConfig(steps=4, schedule="constant")
    )
    for step in steps:
        norms.append(float(step.grad_norm))
        lorank.save(model, tmp_path / "saved", "trained")
        lorank.load(model, tmp_path / "saved", name=f"copy-{step.index}", activate=False)
        assert lorank.active_adapters(model) == ["trained"]
    assert min(norms) > 0.1 * norms[0] > 0


CHECKPOINTING = ["open-unlearning#178", "transformers#26334", "transformers#42489", "lora#26", "sd-scripts#91"]


@pytest.mark.parametrize("thread", CHECKPOINTING)
def test_checkpointing_with_a_frozen_embedding_trains(thread: str) -> None:
    base, x = models.llama().train(), models.ids()
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        lorank.adapt(model, LoRA(), ["q_proj", "v_proj"])
        if options is not None:
            model.activation_checkpointing_enable(options)
        backward(model, x)
        assert lorank.check(model) == []
        gradients.append([parameter.grad for parameter in lorank.adapter_parameters(model).values()])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("thread", CHECKPOINTING)
def test_checkpointing_that_stops_the_gradient_is_named(thread: str) -> None:
    model, x = models.llama().train(), models.ids()
    lorank.adapt(model, LoRA(), ["q_proj", "v_proj"])
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()  # transformers 5 enables it by itself, earlier ones did not
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        assert not model(x, labels=x).loss.requires_grad
    with pytest.raises(AdapterError, match=r"reentrant gradient checkpointing.*use_reentrant=False"):
        lorank.check(model)


def test_opacus_820_hooks_do_not_come_between_an_adapter_and_its_gradient() -> None:
    model, x = models.llama(), models.ids()
    layer = model.model.layers[1].self_attn.q_proj
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda m, args, y: seen.update(output=y))
    layer.register_full_backward_hook(lambda m, gi, go: seen.update(gradient=go[0]))
    lorank.adapt(model, LoRA(), ["q_proj"])
    models.disturb(model)
    backward(model, x)
    assert lorank.check(model) == []
    adapted = seen["output"]  # a hook from before `adapt` sees the adapted output
    with lorank.merged(model):
        model(x)
    torch.testing.assert_close(seen["output"], adapted, rtol=1e-5, atol=1e-5)
    assert seen["gradient"].any()


def test_unsloth_9331_embedding_and_head_are_adapted_when_named() -> None:
    model, x = models.llama(), models.ids()
    plan = lorank.adapt(model, LoRA(rank=2), ["embed_tokens", "lm_head"])
    assert plan.layers == ["model.embed_tokens", "lm_head"]
    models.disturb(model)
    backward(model, x)
    remarks = lorank.check(model)
    unseen = models.VOCABULARY - len(x[:, :-1].unique())  # no loss follows on the last one
    assert remarks == [f"model.embed_tokens: {unseen} of {models.VOCABULARY} tokens got no gradient"]
