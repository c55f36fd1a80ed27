"""A step on the meta device attends as a real one does, though nobody can look there whether a batch has padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorank
from lorank.accounting import training_costs
from lorank.data import PlainText, Text
from lorank.runs.prepare import step_costs
from lorank.tasks import CausalLM, Classification, Task

from .. import models

ROWS, COLUMNS = 3, 24
BUILD: dict[str, Callable[..., Any]] = {
    "llama": models.llama,  # groups of heads, which PyTorch's attention takes as they are when there is no mask
    "gpt2": models.gpt2,
    "roberta": models.roberta,
    "deberta": models.deberta,  # attention of its own, with a mask always
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", BUILD)
def test_padding_takes_what_it_takes(kind: str, padded: bool) -> None:
    task: Task = CausalLM(None, COLUMNS, PlainText(Text("text")))
    ids = torch.randint(3, models.VOCABULARY, (ROWS, COLUMNS))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("roberta", "deberta"):
        task = Classification(None, COLUMNS, Text("text"), None, "label", labels=["a", "b", "c"])
        batch["labels"] = torch.zeros(ROWS, dtype=torch.long)
    if padded:
        batch["attention_mask"][0, COLUMNS // 2 :] = 0

    with torch.device("meta"):
        empty = BUILD[kind]()
    real = BUILD[kind]().train()
    real.config.pad_token_id = 0
    for model in (empty, real):
        lorank.adapt(model, lorank.LoRA(rank=2), "attention")
    found, measured = step_costs(empty, task, batch), training_costs(real, lambda: task.loss(real, batch))
    assert not isinstance(found, str), found
    assert (found.forward_flops, found.step_flops) == (measured.forward_flops, measured.step_flops)
    assert found.memory.total == pytest.approx(measured.memory.total, rel=0.01)
    assert found.kept == pytest.approx(measured.kept, rel=0.02)


def test_a_mask_is_kept_by_every_layer() -> None:
    task = CausalLM(None, COLUMNS, PlainText(Text("text")))
    ids = torch.ones(ROWS, COLUMNS, dtype=torch.long)
    kept = []
    for last in (1, 0):
        model = models.gpt2(attn_pdrop=0.0).to("meta")
        mask = torch.ones_like(ids)
        mask[0, -1] = last
        costs = step_costs(model, task, {"input_ids": ids, "labels": ids, "attention_mask": mask})
        assert not isinstance(costs, str)
        kept.append(costs.kept)
    assert kept[1] - kept[0] == pytest.approx(2 * ROWS * COLUMNS * COLUMNS * 4, rel=0.2)
