"""lorank eval --metrics and lorank score: what adapters write, kept in a file and scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorank
from lorank.cli.written import keep
from lorank.evaluation import text_scores
from lorank.tasks import Output, Question

from .. import checkpoints
from .running import records_in, refused, run, run_json, write_records
from .test_eval import causal_adapter, classifier_adapter

MEANINGS = ["name[The Eagle], food[French]", "name[Aromi]", "name[The Mill], area[riverside], price[cheap]"]
RECORDS = [
    {"prompt": meaning, "completion": f" {text} {i}"}
    for i in range(2)
    for text in ("A place.", "It is")
    for meaning in MEANINGS
]
NEW = ("--max-new-tokens", 8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.causal(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "test.jsonl", RECORDS)


def written(base: Path, adapter: Path | None, **options: Any) -> list[str]:
    """Return what model.generate adds to each meaning alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        lorank.load(model, adapter)
    made = []
    for meaning in MEANINGS:
        inputs = tokenizer(meaning, return_tensors="pt")
        ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, **options)
        made.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return made


def references() -> list[list[str]]:
    return [[r["completion"].strip() for r in RECORDS if r["prompt"] == meaning] for meaning in MEANINGS]


def test_adapters_are_scored_on_what_they_write(base: Path, data: Path, tmp_path: Path) -> None:
    adapters = [causal_adapter(base, tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    words = ["eval", "--model", base, "--base", "--data", data, "--metrics", "bleu,rouge-l,ter", *NEW]
    words += [word for adapter in adapters for word in ("--adapter", adapter)]
    searched = ["--beams", 3, "--length-penalty", 0.9, "--no-repeat-ngram", 4, "--batch-size", 2]
    kept = tmp_path / "out" / "outputs.jsonl"
    found = run_json(*words, *searched, "--outputs", kept)
    assert (found["prompts"], found["references"], found["task"]) == (3, 12, "causal-lm")
    assert found["decoding"]["length_penalty"] == 0.9 and found["decoding"]["beams"] == 3
    wanted, lines = [], []
    for name, path in ((None, None), ("one", adapters[0]), ("two", adapters[1])):
        texts = written(base, path, num_beams=3, length_penalty=0.9, no_repeat_ngram_size=4)
        wanted.append({"adapter": name, **text_scores(texts, references(), "bleu,rouge-l,ter")})
        rows = zip(MEANINGS, texts, references(), strict=True)
        lines += [{"adapter": name, "prompt": p, "output": t, "references": r} for p, t, r in rows]
    assert found["scores"] == wanted
    assert records_in(kept) == lines
    again = run_json("score", kept, "--metrics", "bleu,rouge-l,ter")
    assert again == {"outputs": str(kept), "prompts": 3, "references": 12, "scores": wanted}
    shown = run("score", kept, "--metrics", "samsum").stdout.splitlines()
    assert shown[0] == f"3 outputs of {kept}, 12 references"
    assert [line.split()[0] for line in shown[1:]] == ["adapter", "(base)", "one", "two"]
    assert run(*words).stdout.splitlines()[0] == f"3 prompts of {data}, 12 references"


def test_files_of_other_programs_are_scored(tmp_path: Path) -> None:
    records = [{"output": "SELECT a FROM t", "reference": "select A from table"}, {"output": "x", "references": ["x"]}]
    one, other = (write_records(tmp_path / f"{i}.jsonl", [record]) for i, record in enumerate(records))
    assert run_json("score", one, "--metrics", "wikisql")["scores"] == [{"adapter": None, "logical-form": 1.0}]
    one.write_bytes(b"\xef\xbb\xbf" + one.read_bytes())  # a byte-order mark
    assert run_json("score", one, "--metrics", "wikisql")["scores"] == [{"adapter": None, "logical-form": 1.0}]
    assert run_json("score", other, "--metrics", "exact-match")["scores"] == [{"adapter": None, "exact-match": 1.0}]


def test_separators_of_lines_within_a_text_separate_no_records(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    text = "one\u2028two\x85three"
    keep({None: [Output(Question("p", (text,)), text)]}, str(kept))
    assert run_json("score", kept, "--metrics", "exact-match")["scores"] == [{"adapter": None, "exact-match": 1.0}]
    assert run("score", kept, "--metrics", "exact-match").stdout.splitlines()[2].split() == ["-", "1.0000"]


def test_a_file_that_holds_no_outputs_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for line in (
        "no json",
        "7",
        '{"output": "a"}',
        '{"output": "a", "references": "b"}',
        '{"output": 1, "reference": "b"}',
    ):
        bad.write_text('{"output": "a", "reference": "b"}\n' + line + "\n")
        refused("line 2 is no {output, references}", "score", bad, "--metrics", "bleu")
    bad.write_text("\n")
    refused("it has no output", "score", bad, "--metrics", "bleu")
    bad.write_bytes(b"\xff\xfe")
    refused("is not UTF-8", "score", bad, "--metrics", "bleu")
    refused("there is no file", "score", tmp_path / "none.jsonl", "--metrics", "bleu")
    refused("no score 'blue'; nearest: bleu", "score", bad, "--metrics", "blue")


def test_what_cannot_be_written_is_refused_before(base: Path, data: Path, tmp_path: Path) -> None:
    words = ["eval", "--model", base, "--data", data]
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    refused("there.jsonl exists", *words, "--metrics", "bleu", "--outputs", there)
    assert there.read_text() == "mine"
    refused("no score 'blue'", *words, "--metrics", "blue")
    refused("length_penalty is 0.9; it chooses among", *words, "--metrics", "bleu", "--length-penalty", 0.9)
    refused("--no-repeat-ngram, --outputs goes with --metrics", *words, "--no-repeat-ngram", 4, "--outputs", "x")
    refused(
        "with 300 new ones that is more than the 256", *words, "--metrics", "bleu", "--max-new-tokens", 300, *COLUMNS
    )
    plain = write_records(tmp_path / "plain.jsonl", [{"text": "a good film"}])
    refused("a text without a prompt", "eval", "--model", base, "--data", plain, "--metrics", "bleu")
    encoder = checkpoints.encoder(tmp_path / "encoder")
    films = write_records(tmp_path / "films.jsonl", [{"text": "a good film", "label": "good"}] * 2)
    classes = classifier_adapter(encoder, tmp_path / "films")
    refused(
        "this is a classification",
        *("eval", "--model", encoder, "--adapter", classes, "--data", films, "--metrics", "bleu"),
    )


COLUMNS = ("--prompt", "prompt", "--completion", "completion")


def test_generate_takes_the_same_options(base: Path) -> None:
    words = ["generate", "--model", base, *NEW, "--raw", "-p", MEANINGS[0], "--json"]
    searched = ["--beams", 3, "--length-penalty", 0.9, "--no-repeat-ngram", 2, "--repetition-penalty", 1.3]
    found = json.loads(run(*words, *searched, "--min-new-tokens", 3).stdout)
    options: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.9, "no_repeat_ngram_size": 2}
    wanted = written(base, None, **options, repetition_penalty=1.3, min_new_tokens=3)
    assert found["outputs"]["(base)"].strip() == wanted[0]
    assert wanted[0] != written(base, None)[0]
    refused("beams is 1", *words, "--length-penalty", 2)
