"""Runs on a base with values of its configuration changed: whoever loads what they trained changes them too."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from lorank import AdapterError
from lorank.runs.loading import load_adapted

from ..cli.running import refused, run, run_json
from . import cases

EPSILON = {"rms_norm_eps": 0.5}


@pytest.fixture
def trained(llama: Path, tmp_path: Path) -> Path:
    """Return a finished run on a base with another epsilon, beside the data that it was scored on."""
    data, held = cases.completions(tmp_path / "d.jsonl"), cases.completions(tmp_path / "h.jsonl", 9, offset=50)
    wanted = cases.recipe(llama, data, tmp_path / "run", eval_data=str(held), model_options=EPSILON)
    cases.finish(cases.begin(wanted))
    return tmp_path / "run"


def test_an_adapter_is_scored_on_the_base_that_it_was_trained_on(trained: Path) -> None:
    (scores,) = run_json("eval", "--adapter", trained, "--data", trained.parent / "h.jsonl")["scores"]
    best = json.loads((trained / "run.json").read_text())["best"]
    assert scores["loss"] == pytest.approx(best["loss"], abs=1e-5)


def test_adapters_of_different_bases_are_not_loaded_together(trained: Path, llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    for name, options in (("plain", {}), ("dropped", {"attention_dropout": 0.1, **EPSILON})):
        cases.finish(cases.begin(cases.recipe(llama, data, tmp_path / name, steps=1, model_options=options)))
    with pytest.raises(AdapterError, match=r"'plain' was trained on a base with \{\} in its configuration, the first"):
        load_adapted(None, [f"run={trained}", f"plain={tmp_path / 'plain'}"])
    loaded = load_adapted(None, [f"run={trained}", f"dropped={tmp_path / 'dropped'}"])  # at inference all the same
    assert loaded.model.config.rms_norm_eps == 0.5


def test_a_merged_checkpoint_has_the_changed_values(trained: Path, tmp_path: Path) -> None:
    words = ["merge", "--adapter", trained, "--out", tmp_path / "merged"]
    refused("with {'rms_norm_eps': 0.5} in its configuration; --in-memory merges it", *words)
    assert not (tmp_path / "merged").exists()
    run(*words, "--in-memory")
    assert AutoConfig.from_pretrained(tmp_path / "merged").rms_norm_eps == 0.5


def test_a_run_that_made_it_worse_says_so(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    worse = cases.begin(cases.recipe(llama, data, tmp_path / "run", learning_rate=1000.0, warmup=0, clip=None))
    best = cases.finish(worse).best
    first = cases.metrics(tmp_path / "run")[0]["eval_loss"]
    assert best["loss"] > first
    assert f"training made it worse: loss was {first:.4f} before it, and is {best['loss']:.4f}" in worse.remarks[-1]
