"""lorank generate: its texts are those of model.generate, and its labels those of the classifier."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lorank

from .. import checkpoints
from .running import records_in, refused, run, run_json, write_records
from .test_eval import CLASSES, causal_adapter, classifier_adapter

PROMPTS = ["a good film", "what is", "the quick brown fox jumps over", "0123456789 0123456789 and so on", "a"]
PLAIN = {"task": "causal-lm", "text": "text", "train_on": "all"}
NEW = 12


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.causal(tmp_path / "base")


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> list[Path]:
    return [causal_adapter(base, tmp_path / name, PLAIN, seed=i) for i, name in enumerate(("one", "two"))]


def greedy(base: Path, adapter: Path | None, prompts: list[str], **options: Any) -> list[str]:
    """Return what model.generate adds to each prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        lorank.load(model, adapter)
    made = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
        made.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return made


def words_for(base: Path, *adapters: Path) -> list[object]:
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    return ["generate", "--model", base, *named, "--max-new-tokens", NEW]


def test_one_prompt_is_continued(base: Path, adapters: list[Path]) -> None:
    for adapter in (None, adapters[0]):
        words = words_for(base, *([adapter] if adapter else []))
        assert run(*words, "--prompt", PROMPTS[0]).stdout == greedy(base, adapter, PROMPTS[:1])[0] + "\n"


