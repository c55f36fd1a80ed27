"""What is counted without computing is what a real step takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lorank
from lorank import LoRA
from lorank.accounting import StepCosts, adapter_bytes, checkpoint_bytes, readable, training_costs
from lorank.models import recompute_activations

from .. import models

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


def costs_of(model: Any, where: str, columns: int = COLUMNS, **options: Any) -> StepCosts:
    return training_costs(model, partial(loss, model, batch(where, columns)), **options)


def saved(model: Any, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd really holds after a forward pass, without those of the model and its inputs."""
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
def test_a_step_without_numbers_allocates_and_computes_what_one_with_numbers_does(
    kind: str, dropout: float, recomputed: bool
) -> None:
    """To the byte and the operation: the same operations run in both, the fused attention of LLaMA among them."""
    found = []
    for device in ("meta", "cpu"):
        model = adapted(kind, device, dropout=dropout)
        if recomputed:
            recompute_activations(model)
        found.append(costs_of(model, device))
    assert found[0] == found[1]
    inputs = batch("cpu")
    held = saved(model, partial(loss, model, inputs))
    given = sum(tensor.nbytes for tensor in inputs.values())
    state = 6000 if recomputed else 0  # of the random numbers, for each checkpoint
    assert (
        0.97 * held <= found[0].kept <= held + given + state + 4
    )  # some of what was saved is freed before the pass ends


@pytest.mark.parametrize("kind", BUILD)
def test_operations_are_those_that_pytorch_counts(kind: str) -> None:
    model, inputs = adapted(kind, "cpu"), batch("cpu")
    inputs[
        "attention_mask"
    ].requires_grad_()  # then attention is the plain formula, all of which PyTorch's counter knows
    with FlopCounterMode(display=False) as counter:
        output = loss(model, inputs)
        forward = counter.get_total_flops()
        output.backward()
    found = training_costs(model, partial(loss, model, inputs))
    assert found.forward_flops == forward > 0 and found.step_flops == counter.get_total_flops()


def test_fused_attention_computes_as_much_as_the_plain_formula_and_half_as_much_again_backward() -> None:
    """Its backward pass computes the matrix a second time: five products where the plain formula has four."""
    model, inputs = adapted("llama", "meta"), batch("meta")
    plain = {**inputs, "attention_mask": inputs["attention_mask"].clone().requires_grad_()}
    fused, known = (training_costs(model, partial(loss, model, given)) for given in (inputs, plain))
    assert fused.forward_flops == known.forward_flops
    config = model.config
    product = 2 * ROWS * COLUMNS * COLUMNS * config.hidden_size * config.num_hidden_layers
    assert fused.step_flops - known.step_flops == product


def test_a_frozen_base_saves_the_gradients_of_its_weights() -> None:
    """Backward through a matrix is two products, of which one is the weight's gradient; LoRA adds few percent."""
    with torch.device("meta"):
        whole = models.llama(hidden_size=256, intermediate_size=512).train()
    adapter = models.llama(hidden_size=256, intermediate_size=512).to("meta")
    lorank.adapt(adapter, LoRA(rank=1), ["q_proj", "v_proj"])
    full, lora = costs_of(whole, "meta"), costs_of(adapter.train(), "meta")
    assert full.forward_flops < lora.forward_flops < 1.02 * full.forward_flops
    assert 2.9 < full.step_flops / full.forward_flops < 3.1
    assert 1.8 < lora.step_flops / lora.forward_flops < 2.1


def test_attention_is_counted_without_its_matrix() -> None:
    """Four times as many tokens keep about four times as much, not sixteen times."""
    model = adapted("llama", "meta")
    assert costs_of(model, "meta", 256).kept < 4.1 * costs_of(model, "meta", 64).kept


def test_a_gpu_keeps_no_matrix_of_attention_with_dropout_and_a_byte_for_dropped_numbers() -> None:
    with torch.device("meta"):
        model = models.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
        plain = models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    cpu, gpu = (costs_of(model, "meta", 40, device=device) for device in ("cpu", "cuda"))
    without = costs_of(plain, "meta", 40)
    layers, heads, width = 2, model.config.num_attention_heads, model.config.hidden_size
    numbers = ROWS * 40 * width
    places = 2 * layers + 1  # behind attention and MLP of each layer, and behind the embedding
    assert places * numbers <= gpu.kept - without.kept <= places * (1 + 4) * numbers
    assert cpu.kept - gpu.kept > layers * ROWS * heads * 40 * 40 * 4


def test_recomputed_activations_are_counted_less() -> None:
    model = adapted("llama", "meta")
    before = costs_of(model, "meta")
    recompute_activations(model)
    after = costs_of(model, "meta")
    assert after.kept < 0.6 * before.kept
    assert after.memory.activations < 0.8 * before.memory.activations
    assert after.step_flops > 1.2 * before.step_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_moments_are_those_of_a_real_step(dtype: torch.dtype) -> None:
    model, inputs = adapted("bert", "cpu"), batch("cpu")
    if dtype != torch.float32:
        model.to(dtype)
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    counted = training_costs(model, partial(loss, model, inputs)).memory
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
    assert adapter_bytes(model) == checkpoint_bytes(model) == counted.adapter


def test_a_model_without_an_adapter_is_trained_itself() -> None:
    model = models.gpt2().to("meta").train()
    memory = costs_of(model, "meta").memory
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])  # the tied head once
    assert (memory.base, memory.adapter, memory.gradients, memory.optimiser) == (size, 0, size, 2 * size)
    assert checkpoint_bytes(model) == size
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad_(False)
    block = sum(parameter.nbytes for parameter in model.transformer.h[0].parameters())
    assert costs_of(model, "meta").memory.gradients == size - block


def test_accumulated_gradients_are_there_from_the_start() -> None:
    """So the peak, which lies at the end of the forward pass where few numbers are trained, is higher by them."""
    model = adapted("llama", "meta")
    once, several = costs_of(model, "meta").memory, costs_of(model, "meta", accumulate=True).memory
    assert 0.5 * once.gradients < several.total - once.total <= once.gradients
    assert several.gradients == once.gradients


def test_nothing_is_computed_or_changed() -> None:
    model = adapted("llama", "meta")
    costs_of(model, "meta")
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"
    assert "built-in" in repr(torch.nn.functional.scaled_dot_product_attention)


def test_sizes_are_readable() -> None:
    sizes = (0, 999, 1000, 123_456, 1.5e9, 2e12)
    assert [readable(size) for size in sizes] == ["0 bytes", "999 bytes", "1.0 kB", "123 kB", "1.5 GB", "2.0 TB"]
