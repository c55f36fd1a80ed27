"""lorank train: recipes and flags, what is shown before, and what comes out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import lorank

from .. import checkpoints
from .running import records_in, refused, run, run_json, write_records

PAIRS = [{"prompt": f"what is {n}?", "completion": f" a number {n}"} for n in range(40)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.causal(tmp_path / "base")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_records(tmp_path / "pairs.jsonl", PAIRS)


def facts_of(*words: object) -> dict[str, Any]:
    """Return what a dry run would do."""
    return run_json("train", *words, "--dry-run")


def test_flags_train_an_adapter_that_loads(base: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--model", base, "--data", pairs, "--rank", 3, "--targets", "q_proj,v_proj", "--learning-rate", 0.01]
    options = ["--steps", 12, "--eval-every", 4, "--batch-size", 4, "--output", tmp_path / "run", "--seed", 5]
    facts = run_json("train", *words, *options)
    assert facts["done"] and facts["step"] == 12 and facts["run"] == str(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(base)
    plan = lorank.load(model, facts["adapter"])
    assert {place.name.rpartition(".")[2] for place in plan.places} == {"q_proj", "v_proj"} and plan.places[
        0
    ].spec.rank == 3
    metrics = records_in(tmp_path / "run" / "metrics.jsonl")
    scores = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    assert len(scores) == 4 and facts["best"]["loss"] == min(scores[1:]) < scores[0]
    assert Path(facts["plot"]).read_bytes().startswith(b"\x89PNG")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["rank"] == 3 and recipe["alpha"] == 6 and recipe["seed"] == 5 and recipe["task"] == "causal-lm"


def test_the_end_names_the_adapter_and_what_to_do_next(base: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--model", base, "--data", pairs, "--steps", 2, "--output", tmp_path / "run"]
    found = run("train", *words)
    lines = found.stdout.splitlines()
    assert lines[0].startswith("done in 0:0") and lines[0].endswith("loss.png")
    assert lines[1].startswith(f"adapter: {tmp_path / 'run' / 'adapter'}  (step ")
    assert f"lorank generate --adapter {tmp_path / 'run'}, or" in lines[2]
    assert "step 2/2" in found.stderr and "held out, step 2: loss " in found.stderr


def test_a_run_that_is_done_resumes_to_its_result(base: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--model", base, "--data", pairs, "--steps", 2, "--output", tmp_path / "run"]
    facts = run_json("train", *words)
    again = run_json("train", "--resume", tmp_path / "run")
    assert again["best"] == facts["best"] and again["done"]
    refused("is not empty; lorank train --resume", "train", *words)
    refused("takes no recipe and no other options", "train", "--resume", tmp_path / "run", "--rank", 2)
    refused("takes no recipe and no other options", "train", "--resume", tmp_path / "run", "rank=2")
    refused("there is no run in", "train", "--resume", tmp_path / "other")


def test_flags_go_before_words_and_words_before_the_recipe(base: Path, pairs: Path, tmp_path: Path) -> None:
    keys = {"model": str(base), "data": str(pairs), "rank": 2, "batch_size": 3, "steps": 7, "targets": ["q_proj"]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    found = facts_of(recipe)["recipe"]
    assert (found["rank"], found["batch_size"], found["steps"], found["targets"]) == (2, 3, 7, ["q_proj"])
    found = facts_of(recipe, "rank=4", "steps=8", "--rank", 5, "--targets", "k_proj,o_proj")["recipe"]
    assert (found["rank"], found["batch_size"], found["steps"], found["targets"]) == (5, 3, 8, ["k_proj", "o_proj"])


def test_words_alone_make_a_recipe(base: Path, pairs: Path) -> None:
    words = [f"model={base}", f"data={pairs}", "targets=q_proj,!*.0.*", "learning-rate=3e-4", "clip=none"]
    found = facts_of(*words, "ranks={q_proj: 3}", "prompt=Q: {prompt}\\nA:")
    recipe = found["recipe"]
    assert recipe["targets"] == ["q_proj", "!*.0.*"] and recipe["learning_rate"] == 3e-4 and recipe["clip"] is None
    assert recipe["prompt"] == "Q: {prompt}\nA:" and recipe["ranks"] == {"q_proj": 3}
    assert found["trainable_parameters"] == 3 * (32 + 32)


def test_a_dry_run_writes_nothing(base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if "__" not in path.name)
    found = facts_of("--model", base, "--data", pairs, "--output", tmp_path / "run", "--batch-size", 19)
    assert found["examples"] == 38 and found["held_out"] == 2 and found["first_batch"][0] == 19
    model = AutoModelForCausalLM.from_pretrained(base)
    plan = lorank.plan(model, lorank.LoRA(rank=8), "all-linear")
    assert found["trainable_parameters"] == plan.trainable_parameters
    assert found["base_parameters"] == plan.base_parameters
    assert found["memory"]["total"] > 4 * plan.base_parameters
    shown = run("train", "--model", base, "--data", pairs, "--dry-run").stdout
    assert "memory of a step" in shown and "nothing was trained or written" in shown
    assert sorted(path for path in tmp_path.rglob("*") if "__" not in path.name) == before


def test_the_preview_marks_what_is_trained(base: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--model", base, "--eval-share", 0, "--dry-run"]
    found = run("train", *words, "--data", pairs)
    assert re.search(r"example: what is (\d+)\?⟦ a number \1<\|end\|>⟧\n", found.stderr)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes [b]"}]
    chats = write_records(tmp_path / "chats.jsonl", [{"messages": messages}] * 3)
    assert "<|user|>\nhi<|end|>\n<|assistant|>\n⟦yes [b]<|end|>⟧" in run("train", *words, "--data", chats).stderr
    texts = write_records(tmp_path / "texts.jsonl", [{"text": "a [red] film"}] * 3)
    assert "example: ⟦a [red] film<|end|>⟧" in run("train", *words, "--data", texts).stderr


def test_a_classifier_is_trained_and_its_labels_kept(tmp_path: Path) -> None:
    base = checkpoints.encoder(tmp_path / "base")
    records = [{"sentence": f"a {word} film", "label": word} for word in ("good", "bad")] * 20
    data = write_records(tmp_path / "films.jsonl", records)
    words = ["--model", base, "--data", data, "--targets", "attention", "--steps", 30, "--learning-rate", 0.01]
    facts = run_json("train", *words, "--output", tmp_path / "run")
    assert facts["best"]["accuracy"] == 1.0
    account = lorank.formats.read(facts["adapter"])
    assert account.about["labels"] == ["bad", "good"] and account.about["text"] == "sentence"
    assert list(account.copies) == ["classifier"]
    found = run("train", *words, "--output", tmp_path / "other", "--dry-run")
    assert "a good film" in found.stderr and "  -> good" in found.stderr and "⟦" not in found.stderr


def test_what_cannot_be_trained_is_told(base: Path, pairs: Path, tmp_path: Path) -> None:
    refused("nothing to train on: give a recipe", "train")
    refused("data is missing", "train", "--model", base)
    refused("there is no recipe .*recpe.yaml", "train", tmp_path / "recpe.yaml")
    refused("there is no key 'rnak'.*rank", "train", f"model={base}", f"data={pairs}", "rnak=3")
    refused("is no key=value", "train", tmp_path / "x.yaml", "rank")
    refused(
        "(?s)schedule is 'lin'.*rank is 0", "train", "--model", base, "--data", pairs, "--rank", 0, "--schedule", "lin"
    )
    refused("q_prj.*q_proj", "train", "--model", base, "--data", pairs, "--targets", "q_prj")
    refused("there is no file", "train", "--model", base, "--data", tmp_path / "none.jsonl")
    refused("it is an adapter|no config.json", "train", "--model", tmp_path, "--data", pairs)
    other = write_records(tmp_path / "other.jsonl", [{"q": "a", "a": "b"}] * 4)
    refused("the data has the columns q, a; say which", "train", "--model", base, "--data", other)
    refused("device 'abacus' cannot be used", "train", "--model", base, "--data", pairs, "--device", "abacus")


def test_the_same_seed_trains_the_same_adapter(base: Path, pairs: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    words = ["train", "--model", base, "--data", pairs, "--steps", 3]
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        run(*words, "--output", tmp_path / name, "--seed", seed)
    one, two, three = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")
    )
    assert one == two != three
    assert json.loads((tmp_path / "one" / "run.json").read_text())["steps_done"] == 3