def test_adapters_answer_side_by_side(base: Path, adapters: list[Path]) -> None:
    wanted = {path.name: greedy(base, path, PROMPTS[:2]) for path in adapters} | {
        "(base)": greedy(base, None, PROMPTS[:2])
    }
    words = [*words_for(base, *adapters), "--base", "-p", PROMPTS[0], "-p", PROMPTS[1]]
    shown = run(*words).stdout
    assert shown == "".join(f"{n}:\n{wanted[n][i]}\n" for i in range(2) for n in ("(base)", "one", "two"))
    renamed = [*words_for(base), "--adapter", f"[red]x={adapters[0]}", "--base", "-p", PROMPTS[0]]
    assert run(*renamed).stdout == f"(base):\n{wanted['(base)'][0]}\n[red]x:\n{wanted['one'][0]}\n"
    first = run_json(*words[:-2])
    assert first == {"prompt": PROMPTS[0], "outputs": {name: texts[0] for name, texts in wanted.items()}}
    assert len({texts[0] for texts in wanted.values()}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_file_is_answered_in_its_order(batch_size: int, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(PROMPTS[:3]) + "\n\n" + "\n".join(PROMPTS[3:]))
    data = write_records(tmp_path / "prompts.jsonl", [{"n": i, "text": prompt} for i, prompt in enumerate(PROMPTS)])
    wanted = {path.name: greedy(base, path, PROMPTS) for path in adapters}
    words = [*words_for(base, *adapters), "--batch-size", batch_size]
    found = run(*words, "--file", text, "--out", tmp_path / "text.jsonl")
    assert found.stdout == "" and f"5 records written to {tmp_path / 'text.jsonl'}" in found.stderr
    run(*words, "--file", data, "--out", tmp_path / "data.jsonl", "--limit", 4)
    for i, record in enumerate(records_in(tmp_path / "text.jsonl")):
        assert record == {"prompt": PROMPTS[i], "outputs": {name: texts[i] for name, texts in wanted.items()}}
    records = records_in(tmp_path / "data.jsonl")
    assert [record["n"] for record in records] == [0, 1, 2, 3]
    assert [record["outputs"]["two"] for record in records] == wanted["two"][:4]
    assert not list(tmp_path.glob("*.partial"))


def test_beams_are_those_of_transformers(base: Path) -> None:
    shown = run(*words_for(base), "--beams", 3, "--prompt", PROMPTS[0]).stdout
    assert shown == greedy(base, None, PROMPTS[:1], num_beams=3)[0] + "\n"


def test_prompts_come_line_by_line_from_a_pipe(base: Path) -> None:
    wanted = greedy(base, None, PROMPTS[:2])
    assert run(*words_for(base), typed=f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n").stdout == "".join(f"{t}\n" for t in wanted)


def test_a_bad_prompt_of_a_pipe_does_not_end_it(base: Path, tmp_path: Path) -> None:
    about = {"task": "causal-lm", "prompt": "{q} {c}", "completion": "a", "train_on": "completion"}
    adapter = causal_adapter(base, tmp_path / "adapter", about)
    found = run(*words_for(base, adapter), typed='nothing\n{"q": "a good", "c": "film"}\n')
    assert found.stdout == greedy(base, adapter, ["a good film"])[0] + "\n"
    assert "error: a prompt for this adapter has 2 columns; give them as JSON" in found.stderr
    refused("has 2 columns", *words_for(base, adapter), "--prompt", "nothing")


def test_a_template_is_put_around_a_prompt_unless_it_is_raw(base: Path, tmp_path: Path) -> None:
    about = {"task": "causal-lm", "prompt": "what is {q}?\n", "completion": "a", "train_on": "completion"}
    adapter = causal_adapter(base, tmp_path / "adapter", about)
    words = [*words_for(base, adapter), "--prompt", "two"]
    assert run(*words).stdout == greedy(base, adapter, ["what is two?\n"])[0] + "\n"
    assert run(*words, "--raw").stdout == greedy(base, adapter, ["two"])[0] + "\n"


def test_chat_templates(base: Path, tmp_path: Path) -> None:
    chat = "<|user|>\na good film<|end|>\n<|assistant|>\n"
    words = [*words_for(base), "--prompt", "a good film", "--chat"]
    assert run(*words).stdout == greedy(base, None, [chat])[0] + "\n"
    system = f"<|system|>\nbe kind<|end|>\n{chat}"
    assert run(*words, "--system", "be kind").stdout == greedy(base, None, [system])[0] + "\n"
    adapter = causal_adapter(base, tmp_path / "adapter", {"task": "causal-lm", "messages": "talk"})
    assert run(*words_for(base, adapter), "--prompt", "a good film").stdout == greedy(base, adapter, [chat])[0] + "\n"
    turns = [{"role": "user", "content": "a good film"}, {"role": "assistant", "content": "left out"}]
    data = write_records(tmp_path / "talks.jsonl", [{"talk": turns}])
    run(*words_for(base, adapter), "--file", data, "--out", tmp_path / "out.jsonl")
    assert records_in(tmp_path / "out.jsonl")[0]["outputs"] == {"adapter": greedy(base, adapter, [chat])[0]}


def test_drawn_tokens_depend_on_the_seed(base: Path) -> None:
    words = [*words_for(base), "--prompt", PROMPTS[0], "--temperature", 1.0]
    one, again, other = (run(*words, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == again != other
    assert run(*words, "--top-p", 1e-6).stdout == greedy(base, None, PROMPTS[:1])[0] + "\n"


def test_drawn_tokens_may_be_any(base: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("a\n" * 400)
    words = ["generate", "--model", base, "--file", tmp_path / "many.txt", "--temperature", 5, "--max-new-tokens", 1]
    run(*words, "--out", tmp_path / "out.jsonl", "--batch-size", 100)
    found = {record["outputs"]["(base)"] for record in records_in(tmp_path / "out.jsonl")}
    assert len(found) > 60  # a top-k of 50 that nobody asked for would allow 50


def test_classifiers_name_a_label(tmp_path: Path) -> None:
    base = checkpoints.encoder(tmp_path / "base")
    adapter = classifier_adapter(base, tmp_path / "adapter")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    lorank.load(model, adapter)
    with torch.no_grad():
        rows = [model(**tokenizer(t, return_tensors="pt")).logits.softmax(-1)[0].tolist() for t in checkpoints.TEXTS]
    labels = [CLASSES["labels"][row.index(max(row))] for row in rows]
    words = ["generate", "--model", base, "--adapter", adapter]
    assert run(*words, "--prompt", checkpoints.TEXTS[0]).stdout == f"{labels[0]}  ({max(rows[0]):.1%})\n"
    data = write_records(tmp_path / "films.jsonl", [{"text": text} for text in checkpoints.TEXTS])
    run(*words, "--file", data, "--out", tmp_path / "out.jsonl", "--batch-size", 2)
    for record, row, label in zip(records_in(tmp_path / "out.jsonl"), rows, labels, strict=True):
        answer = record["outputs"]["adapter"]
        assert answer["label"] == label and answer["probability"] == pytest.approx(max(row), abs=1e-4)
        assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-4)
    refused("has no trained classifier", *words, "--base", "--prompt", "a film")
    other = write_records(tmp_path / "other.jsonl", [{"review": "a good film"}])
    refused("there is no column 'text'", *words, "--file", other)


def test_regressions_name_a_number(tmp_path: Path) -> None:
    base = checkpoints.encoder(tmp_path / "base")
    about = {"task": "regression", "text": "text", "label": "label"}
    adapter = classifier_adapter(base, tmp_path / "adapter", about)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lorank.load(model, adapter)
    with torch.no_grad():
        value = float(model(**AutoTokenizer.from_pretrained(base)("a good film", return_tensors="pt")).logits)
    found = run_json("generate", "--model", base, "--adapter", adapter, "--prompt", "a good film")
    assert found["outputs"]["adapter"] == pytest.approx(value, abs=1e-5)


def test_what_cannot_be_answered_is_told(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    words = ["generate", "--model", base]
    (tmp_path / "there.jsonl").write_text("mine")
    refused("there.jsonl exists", *words, "--file", prompts, "--out", tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    refused("--out goes with --file", *words, "--prompt", "a", "--out", tmp_path / "new")
    refused("not both", *words, "--prompt", "a", "--file", prompts)
    refused("which model", "generate", "--prompt", "a")
    refused("there is no file", *words, "--file", tmp_path / "none.txt")
    refused("dtype is 'half'", *words, "--prompt", "a", "--dtype", "half")
    prompts.write_text("\n\n")
    refused("has no prompts", *words, "--file", prompts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "prompts.txt", "there.jsonl"]


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_person_is_asked_for_prompts_until_an_interrupt(base: Path) -> None:
    parent, terminal = pty.openpty()
    command = [sys.executable, "-m", "lorank", *map(str, words_for(base))]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        # What runs in the background may have been started with interrupts ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(parent, 4096).decode(errors="replace").replace("\r\n", "\n")

    until("> ")
    assert "an empty line or Ctrl-D ends" in seen
    seen = ""
    os.write(parent, f"{PROMPTS[0]}\n".encode())
    until("> ")
    assert greedy(base, None, PROMPTS[:1])[0].splitlines()[0] in seen
    # An interrupt that comes just before the process begins to wait for a line is met after the line; one that comes
    # while it ends kills it. Both take their time on a busy machine.
    time.sleep(0.5)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
            break
    assert process.wait(1) == 130 and "Traceback" not in seen
    os.close(parent)


def test_each_adapter_is_asked_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    asks = {"task": "causal-lm", "prompt": "{q}\n", "completion": "a"}
    one = causal_adapter(base, tmp_path / "one", asks, seed=1)
    two = causal_adapter(base, tmp_path / "two", PLAIN, seed=2)
    wanted = {"one": greedy(base, one, ["a good film\n"])[0], "two": greedy(base, two, ["a good film"])[0]}
    for order in ((one, two), (two, one)):
        assert run_json(*words_for(base, *order), "-p", "a good film")["outputs"] == wanted


def test_a_prompt_without_tokens_is_told(base: Path) -> None:
    refused("a prompt has no tokens", *words_for(base), "--prompt", "")


def test_options_that_do_not_go_together_are_told(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    refused("exclude each other", *words_for(base), "--raw", "--chat", "-p", "a")
    refused("--system goes with --chat", *words_for(base), "--system", "Be brief.", "-p", "a")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    refused("odd.txt is not UTF-8 text", *words_for(base), "--file", tmp_path / "odd.txt")


def test_a_merged_classifier_is_known_by_its_configuration(tmp_path: Path) -> None:
    encoder = checkpoints.encoder(tmp_path / "encoder")
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3, id2label=dict(enumerate(CLASSES)))
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "classifier")
    found = run_json("generate", "--model", tmp_path / "classifier", "-p", "a good film")
    assert found["outputs"]["(base)"]["label"] in CLASSES
