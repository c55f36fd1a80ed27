"""scaled and negate: ΔW times a number, exactly; what is no update is kept, dropped, or a reason to stop."""

from typing import Any

import pytest
import torch

import lorank
from lorank import AdapterError, arithmetic
from lorank.variants import LoHa, LoRA, PiSSA

from .. import models
from .dense import adapter, close, deltas, random_content


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.3, -0.01])
@pytest.mark.parametrize("spec", [LoRA(rank=3, alpha=7, rank_stabilised=True), LoHa(rank=2), PiSSA(rank=2)], ids=str)
def test_every_update_is_multiplied(spec: Any, factor: float) -> None:
    a = adapter(models.llama(), ["q_proj", "down_proj"], spec)
    made = arithmetic.scaled(a, factor)
    assert close(deltas(made), {label: factor * W for label, W in deltas(a).items()}, 1e-6)
    assert all(update.fingerprints for update in made.updates.values())


def test_the_numbers_of_lora_stay_and_alpha_changes() -> None:
    a = adapter(models.gpt2(), ["c_attn[q,v]"], LoRA(rank=3, alpha=7, rank_stabilised=True, dropout=0.1))
    for factor in (0.5, -0.5):
        made = arithmetic.scaled(a, factor)
        for layer, update in made.updates.items():
            assert update.spec == LoRA(rank=3, alpha=3.5, rank_stabilised=True, dropout=0.1)
            for part, tensors in update.tensors.items():
                before = a.updates[layer].tensors[part]
                assert torch.equal(tensors["A"], before["A"]) and torch.equal(tensors["B"].abs(), before["B"].abs())
    twice = arithmetic.negate(arithmetic.negate(a))
    assert twice.updates.keys() == a.updates.keys()
    assert close(deltas(twice), deltas(a), 0) and twice.spec == a.spec


def test_values_are_no_updates() -> None:
    model = models.bert()
    a = adapter(model, ["query"], train_also=["classifier"], bias="adapted")
    with pytest.raises(AdapterError, match=r"classifier is trained whole.*\n.*bias of .*query.* is trained: values"):
        arithmetic.negate(a)
    kept = arithmetic.negate(a, whole="keep")
    assert torch.equal(kept.copies["classifier"]["weight"], a.copies["classifier"]["weight"])
    assert kept.biases.keys() == a.biases.keys() and kept.bias == "adapted"
    dropped = arithmetic.negate(a, whole="drop")
    assert not dropped.copies and not dropped.biases and dropped.bias == "none" and a.copies
    assert close(deltas(kept), {label: -W for label, W in deltas(a).items()}, 0)


@pytest.mark.parametrize("factor", [0, float("inf"), True, "2"])
def test_wrong_factors(factor: Any) -> None:
    with pytest.raises(AdapterError, match="the factor is"):
        arithmetic.scaled(random_content({"x": (4, 4)}, 2, 1), factor)


def test_methods_without_a_low_rank_form_are_named() -> None:
    a = adapter(models.llama(), ["q_proj"], lorank.DoRA(rank=2))
    with pytest.raises(AdapterError, match=r"cannot scale:\n  model\.layers\.0\.self_attn\.q_proj: DoRA"):
        arithmetic.scaled(a, 2)
