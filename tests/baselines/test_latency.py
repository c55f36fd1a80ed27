"""No added latency by construction (paper, section 4.1): a merged model is the base's own modules and operations."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorank
from lorank import LoRA
from lorank.baselines import AdapterH, BitFit, TopK

from .. import models
from .cases import ARCHITECTURES


class Operations(TorchDispatchMode):
    """Notes every operation that PyTorch runs, with the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), [tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def operations(model: Any, ids: torch.Tensor) -> list[Any]:
    found = Operations()
    with torch.no_grad(), found:
        model(ids)
    return found.seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", [LoRA(rank=4), BitFit(), TopK(1)], ids=["lora", "bitfit", "top-k"])
def test_a_merged_model_runs_the_operations_of_its_base(architecture: str, spec: Any) -> None:
    model, ids = ARCHITECTURES[architecture](), models.ids()
    if architecture == "llama" and isinstance(spec, BitFit):
        pytest.skip("LLaMA has no biases")
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = operations(model, ids)
    lorank.adapt(model, spec, "attention" if isinstance(spec, LoRA) else None)
    models.disturb(model)
    if not isinstance(spec, TopK):
        assert len(operations(model, ids)) > len(before)
    lorank.merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == shapes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert operations(model, ids) == before


def test_an_adapter_runs_operations_of_its_own() -> None:
    model, ids = models.gpt2(), models.ids()
    before = operations(model, ids)
    lorank.adapt(model, AdapterH(size=4))
    found = operations(model, ids)
    assert len(found) >= len(before) + 2 * 2 * 4  # in each of two blocks twice: two products, an activation, a sum
