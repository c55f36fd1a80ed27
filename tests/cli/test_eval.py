"""lorank eval: the scores are those that a few lines by hand give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lorank
from lorank import LoRA
from lorank.data import open_source

from .. import checkpoints, models
from .running import refused, run, run_json, write_records

PAIRS = [{"prompt": f"what is {n} and {n * n * n}?", "completion": f" it is {n}"} for n in range(30)]
FILMS = [{"text": text, "label": "good" if i % 3 else "bad"} for i, text in enumerate(checkpoints.TEXTS * 4)]
CAUSAL = {"task": "causal-lm", "prompt": "prompt", "completion": "completion", "train_on": "completion"}
CLASSES = {"task": "classification", "text": "text", "label": "label", "labels": ["bad", "good"]}


def causal_adapter(base: Path, folder: Path, about: Any = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.adapt(model, LoRA(rank=2), ["q_proj", "v_proj"])
    models.disturb(model)
    lorank.save(model, folder, about=CAUSAL if about is None else about)
    return folder


def classifier_adapter(base: Path, folder: Path, about: Any = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    about = about or CLASSES
    options = {"problem_type": "regression"} if about["task"] == "regression" else {}
    count = len(about.get("labels") or ["value"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=count, **options)
    lorank.adapt(model, LoRA(rank=2), "attention", train_also=["classifier"])
    models.disturb(model)
    lorank.save(model, folder, about=about)
    return folder


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    return checkpoints.causal(tmp_path / "causal")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return checkpoints.encoder(tmp_path / "encoder")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_records(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return write_records(tmp_path / "films.jsonl", FILMS)


def language_scores(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> dict[str, float]:
    """Return the scores of completions, one record at a time, without padding."""
    total = right = count = 0
    for record in records:
        before = tokenizer(record["prompt"])["input_ids"]
        after = tokenizer(record["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        target = torch.tensor(after)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        right += int((logits.argmax(-1) == target).sum())
        count += len(after)
    return {"loss": total / count, "perplexity": math.exp(total / count), "token_accuracy": right / count}


def close(found: dict[str, Any], wanted: dict[str, float]) -> None:
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_language_models_are_scored_as_by_hand(causal: Path, pairs: Path, tmp_path: Path) -> None:
    one = causal_adapter(causal, tmp_path / "one")
    two = causal_adapter(causal, tmp_path / "two", seed=1)
    words = ["eval", "--model", causal, "--adapter", one, "--adapter", f"second={two}", "--base", "--data", pairs]
    found = run_json(*words, "--batch-size", 7)
    assert found["examples"] == 30 and found["task"] == "causal-lm"
    assert [row["adapter"] for row in found["scores"]] == [None, "one", "second"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal), AutoTokenizer.from_pretrained(causal)
    close(found["scores"][0], language_scores(model, tokenizer, PAIRS))
    for row, path in zip(found["scores"][1:], (one, two), strict=True):
        lorank.load(model, path, row["adapter"])
        close(row, language_scores(model, tokenizer, PAIRS))
    losses = {round(row["loss"], 6) for row in found["scores"]}
    assert len(losses) == 3
    lines = run(*words).stdout.splitlines()
    assert lines[0] == f"30 examples of {pairs}" and lines[1].split() == [
        "adapter",
        "loss",
        "perplexity",
        "token_accuracy",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["(base)", "one", "second"]
    assert lines[3].split()[1] == f"{found['scores'][1]['loss']:.4f}"


def test_published_data_is_read_as_in_training(causal: Path, tmp_path: Path) -> None:
    raw, made = tmp_path / "test.csv", tmp_path / "made.jsonl"
    raw.write_text('"mr","ref"\n"name[fox], area[two]","the quick fox"\n"name[dog]","the lazy dog"\n')
    found = run_json("eval", "--model", causal, "--data", raw, "--reader", "e2e")
    made.write_text("".join(json.dumps(record) + "\n" for record in open_source(str(raw), reader="e2e")))
    again = run_json("eval", "--model", causal, "--data", made)
    assert found["scores"] == again["scores"] and found["examples"] == 2


def test_a_base_is_scored_alone(causal: Path, pairs: Path) -> None:
    found = run_json("eval", "--model", causal, "--data", pairs, "--limit", 9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal), AutoTokenizer.from_pretrained(causal)
    assert found["examples"] == 9
    close(found["scores"][0], language_scores(model, tokenizer, PAIRS[:9]))


def test_columns_can_be_others_than_those_of_the_training(causal: Path, tmp_path: Path) -> None:
    adapter = causal_adapter(causal, tmp_path / "adapter")
    renamed = [{"q": record["prompt"], "a": record["completion"]} for record in PAIRS]
    data = write_records(tmp_path / "renamed.jsonl", renamed)
    words = ["eval", "--model", causal, "--adapter", adapter, "--data", data]
    refused("the prompt column 'prompt' is not in the data", *words)
    found = run_json(*words, "--prompt", "{q}\\n", "--completion", "a")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal), AutoTokenizer.from_pretrained(causal)
    lorank.load(model, adapter)
    records = [{"prompt": record["q"] + "\n", "completion": record["a"]} for record in renamed]
    close(found["scores"][0], language_scores(model, tokenizer, records))
    whole = run_json(*words, "--text", "q")["scores"][0]
    total = count = 0
    for record in renamed:  # all of a text is trained on, and its first token is not predicted
        ids = [*tokenizer(record["q"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert whole["loss"] == pytest.approx(total / count, rel=1e-4)


def classifier_scores(model: Any, tokenizer: Any) -> dict[str, float]:
    labels = [CLASSES["labels"].index(record["label"]) for record in FILMS]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(record["text"], return_tensors="pt")).logits for record in FILMS])
    guesses = logits.argmax(-1).tolist()
    return {
        "loss": float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))),
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses)),
        "matthews": float(matthews_corrcoef(labels, guesses)),
    }


def test_classifiers_are_scored_as_by_hand(encoder: Path, films: Path, tmp_path: Path) -> None:
    paths = [classifier_adapter(encoder, tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    words = [word for path in paths for word in ("--adapter", path)]
    found = run_json("eval", "--model", encoder, *words, "--data", films, "--batch-size", 3)
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for row, path in zip(found["scores"], paths, strict=True):
        lorank.load(model, path, row["adapter"])
        close(row, classifier_scores(model, tokenizer))
    refused("has no trained classifier", "eval", "--model", encoder, *words, "--base", "--data", films)


def test_a_base_with_a_head_is_scored_too(encoder: Path, films: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}
    )
    model.save_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path / "whole")
    found = run_json("eval", "--model", tmp_path / "whole", "--task", "classification", "--data", films)
    close(found["scores"][0], classifier_scores(model.eval(), tokenizer))


def test_a_regression_without_spread_has_no_correlation(encoder: Path, tmp_path: Path) -> None:
    about = {"task": "regression", "text": "text", "label": "label"}
    adapter = classifier_adapter(encoder, tmp_path / "adapter", about)
    data = write_records(tmp_path / "data.jsonl", [{"text": text, "label": 2.0} for text in checkpoints.TEXTS])
    row = run_json("eval", "--model", encoder, "--adapter", adapter, "--data", data)["scores"][0]
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    lorank.load(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        guesses = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in checkpoints.TEXTS]
    assert row["loss"] == pytest.approx(sum((guess - 2) ** 2 for guess in guesses) / len(guesses), rel=1e-4)
    assert row["pearson"] is None and row["spearman"] is None  # JSON has no NaN


def test_what_does_not_go_together_is_told(causal: Path, encoder: Path, films: Path, tmp_path: Path) -> None:
    one = classifier_adapter(encoder, tmp_path / "one")
    other = classifier_adapter(encoder, tmp_path / "other", {**CLASSES, "labels": ["no", "yes"]})
    language = causal_adapter(causal, tmp_path / "language")
    words = ["eval", "--model", encoder, "--data", films, "--adapter", one]
    refused(r"'other' is for classification \(no, yes\)", *words, "--adapter", other)
    refused("'language' is for causal-lm", *words, "--adapter", language)
    refused("two adapters are called 'one'", *words, "--adapter", one)
    refused("which base", "eval", "--data", films, "--adapter", one)
    refused("nothing to score", "eval", "--data", films)
    refused("there is no file", *words[:3], "--data", tmp_path / "none.jsonl")
    refused("dtype is 'float7'", *words, "--dtype", "float7")
    wrong = write_records(tmp_path / "wrong.jsonl", [{"text": "a film", "label": "ugly"}])
    refused("the label 'ugly' is not one of the 2 known", "eval", "--model", encoder, "--adapter", one, "--data", wrong)


def test_another_base_is_refused_unless_it_is_allowed(causal: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = causal_adapter(causal, tmp_path / "adapter")
    other = checkpoints.causal(tmp_path / "other", seed=1)
    words = ["eval", "--model", other, "--adapter", adapter, "--data", pairs]
    refused("the base differs", *words)
    with pytest.warns(lorank.AdapterWarning, match="the base differs"):
        assert run(*words, "--allow-other-base")


def test_a_run_knows_its_base_and_a_path_may_hold_a_sign_of_equality(causal: Path, pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.01"
    causal_adapter(causal, folder / "adapter")
    (folder / "recipe.yaml").write_text(f"model: {causal}\ndata: {pairs}\n")
    found = run_json("eval", "--adapter", folder, "--data", pairs)
    assert [row["adapter"] for row in found["scores"]] == ["lr=0_01"]
    named = run_json("eval", "--adapter", f"mine={folder}", "--data", pairs)
    assert [row["adapter"] for row in named["scores"]] == ["mine"]


def test_each_adapter_reads_the_records_as_it_was_trained(causal: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path / "r.jsonl", [{"q": f"what is {i}", "a": " four"} for i in range(4)])
    forms = ({"prompt": "q", "completion": "a"}, {"prompt": "Q: {q}\n", "completion": "a"})
    folders = [
        causal_adapter(causal, tmp_path / f"n{i}", {"task": "causal-lm", **form}, seed=i)
        for i, form in enumerate(forms)
    ]
    alone = [
        run_json("eval", "--model", causal, "--adapter", one, "--data", records)["scores"][0]["loss"] for one in folders
    ]
    for order in ((0, 1), (1, 0)):
        words = [word for i in order for word in ("--adapter", folders[i])]
        found = run_json("eval", "--model", causal, *words, "--data", records)["scores"]
        assert [row["loss"] for row in found] == pytest.approx([alone[i] for i in order])


def test_an_unknown_task_is_told(causal: Path, pairs: Path) -> None:
    refused("task is 'foo'; it must be causal-lm", "eval", "--model", causal, "--data", pairs, "--task", "foo")
