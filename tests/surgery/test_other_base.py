"""merge knows the base that an adapter was trained on."""

import copy

import pytest
import torch

import lorank
from lorank import AdapterError, AdapterWarning, LoRA

from ..models import Plain, disturb, ids


def trained() -> Plain:
    model = Plain().eval()
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    disturb(model)
    return model


def test_another_base_under_a_trained_adapter_is_refused_and_can_be_allowed() -> None:
    model = trained()
    model.load_state_dict(Plain().state_dict())
    for action in (lorank.merge, lambda m: lorank.merged(m).__enter__()):
        with pytest.raises(
            AdapterError, match=r"trained on, in 4 of 4 .*allow_other_base=True to merge it all the same"
        ):
            action(model)
    y = model(ids())
    with pytest.warns(AdapterWarning, match=r"another base .*other weights.*times its update"):
        report = lorank.merge(model, allow_other_base=True)
    torch.testing.assert_close(model(ids()).shape, y.shape)
    assert "The merged model is not the one that was trained" in str(report)


def test_a_base_that_comes_before_training_is_the_adapters_own() -> None:
    model = Plain()
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    model.load_state_dict(Plain().state_dict())
    disturb(model)
    lorank.merge(model)


def test_a_checkpoint_that_brings_base_and_adapter_is_whole() -> None:
    model, fresh = trained(), Plain()
    lorank.adapt(fresh, LoRA(rank=2), "all-linear")
    disturb(fresh)
    fresh.load_state_dict(model.state_dict())
    lorank.merge(fresh)


def test_a_base_in_another_dtype_is_the_same() -> None:
    model = trained().to(torch.bfloat16)
    lorank.merge(model)
    model = trained().to(torch.bfloat16).float()
    lorank.merge(model)


def test_adapters_may_be_merged_one_after_the_other() -> None:
    model = trained()
    lorank.adapt(model, LoRA(rank=2), "all-linear", name="second")
    disturb(model)
    lorank.activate(model, "default", "second")
    x = ids()
    y = model(x)
    lorank.merge(model, "default")
    lorank.merge(model, "second")
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_copies_keep_what_they_know() -> None:
    model = copy.deepcopy(trained())
    model.load_state_dict(Plain().state_dict())
    with pytest.raises(AdapterError, match="allow_other_base"):
        lorank.merge(model)
