"""The memory that is counted without computing is the memory that a real step takes."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank import LoRA
from lorank.accounting import adapter_bytes, readable, training_memory
from lorank.models import recompute_activations

from . import models

ROWS, COLUMNS = 3, 24
BUILD: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "llama": (models.llama, []),
    "gpt2": (models.gpt2, []),
    "bert": (models.bert, ["classifier"]),
    "roberta": (models.roberta, ["classifier"]),
}


def adapted(kind: str, device: str, **spec: Any) -> Any:
    build, heads = BUILD[kind]
    with torch.device(device):
        model = build()
    lorank.adapt(model, LoRA(rank=4, **spec), "all-linear", train_also=heads)
    return model.train()


def batch(device: str, columns: int = COLUMNS) -> dict[str, Tensor]:
    """Return a batch; its mask has the four dimensions that transformers takes as they are."""
    mask = torch.ones(ROWS, 1, columns, columns).tril()
    return {"input_ids": models.ids(ROWS, columns).to(device), "attention_mask": mask.to(device)}


def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.float().logsumexp(dim=-1).sum()


def saved(model: Any, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd really holds after a forward pass, without those of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", BUILD)
def test_activations_are_those_that_a_real_forward_keeps(kind: str, dropout: float, recomputed: bool) -> None:
    """To the byte: the same operations run in both, the fused attention of LLaMA among them."""
    found = []
    for device in ("meta", "cpu"):
        model, inputs = adapted(kind, device, dropout=dropout), batch(device)
        if recomputed:
            recompute_activations(model)
        found.append(training_memory(model, partial(loss, model, inputs)))
    assert found[0] == found[1]
    assert found[0].activations == saved(model, partial(loss, model, inputs)) > 0


def test_attention_is_counted_without_its_matrix() -> None:
    """Four times as many tokens keep about four times as much, not sixteen times, besides the mask."""
    model = adapted("llama", "meta")

    def activations(columns: int) -> int:
        inputs = batch("meta", columns)
        return training_memory(model, partial(loss, model, inputs)).activations - inputs["attention_mask"].nbytes

    assert activations(256) < 4.1 * activations(64)


def test_recomputed_activations_are_counted_less() -> None:
    model, inputs = adapted("llama", "meta"), batch("meta")
    before = training_memory(model, partial(loss, model, inputs))
    recompute_activations(model)
    assert training_memory(model, partial(loss, model, inputs)).activations < 0.6 * before.activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_moments_are_those_of_a_real_step(dtype: torch.dtype) -> None:
    model, inputs = adapted("bert", "cpu"), batch("cpu")
    if dtype != torch.float32:
        model.to(dtype)
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    counted = training_memory(model, partial(loss, model, inputs))
    parameters = lorank.adapter_parameters(model)
    optimiser = torch.optim.AdamW(parameters.values())
    loss(model, inputs).backward()
    optimiser.step()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    moments = sum(state[name].nbytes for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq"))
    steps = sum(state["step"].nbytes for state in optimiser.state.values())
    assert counted.gradients == gradients and counted.optimiser == moments
    assert steps == 4 * len(parameters)  # not counted: a number a parameter
    base = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert counted.adapter == sum(base.pop(id(parameter)) for parameter in parameters.values())
    assert counted.base == sum(base.values())
    assert adapter_bytes(model) == counted.adapter
    assert counted.total == sum(dataclasses.astuple(counted))


def test_nothing_is_computed_or_changed() -> None:
    model, inputs = adapted("llama", "meta"), batch("meta")
    training_memory(model, partial(loss, model, inputs))
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


def test_sizes_are_readable() -> None:
    sizes = (0, 999, 1000, 123_456, 1.5e9, 2e12)
    assert [readable(size) for size in sizes] == ["0 bytes", "999 bytes", "1.0 kB", "123 kB", "1.5 GB", "2.0 TB"]
