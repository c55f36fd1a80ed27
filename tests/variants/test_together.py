"""Methods beside what else an adapter trains: ties, biases, rows of tokens, copies, other ranks for some layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank import AdapterError, DoRA, LoRA

from .. import models


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(10, 6), nn.Embedding(10, 6)
        self.b.weight = self.a.weight
        self.out = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(ids) + 2 * self.b(ids))


def test_dora_is_given_the_output_without_the_rows_that_are_trained_beside_it(tmp_path: Path) -> None:
    base, ids = Shared(), torch.arange(10)[None]
    model = copy.deepcopy(base)
    lorank.adapt(model, DoRA(rank=2), ["a"], tie=True, train_tokens={"a": [1, 3]})
    models.disturb(model, size=0.5)
    y = model(ids)
    lorank.save(model, tmp_path)
    with lorank.merged(model):
        torch.testing.assert_close(model(ids), y, rtol=1e-5, atol=1e-5)
    lorank.load(base, tmp_path)
    torch.testing.assert_close(base(ids), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["vera", "adalora", "loha", "lokr"])
def test_rows_of_tokens_are_saved_beside_every_method(method: str, tmp_path: Path) -> None:
    base: Any = models.llama(tie_word_embeddings=False)
    model = copy.deepcopy(base)
    options: dict[str, Any] = {"target_rank": 2} if method == "adalora" else {}
    spec = lorank.variants.METHODS[method](rank=3, **options)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    lorank.adapt(model, spec, ["q_proj"], train_tokens={"embed_tokens": [1, 3]})
    models.disturb(model)
    x = models.ids()
    lorank.save(model, tmp_path)
    lorank.load(base, tmp_path)
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_dora_is_not_beside_a_copy_of_its_layer() -> None:
    model = models.sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lorank.adapt(model, DoRA(rank=2), ["0", "1"], name="d")
    lorank.adapt(model, LoRA(rank=2), ["0"], train_also=["1"], name="c")
    with pytest.raises(AdapterError, match="of which 'c' runs a copy"):
        lorank.activate(model, "d", "c")


def test_a_layer_can_start_with_fewer_ranks_than_the_target() -> None:
    model = models.sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = lorank.adapt(model, lorank.AdaLoRA(rank=4, target_rank=2), ["0", "1"], ranks={"0": 1})
    assert [place.spec.rank for place in plan.places] == [1, 4]
    assert lorank.RankBudget(model, 10).target == 1 + 2


def test_an_alpha_for_a_method_without_one_is_refused() -> None:
    model = models.sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="0: VeRA has no alpha"):
        lorank.adapt(model, lorank.VeRA(rank=4), "0", alphas={"0": 2})


def test_the_size_of_a_file_counts_what_is_stored_beside_the_trained() -> None:
    from lorank.accounting import adapter_bytes

    model = models.sequential(nn.Linear(8, 8))
    lorank.adapt(model, lorank.PiSSA(rank=2), "0")
    assert adapter_bytes(model) == 2 * sum(4 * p.numel() for p in lorank.adapter_parameters(model).values())
