"""Every method in a run: from the recipe to an adapter that loads again, and through an interruption."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import lorank
from lorank import AdapterError
from lorank.formats import read
from lorank.runs import recipe
from lorank.runs.loading import load_adapted
from lorank.variants import METHODS

from . import cases

OPTIONS = {
    "adalora": {"method_options": {"target_rank": 2, "warmup": 0.0, "settle": 0.2}, "rank": 4},
    "eva": {"method_options": {"rho": 1.5}, "calibrate": 3},
    "lora-ga": {"calibrate": 3},
    "vera": {"rank": 16, "alpha": None, "learning_rate": 5e-2},
    "pissa": {"method_options": {"iterations": 4}},
    "lokr": {"method_options": {"factor": 4}},
}


def test_a_recipe_knows_every_method() -> None:
    assert sorted(recipe.METHODS) == sorted(METHODS)


@pytest.mark.parametrize("method", recipe.METHODS)
def test_a_method_trains_and_its_adapter_loads_again(method: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"method": method, "steps": 6, **OPTIONS.get(method, {})}
    run = cases.begin(cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), folder, **settings))
    end = cases.finish(run)
    assert end.done and end.best["step"] > 0
    losses = [record["eval_loss"] for record in cases.metrics(folder) if "eval_loss" in record]
    assert losses[-1] < losses[0]
    assert read(folder / "adapter").spec.variant == method
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["method"] == method
    plan = run.prepared.plan
    trained = sum(p.numel() for p in lorank.adapter_parameters(run.prepared.model).values())
    assert json.loads((folder / "run.json").read_text())["trainable_parameters"] == plan.trainable_parameters == trained
    loaded = load_adapted(None, [f"default={folder}"])
    found = {key: p.detach() for key, p in lorank.adapter_parameters(loaded.model, "default").items()}
    assert cases.same(found, cases.values(run))


@pytest.mark.parametrize("method", ["adalora", "eva", "lora-ga", "pissa", "dora"])
def test_an_interrupted_run_ends_with_the_same_bits(method: str, llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    settings = {"method": method, "steps": 6, **OPTIONS.get(method, {})}
    whole = cases.begin(cases.recipe(llama, data, tmp_path / "whole", **settings))
    cases.finish(whole)
    cases.stop_at(cases.begin(cases.recipe(llama, data, tmp_path / "parts", **settings)), 3)
    torch.manual_seed(5)
    second = cases.resume(tmp_path / "parts")
    assert second.state.step == 3
    cases.finish(second)
    assert cases.same(cases.values(whole), cases.values(second))


def test_ranks_are_dropped_to_the_budget(llama: Path, tmp_path: Path) -> None:
    settings = {"method": "adalora", "steps": 6, **OPTIONS["adalora"]}
    run = cases.begin(cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), tmp_path / "run", **settings))
    cases.finish(run)
    left = [int(p.count_nonzero()) for k, p in lorank.adapter_parameters(run.prepared.model).items() if k.endswith("E")]
    assert sum(left) == 2 * len(left)


def test_b_learns_faster_with_lora_plus(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    found = {}
    for ratio in (1.0, 8.0):
        run = cases.begin(
            cases.recipe(llama, data, tmp_path / str(ratio), steps=1, warmup=0, lora_plus=ratio, clip=None)
        )
        before = cases.values(run)
        cases.finish(run)
        after = cases.values(run)
        moved = {key: (after[key] - before[key]).abs().max() for key in after}
        found[ratio] = {end: torch.stack([m for key, m in moved.items() if key.endswith(end)]).max() for end in "AB"}
    torch.testing.assert_close(found[8.0]["B"], 8 * found[1.0]["B"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[8.0]["A"], found[1.0]["A"])


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"method": "doro"}, "method is 'doro'; nearest: dora"),
        ({"method": "vera", "alpha": 4}, "vera has no alpha"),
        ({"method": "pissa", "init": "gaussian"}, "pissa has no init"),
        ({"method": "eva", "method_options": {"roh": 2}}, "eva has no option 'roh'; nearest: rho"),
        ({"method": "eva", "method_options": {"rho": 0.5}}, "rho is 0.5; it must be a finite number of at least 1"),
        ({"method": "lora", "method_options": {"gamma": 1}}, "lora has no option 'gamma'; it has none"),
        ({"lora_plus": 0}, "lora_plus is 0.0; it must be above 0"),
    ],
)
def test_what_a_method_does_not_have_is_refused(settings: dict, says: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=says):
        cases.begin(cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
