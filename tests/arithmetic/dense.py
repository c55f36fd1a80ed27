"""Adapters for the tests of arithmetic, and their updates as dense matrices in float64."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorank
from lorank.formats.content import Content, LayerUpdate, gather
from lorank.variants import LoRA, Spec

from .. import models


def experts() -> Any:
    """Return a model with stacks of matrices, one an expert."""
    settings: Any = models.SMALL_DECODER | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).eval()


def adapter(
    model: nn.Module, targets: Any, spec: Spec | None = None, name: str = "default", seed: int = 1, **options: Any
) -> Content:
    """Put an adapter with random values on a model, and return what there is to save of it."""
    torch.manual_seed(seed)
    lorank.adapt(model, spec or LoRA(rank=4, alpha=6), targets, name, **options)
    models.disturb(model, name)
    return gather(model, name)


def content(pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> Content:
    """Return an adapter with these factors, {layer: (A, B)}."""
    updates = {}
    for layer, (A, B) in pairs.items():
        rank = A.shape[-2]
        updates[layer] = LayerUpdate(LoRA(rank=rank, alpha=scale * rank), {"weight": {"A": A, "B": B}})
    return Content(next(iter(updates.values())).spec, updates)


def random_content(shapes: Mapping[str, Sequence[int]], rank: int, seed: int, scale: float = 1.0) -> Content:
    """Return an adapter with random factors in float64, {layer: (out, in)}."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return content({layer: (random(rank, in_), random(out, rank)) for layer, (out, in_) in shapes.items()}, scale)


def deltas(adapter: Content) -> dict[str, Tensor]:
    """Return ΔW of every matrix by its label."""
    found = {}
    for layer, update in adapter.updates.items():
        for part in update.tensors:
            A, B = update.pair(part)
            label = layer if part == "weight" else f"{layer}[{part}]"
            found[label] = update.spec_of(part).scale * (B.double() @ A.double())
    return found


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> bool:
    """Tell whether updates are equal up to a share of the largest number."""
    assert found.keys() == expected.keys()
    size = max(float(W.abs().max()) for W in expected.values()) or 1.0
    return all(float((found[label] - W).abs().max()) <= tolerance * size for label, W in expected.items())


def weighted(*summands: tuple[Content, float]) -> dict[str, Tensor]:
    """Return the weighted sum of updates, by label."""
    total: dict[str, Tensor] = {}
    for adapter, weight in summands:
        for label, W in deltas(adapter).items():
            total[label] = total.get(label, torch.zeros_like(W)) + weight * W
    return total


def nearest(W: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the best approximation of a rank by a plain SVD, and its relative error."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    error = float(S[rank:].norm() / S.norm())
    return U[:, :rank] * S[:rank] @ Vh[:rank], error


def all_train(adapter: Content) -> bool:
    """Tell whether no direction has zeros both in A and in B: of these neither would ever get a gradient."""
    pairs = [update.pair(part) for update in adapter.updates.values() for part in update.tensors]
    return all(bool((A.any(dim=-1) | B.any(dim=-2)).all()) for A, B in pairs)
