"""lorank compare: several methods on the same data, what they reach and what they cost."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from lorank import AdapterError, RankBudget
from lorank.comparison.arms import arms_of
from lorank.comparison.probe import measure, overhead
from lorank.comparison.report import margin_of
from lorank.runs.recipe import Recipe

from .. import models
from ..cli.running import refused, run, run_json
from ..runs import cases

METHODS = "lora,full,adapter-h{size: 4}"


def recipe_in(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    """Write a recipe of few steps."""
    keys = {"model": str(model), "data": str(data), "steps": 4, "batch_size": 4, "eval_every": 2, "device": "cpu"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**keys, **changes}))
    return path


@pytest.fixture(scope="module")
def compared(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a finished comparison of three methods at two rates with two seeds, and the words of its command."""
    folder = tmp_path_factory.mktemp("compared")
    data = cases.sentiments(folder / "train.tsv", 40)
    held = cases.sentiments(folder / "dev.tsv", 12)
    recipe = recipe_in(folder, bert, data, eval_data=str(held), targets=["query", "value"], rank=2)
    words = ["compare", recipe, "--methods", METHODS, "--rates", "0.5,2", "--seeds", "2", "--steps", "2"]
    words += ["--passes", "3", "--output", folder / "out", "--tune-share", "0.25"]
    return {"folder": folder / "out", "words": words, "facts": run_json(*words)}


def test_a_comparison_says_what_each_method_reaches_and_costs(compared: dict[str, Any]) -> None:
    facts, folder = compared["facts"], compared["folder"]
    assert json.loads((folder / "results.json").read_text()) == facts and facts["score"] == "accuracy"
    lines = {line["method"]: line for line in facts["methods"]}
    assert list(lines) == ["lora", "full", "adapter-h{size: 4}"]
    for line in lines.values():
        assert line["seeds"] == [0, 1] and len(line["scores"]["accuracy"]) == len(line["last"]) == 2
        assert all(0 <= value <= 1 for value in line["scores"]["accuracy"])
        assert len(line["tuned"]) == 2 and line["step"] > 0 and line["latency"] > 0
        interval = line["intervals"]["accuracy"]
        assert interval["mean"] == pytest.approx(statistics.mean(line["scores"]["accuracy"]))
        kept = float(max(line["tuned"], key=lambda rate: line["tuned"][rate]))
        assert line["learning_rate"] == pytest.approx(kept, rel=1e-2)
    assert lines["full"]["trainable_parameters"] > 10 * lines["lora"]["trainable_parameters"]
    assert lines["full"]["bytes"] > 4 * lines["full"]["trainable_parameters"]
    assert lines["full"]["memory"] > 2**20
    table = (folder / "results.md").read_text().splitlines()
    assert len(table) == 5 and table[0].startswith("| method | accuracy | seeds | rate | trained")
    assert (folder / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("checkpoint.safetensors"))  # of runs that are finished


def test_rates_are_chosen_on_a_part_of_the_training_data(compared: dict[str, Any]) -> None:
    tuning = [json.loads(path.read_text()) for path in compared["folder"].glob("lora/tuning/*/run.json")]
    final = [json.loads(path.read_text()) for path in compared["folder"].glob("lora/final/*/run.json")]
    assert [facts["examples"] + facts["held_out"] for facts in tuning] == [40, 40]
    assert {facts["held_out"] for facts in tuning} == {10}
    assert [(facts["examples"], facts["held_out"]) for facts in final] == [(40, 12), (40, 12)]


def test_the_same_command_trains_nothing_twice(compared: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared["folder"].rglob("run.json")}
    assert len(before) == 12
    shown = run(*compared["words"])
    assert {path: path.stat().st_mtime_ns for path in compared["folder"].rglob("run.json")} == before
    assert "at inference, adapter-h{size: 4}: two bottlenecks more" in " ".join(shown.stdout.split())
    more = run_json(*[{"0.5,2": "0.5,2,4"}.get(word, word) for word in compared["words"]])  # rates may be added
    assert [len(line["tuned"]) for line in more["methods"]] == [3, 3, 3]
    refused("another batch_size", *compared["words"][:2], "batch_size=8", *compared["words"][2:])


