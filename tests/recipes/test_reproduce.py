"""lorank reproduce, from the command line: what it trains, what it leaves, how it goes on, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorank import AdapterError
from lorank.data import rendering_of
from lorank.models import load_tokenizer
from lorank.reproduction.jobs import Job, Wanted, begin, jobs_of, remember
from lorank.reproduction.report import Line, changes_of, lines_of
from lorank.reproduction.row import Row
from lorank.reproduction.scoring import asked, printed
from lorank.reproduction.task import Published
from lorank.runs.run import Trained

from .. import checkpoints
from ..cli.running import refused, run, run_json
from ..runs import cases as runs
from . import cases

PAPER = cases.ROOT / "recipes" / "paper"
LORA = PAPER / "table-2" / "roberta-base-lora.yaml"
QUICK = ("steps=2", "warmup=0", "batch_size=4", "device=cpu", "eval_epochs=none", "eval_every=1")


def small(row: Path, task: str, bases: dict[str, Path], tmp_path: Path, *words: object) -> list[object]:
    """Return a command that reproduces a task of a row with a small base and a few records."""
    one = cases.row(row).tasks[task]
    data = cases.records(tmp_path, task, one.settings("paper"), one.labels)
    base = bases[one.settings("paper")["model"].split("-")[0]]
    where = ["--task", task, "--model", base, "--data", data, "--eval-data", data, "--output", tmp_path / "out"]
    length = 64 if one.test["paper"] is None else 256
    return ["reproduce", row, *where, *words, *QUICK, f"max_length={length}"]


def test_a_row_is_trained_scored_and_put_beside_the_published(bases: dict[str, Path], tmp_path: Path) -> None:
    command = small(LORA, "mnli", bases, tmp_path, "--seeds", 2)
    found = run_json(*command)
    out = tmp_path / "out"
    (line,) = found["results"]
    assert (line["metric"], line["published"]["value"], line["published"]["spread"]) == ("accuracy", 87.5, 0.3)
    runs = [out / "mnli" / f"seed-{seed}" for seed in (0, 1)]
    best = [100 * json.loads((run / "run.json").read_text())["best"]["accuracy"] for run in runs]
    assert line["values"] == best and line["ours"] == pytest.approx(sum(best) / 2)
    assert json.loads((out / "results.json").read_text()) == found
    table = (out / "results.md").read_text()
    assert re.search(r"\| mnli \| accuracy \| 87\.5 ± \.3 \| \d+\.\d ± \d+\.\d \| [+-]\d+\.\d \| 2 \|", table)
    assert "unstated in the paper: weight_decay" in table
    changed = found["changed"]["mnli"]
    assert changed.keys() == {"model", "data", "eval_data", "steps", "warmup", "batch_size", "max_length", "device"} | {
        "eval_epochs",
        "eval_every",
    }
    assert "mnli: other than in the row: model " in table and "steps 2, batch_size 4" in table

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    shown = run(*command)  # again: nothing is trained twice
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "mnli" in shown.stdout and "87.5 ± .3" in shown.stdout and shown.stderr.count("finished before") == 2


def test_a_task_starts_from_the_best_run_of_another(bases: dict[str, Path], tmp_path: Path) -> None:
    alone = small(LORA, "rte", bases, tmp_path, "--seeds", 1)
    refused("rte starts from the best run of mnli, of which there is none yet: add --task mnli", *alone)
    assert not (tmp_path / "out").exists()
    run(*small(LORA, "mnli", bases, tmp_path, "--seeds", 2))
    shown = run(*alone)
    best = _best_of_mnli(tmp_path / "out" / "mnli")
    assert "classifier starts anew, as the other is trained for label 0, label 1, label 2" in shown.stderr
    stored = (tmp_path / "out" / "rte" / "seed-0" / "recipe.yaml").read_text()
    assert f"init_adapter: {best}" in stored
    other = [word if word != tmp_path / "out" else tmp_path / "other" for word in alone]
    assert "tensors start from" in shown.stderr
    assert "tensors start from" not in run(*other, "init_adapter=none").stderr


def _best_of_mnli(folder: Path) -> Path:
    scores = {run: json.loads((run / "run.json").read_text())["best"]["accuracy"] for run in sorted(folder.iterdir())}
    return max(scores, key=lambda run: scores[run])


def jobs(bases: dict[str, Path], tmp_path: Path, **overrides: Any) -> tuple[Row, list[Job]]:
    """Return the jobs that the command would run for MNLI with one seed."""
    small(LORA, "mnli", bases, tmp_path)
    row, data = cases.row(LORA), str(tmp_path / "mnli.jsonl")
    keys = {"steps": 3, "warmup": 0, "batch_size": 4, "max_length": 64, "device": "cpu", "eval_every": 1}
    keys |= {"checkpoint_every": 1}
    where = {"model": str(bases["roberta"]), "data": data, "eval_data": data, "output": str(tmp_path / "out")}
    return row, jobs_of(row, Wanted(tasks=("mnli",), seeds=1, overrides=keys | overrides, **where))


def test_a_run_that_was_stopped_goes_on(bases: dict[str, Path], tmp_path: Path) -> None:
    _, (job,) = jobs(bases, tmp_path)
    remember([job], tmp_path / "out")
    stopped = begin(job)
    for event in stopped.events():
        if isinstance(event, Trained):
            stopped.stop()
    assert job.best is None and job.begun
    again = begin(job)
    assert again.state.step == 1
    assert [event.step for event in again.events() if isinstance(event, Trained)] == [2, 3]
    assert job.best is not None


def test_runs_of_another_recipe_are_not_taken_for_these(bases: dict[str, Path], tmp_path: Path) -> None:
    run(*small(LORA, "mnli", bases, tmp_path, "--seeds", 1))
    command = small(LORA, "mnli", bases, tmp_path, "--seeds", 1)
    refused("mnli/seed-0: rank was 8, and is 4 now", *command, "rank=4")
    refused("mnli/seed-0: alpha was 8.0, and is 16.0 now", *command, "--hyperparameters", "repository")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--task", "mnle"], "there is no task 'mnle'; nearest: mnli"),
        (["--data", "x.tsv"], "--data is the data of one task, and there are mnli, sst-2, cola"),
        (["--task", "mnli", "--hyperparameters", "best"], "it must be paper or repository"),
        (["--task", "mnli", "seed=3"], "seed is different for every run"),
        (["--task", "mnli", "rnak=3"], "roberta-base-lora.yaml, mnli: .*there is no key 'rnak'; nearest: rank"),
        (["--task", "mnli", "epochs=0"], "epochs is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], reason: str) -> None:
    refused(reason, "reproduce", LORA, *words)


def test_a_model_without_public_weights_is_counted_and_not_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    row = PAPER / "table-4" / "gpt3-lora-37.7m.yaml"
    refused("the weights of gpt3-175b are not public; --model names another base", "reproduce", row)
    found = run_json("reproduce", row, "--task", "mnli", "--task", "wikisql", "--dry-run")
    assert [task["trainable_parameters"] for task in found["tasks"]] == [37_748_736] * 2
    assert [task["published"] for task in found["tasks"]] == [{"logical-form": "74.0"}, {"exact-match": "91.6"}]


def test_a_dry_run_shows_recipes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = PAPER / "table-2" / "deberta-xxl-lora.yaml"
    for whose, count, rank in (("paper", 2_359_296, 8), ("repository", 4_718_592, 16)):
        words = ("reproduce", row, "--task", "rte", "--hyperparameters", whose, "--dry-run")
        (task,) = run_json(*words)["tasks"]
        assert task["trainable_parameters"] == task["counted_in_file"] == count
        assert task["recipe"]["rank"] == rank and task["start_from"] == "mnli" and task["seeds"] == 5
        shown = run(*words).stdout
        assert f"rank: {rank}\n" in shown and f"{count:,} parameters" in shown and "94.9 ± .4" in shown
        assert "# unstated: init: " in shown and "nothing was trained or written" in shown
    assert not list(tmp_path.iterdir())


def test_scores_are_on_the_scale_of_the_paper() -> None:
    assert printed("accuracy", 0.875) == 87.5 and printed("bleu", 0.704) == pytest.approx(70.4)
    assert printed("nist", 8.85) == 8.85 and printed("meteor", 0.468) == pytest.approx(46.8)
    assert printed("meteor-webnlg", 0.39) == 0.39 and printed("ter-webnlg", 0.46) == 0.46


def test_seeds_are_summed_up_as_the_table_does() -> None:
    for report, ours in (("median", 88.0), ("mean", 90.0)):
        line = Line("rte", "accuracy", Published.of("86.6 ± .7"), (86.0, 88.0, 96.0), report)
        assert line.ours == ours and line.spread == pytest.approx(5.2915, abs=1e-4)
        assert line.shown()["difference"] == f"{ours - 86.6:+.1f}"
    assert Line("rte", "accuracy", Published.of(86.6), (86.0,), "mean").spread is None


def test_an_average_needs_all_tasks() -> None:
    row = cases.row(LORA)
    scores = {
        name: [{metric: published.value for metric, published in task.published.items()}]
        for name, task in row.tasks.items()
    }
    *_, last = lines_of(row, list(row.tasks.values()), scores)
    assert last.task == "average" and last.shown()["difference"] == "+0.0" and last.published.value == 87.2
    assert len(lines_of(row, [row.tasks["rte"]], scores)) == 1


@pytest.fixture
def webnlg(tmp_path: Path) -> Path:
    """Return the row of LoRA on WebNLG without the score that starts Java."""
    data = yaml.safe_load((PAPER / "data" / "nlg.yaml").read_text())
    row = yaml.safe_load((PAPER / "table-14" / "gpt2-medium-lora.yaml").read_text())
    data["webnlg"]["metrics"].remove("meteor-webnlg")
    del row["tasks"]["webnlg"]["published"]["meteor-webnlg"]
    (tmp_path / "nlg.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "row.yaml").write_text(yaml.safe_dump({**row, "data": "nlg.yaml"}, sort_keys=False))
    return tmp_path / "row.yaml"


def test_texts_are_written_and_scored_by_group(webnlg: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    command = small(webnlg, "webnlg", bases, tmp_path, "--seeds", 1)
    found = run_json(*command)
    path = tmp_path / "out" / "webnlg" / "seed-0" / "outputs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["group"] for line in lines] == ["seen", "unseen"]
    assert lines[0]["prompt"] == "Aarhus : leaderName : Jacob_Bundsgaard<|endoftext|>"
    assert [line["references"] for line in lines] == [["The leader of Aarhus is Jacob Bundsgaard."] * 3] * 2
    groups = [f"{metric}-webnlg {group}" for metric in ("bleu", "ter") for group in ("unseen", "seen", "all")]
    assert [one["metric"] for one in found["results"]] == groups
    before = path.stat().st_mtime_ns
    assert run_json(*command)["results"] == found["results"]
    assert path.stat().st_mtime_ns == before


def test_what_could_not_be_written_is_told_before_anything_is_trained(
    webnlg: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    command = small(webnlg, "webnlg", bases, tmp_path, "--seeds", 1)
    refused("there is no file", *command, "--test-data", tmp_path / "none.json")
    data = Path(str(command[command.index("--data") + 1]))
    long = tmp_path / f"long{data.suffix}"
    long.write_text(data.read_text().replace("Jacob_Bundsgaard", "Jacob_Bundsgaard_" * 300))
    refused("the longest prompt has .* this model reads. It begins 'Aarhus", *command, "--test-data", long)
    assert not (tmp_path / "out").exists()


def test_a_start_from_nothing_is_another_run(bases: dict[str, Path], tmp_path: Path) -> None:
    row = Row.read(str(PAPER / "table-2" / "roberta-base-lora.yaml"))
    wanted = {"tasks": ("mnli", "rte"), "model": "m", "output": str(tmp_path), "seeds": 1}
    alone = jobs_of(row, Wanted(**wanted | {"tasks": ("rte",), "overrides": {"init_adapter": None}}))
    remember(alone, tmp_path)
    assert changes_of(row, alone[0], "paper")["start"] == "from nothing, not from mnli"
    alone[0].folder.mkdir(parents=True)
    (alone[0].folder / "recipe.yaml").write_text(alone[0].recipe.to_yaml())
    with pytest.raises(AdapterError, match="rte/seed-0: start_from was None, and is 'mnli' now"):
        remember(jobs_of(row, Wanted(**wanted)), tmp_path)


def test_texts_are_asked_as_they_were_trained(webnlg: Path, tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    data = runs.completions(tmp_path / "d.jsonl")
    keys = {"chat": True, "reader": None, "prompt": "prompt", "completion": "completion"}
    wanted = Wanted(model=str(base), data=str(data), eval_data=str(data), overrides=keys, output=str(tmp_path / "out"))
    job = jobs_of(Row.read(str(webnlg)), wanted)[0]
    assert job.test is not None
    rendering = rendering_of(dataclasses.asdict(job.recipe), load_tokenizer(str(base)))
    with pytest.raises(AdapterError, match="has no column 'category', by which webnlg is scored in groups"):
        asked(job, dataclasses.replace(job.test, groups="category"), rendering)
    prompts = list(asked(job, dataclasses.replace(job.test, groups=None), rendering))
    assert prompts[0] == rendering.prompt({"prompt": "0 fox?", "completion": ""}) != "0 fox?"
