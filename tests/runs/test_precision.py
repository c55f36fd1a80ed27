"""Runs in mixed precision: float32 weights, products in bfloat16."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lorank.runs.finished import load_result

from . import cases

CLASSIFIERS = ["lora", "dora", "full", "bitfit", "top-k", "adapter-h", "prefix-embedding", "prefix-layer"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, "bert") for method in CLASSIFIERS] + [(method, "llama") for method in ("lora", "full", "prefix-layer")],
)
def test_float32_weights_train_by_products_in_bfloat16(
    method: str, kind: str, llama: Path, bert: Path, tmp_path: Path
) -> None:
    text = kind == "llama"
    data = cases.completions(tmp_path / "d.jsonl") if text else cases.sentiments(tmp_path / "d.tsv")
    products: dict[str, set[torch.dtype]] = {"float32": set(), "mixed": set()}
    values, losses = {}, {}
    for dtype, found in products.items():
        rank = {} if method in ("lora", "dora") else {"rank": None, "alpha": None}
        changes = {"dtype": dtype, "method": method, "dropout": 0.0, "learning_rate": 1e-3} | rank
        if method == "prefix-embedding":
            changes["method_options"] = {"prefix": 4, "infix": 2}
        run = cases.begin(cases.recipe(llama if text else bert, data, tmp_path / dtype, **changes))
        assert {parameter.dtype for parameter in run.prepared.model.parameters()} == {torch.float32}
        for module in run.prepared.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(_note, found))
        cases.finish(run)
        assert run.recipe.dtype == dtype and not torch.is_autocast_enabled("cpu")
        values[dtype], losses[dtype] = (
            dict(run.prepared.subject.parameters()),
            cases.metrics(run.folder)[-1]["eval_loss"],
        )
        load_result(run.recipe, run.folder)  # raises for a dtype it does not know
    assert products == {"float32": {torch.float32}, "mixed": {torch.bfloat16}}
    assert losses["mixed"] == pytest.approx(losses["float32"], rel=0.02)
    assert any(not torch.equal(value, values["float32"][name]) for name, value in values["mixed"].items())


def _note(found: set[torch.dtype], module: nn.Module, args: object, output: torch.Tensor) -> None:
    found.add(output.dtype)


def test_a_failed_forward_pass_ends_mixed_precision(llama: Path, tmp_path: Path) -> None:
    run = cases.begin(cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), tmp_path / "run", dtype="mixed"))
    with pytest.raises(IndexError):
        run.prepared.model(input_ids=torch.tensor([[10**6]]))
    assert not torch.is_autocast_enabled("cpu")