def test_what_language_models_write_is_scored(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl", 24)
    recipe = recipe_in(tmp_path, llama, data, eval_share=0.25, rank=2, targets=["q_proj"])
    found = run_json(
        *("compare", recipe, "--methods", "top-k{blocks: 1}", "--seeds", "1", "--steps", "2", "--passes", "2"),
        *("--metrics", "bleu,rouge-l", "--test-data", data, "--test-limit", "5", "--max-new-tokens", "4"),
        *("--output", tmp_path / "out"),
    )
    for line in found["methods"]:
        assert list(line["scores"]) == ["bleu", "rouge-l", "loss"]
        assert line["intervals"]["bleu"]["margin"] is None
    outputs = (tmp_path / "out" / "top-k-blocks-1" / "final").glob("*/outputs.jsonl")
    assert len(next(outputs).read_text().splitlines()) == 5


def test_prompts_that_leave_no_room_are_told_before_anything_is_trained(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl", 24)
    recipe = recipe_in(tmp_path, llama, data, eval_share=0.25, rank=2, targets=["q_proj"])
    words = ["compare", recipe, "--seeds", "1", "--metrics", "bleu", "--output", tmp_path / "out"]
    words += ["--methods", "lora,lora+prefix-embedding{prefix: 20, infix: 10}"]
    refused("there is no file", *words, "--test-data", tmp_path / "none.jsonl")
    words += ["--test-data", data]
    most = json.loads((llama / "config.json").read_text())["max_position_embeddings"]
    refused(f"with {most} new ones that is more than the {most}", *words, "--max-new-tokens", most)
    left = most - 30
    refused(f"with {left} new ones and 30 special ones of the adapter that is more", *words, "--max-new-tokens", left)
    assert not (tmp_path / "out").exists()


def test_a_rate_that_is_too_high_is_the_worst_one_and_ends_nothing(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl", 24)
    held = cases.completions(tmp_path / "h.jsonl", 8, offset=100)
    keys = {"rank": 2, "targets": ["q_proj", "k_proj"], "learning_rate": 1e3, "warmup": 0}
    recipe = recipe_in(tmp_path, llama, data, eval_data=str(held), **keys)
    words = ["compare", recipe, "--methods", "lora", "--seeds", "1", "--steps", "2", "--passes", "2"]
    words += ["--output", tmp_path / "out"]
    found = run_json(*words, "--rates", "1e-5,9e5")
    (line,) = found["methods"]
    assert line["learning_rate"] == pytest.approx(1e-2)
    assert [value is None for value in line["tuned"].values()] == [False, True]
    assert "the gradient of step" in (tmp_path / "out/lora/tuning/rate-9e+08-seed-0/diverged.txt").read_text()
    assert run_json(*words, "--rates", "1e-5,9e5")["methods"][0]["scores"] == line["scores"]
    words[-1] = tmp_path / "other"
    refused("at no rate has a run a number for 'loss'", *words, "--rates", "8e5,9e5")


@pytest.mark.filterwarnings("ignore:lm_head shares its weight")
def test_what_cannot_be_merged_is_timed_as_it_is_and_one_step_is_enough(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl", 24)
    tied = tmp_path / "tied"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(tied)
    models.llama(tie_word_embeddings=True, vocab_size=len(tokenizer)).save_pretrained(tied)
    recipe = recipe_in(tmp_path, tied, data, eval_share=0.25, rank=4, steps=1, targets=["q_proj", "lm_head"])
    words = ["--methods", "lora,adalora{target_rank: 2}", "--seeds", "1", "--steps", "2", "--passes", "2"]
    refused("1 step is too few to drop ranks", "compare", recipe, *words, "--output", tmp_path / "out")
    words[1] = "lora"
    (line,) = run_json("compare", recipe, *words, "--output", tmp_path / "out")["methods"]
    assert line["inference"].startswith("not merged, which this adapter cannot be:") and line["step"] > 0


def test_a_timed_step_drops_ranks_as_a_trained_one_does(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    update = RankBudget.update
    monkeypatch.setattr(RankBudget, "update", lambda budget, index: seen.append(index) or update(budget, index))
    data = cases.completions(tmp_path / "d.jsonl", 24)
    recipe = cases.recipe(llama, data, tmp_path / "run", method="adalora", rank=4, method_options={"target_rank": 2})
    found = measure(recipe, 3, 2)
    assert seen == [1, 2, 3, 4] and len(found["step"]) == 3 and len(found["latency"]) == 2


def test_texts_are_of_the_held_out_data_where_no_other_is_given(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        cases.completions(folder / f"{split}.jsonl", 12, offset=100 * number)
    recipe = recipe_in(tmp_path, llama, folder, eval_data=str(folder), eval_limit=4, rank=2, targets=["q_proj"])
    words = ["--methods", "lora", "--seeds", "1", "--steps", "2", "--passes", "2", "--max-new-tokens", "2"]
    run("compare", recipe, *words, "--metrics", "rouge-l", "--output", tmp_path / "out")
    (outputs,) = (tmp_path / "out").glob("lora/final/*/outputs.jsonl")
    prompts = [json.loads(line)["prompt"] for line in outputs.read_text().splitlines()]
    words = ["fox", "lazy dog", "quick brown fox", "two and two"]
    assert prompts == [f"{100 + i} {word}?" for i, word in enumerate(words)]


def test_runs_are_not_taken_for_another_method_s(compared: dict[str, Any]) -> None:
    shared = Recipe(model="m", data="d")
    one, other = arms_of("lora{targets: [all-linear, down_proj]},lora{targets: [all-linear, '!down_proj']}", shared)
    assert one.folder != other.folder
    with pytest.raises(AdapterError, match="would have the same folder, lora-init_adapter-runs-a"):
        arms_of("lora{init_adapter: runs/a},lora{init_adapter: runs-a}", shared)
    settings = compared["folder"] / "comparison.json"
    before = settings.read_text()
    known = json.loads(before)
    known["methods"]["lora"] = {"method": "lora", "targets": ["key"]}
    settings.write_text(json.dumps(known))
    refused("a comparison with another method in lora;", *compared["words"])
    settings.write_text(before)


def test_an_arm_has_its_own_keys_and_not_another_method_s() -> None:
    shared = Recipe(model="m", data="d", rank=4, alpha=8.0, targets=["query"], learning_rate=1e-3, batch_size=3)
    (nested,) = arms_of("lora{ranks: {query: 16, value: 4}, targets: [query, value]}", shared)
    assert nested.recipe(shared).ranks == {"query": 16, "value": 4}
    lora, wide, bottleneck, both, full = arms_of(
        "lora, lora{rank: 16}, adapter-h{size: 8, learning_rate: 1e-4},lora+prefix-layer{prefix: 2}, full", shared
    )
    assert lora.recipe(shared) == shared
    assert wide.recipe(shared).rank == 16 and wide.recipe(shared).targets == ["query"]
    made = bottleneck.recipe(shared)
    assert (made.method, made.method_options, made.learning_rate) == ("adapter-h", {"size": 8}, 1e-4)
    assert (made.rank, made.alpha, made.targets, made.batch_size) == (None, None, ["all-linear"], 3)
    assert (both.recipe(shared).rank, both.recipe(shared).targets) == (4, ["query"])
    assert full.recipe(shared).learning_rate is None
    assert [arm.folder for arm in (wide, both)] == ["lora-rank-16", "lora+prefix-layer-prefix-2"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no method was named"),
        ("lora,lroa", "there is no method 'lroa'; nearest: lora"),
        ("lora,lora", "'lora' is named twice"),
        ("adapter-h{siz: 3}", "adapter-h has no option 'siz'"),
        ("lora{rank: 0}", "rank is 0; it must be at least 1"),
        ("lora {rank", "is no method"),
        ("lora{rank}", "'lora{rank}' gives rank no value"),
        ("lora{rank: [}]}", "is no YAML in its braces"),
        ("lora{ranks: {}, 3: 4}", "gives 3 no value"),
    ],
)
def test_methods_that_make_no_sense_are_named_at_once(text: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        arms_of(text, Recipe(model="m", data="d"))


def test_words_of_the_command_are_checked(bert: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, bert, cases.sentiments(tmp_path / "d.tsv"))
    refused("give factors such as", "compare", recipe, "--rates", "fast")
    refused("factors are different numbers above 0", "compare", recipe, "--rates", "1,1")
    refused("the recipe needs eval_data", "compare", recipe, "--rates", "1,2", "--output", tmp_path / "out")
    refused("nothing is held out", "compare", recipe, "eval_share=0", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_intervals_are_student_s() -> None:
    assert margin_of([0.8]) is None
    assert margin_of([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-5)
    assert overhead([(2.0, 1.0), (3.0, 1.0), (9.0, 1.0)]) == (3.0, 2.0, 9.0)
    # Of ten values the second and the ninth hold the median at 97.9 %, the third and the eighth at 89.1 %.
    assert overhead([(float(i), 1.0) for i in range(10)]) == (4.5, 1.0, 8.0)
    assert overhead([(float(i), 1.0) for i in range(1, 7)]) == (3.5, 1.0, 6.0)
