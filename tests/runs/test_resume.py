"""A run that was stopped, killed or cut off goes on as if nothing had happened, or says why it cannot."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing

from lorank import AdapterError
from lorank.cli import app
from lorank.runs.run import Stopped, Trained

from .. import checkpoints
from . import cases

CHECKPOINT = "checkpoint.safetensors"


Result = tuple[dict[str, bytes], list[Any], bytes]


def uninterrupted(model: Path, data: Path, folder: Path, **changes: Any) -> Result:
    """Return what a run that nothing disturbs leaves."""
    cases.finish(cases.begin(cases.recipe(model, data, folder, **changes)))
    return result(folder)


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the run of `cases.recipe` on `cases.completions` leaves."""
    folder = tmp_path_factory.mktemp("whole")
    return uninterrupted(llama, cases.completions(folder / "d.jsonl"), folder / "run")


def result(folder: Path) -> Result:
    """Return a run's adapter, its metrics, and its last checkpoint without the seconds in it."""
    packed = (folder / CHECKPOINT).read_bytes()
    length = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + length])
    header["__metadata__"] = {
        key: value for key, value in json.loads(header["__metadata__"]["lorank.run"]).items() if key != "seconds"
    }
    return cases.adapter(folder), cases.metrics(folder), json.dumps(header).encode() + packed[8 + length :]


@pytest.mark.parametrize("stops", [(1,), (3, 8), (2, 4, 7)])
def test_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(
    stops: Sequence[int], llama: Path, tmp_path: Path, whole: Result
) -> None:
    """Six batches a pass and two a step, with dropout; evaluations at 3, 6 and 9, before and after the stops."""
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    run = cases.begin(cases.recipe(llama, data, folder))
    for stop in stops:
        cases.stop_at(run, stop)
        assert json.loads((folder / "run.json").read_text())["steps_done"] == stop
        torch.manual_seed(random.randrange(1000))
        run = cases.resume(folder)
        assert run.state.step == stop and run.remarks == []
    cases.finish(run)
    assert result(folder) == whole


def test_an_alpha_that_was_left_open_makes_the_same_file(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    settings = {"alpha": None, "steps": 2, "eval_share": 0}
    expected = uninterrupted(llama, data, tmp_path / "whole", **settings)
    cases.stop_at(cases.begin(cases.recipe(llama, data, folder, **settings)), 1)
    cases.finish(cases.resume(folder))
    assert result(folder) == expected


def test_a_classifier_goes_on_to_the_bit_with_its_head(bert: Path, tmp_path: Path) -> None:
    data, folder = cases.sentiments(tmp_path / "d.tsv"), tmp_path / "run"
    settings = {"bias": "adapted", "schedule": "cosine", "gradient_checkpointing": True, "best": "loss"}
    expected = uninterrupted(bert, data, tmp_path / "whole", **settings)
    cases.stop_at(cases.begin(cases.recipe(bert, data, folder, **settings)), 5)
    cases.finish(cases.resume(folder))
    assert result(folder) == expected


@pytest.mark.parametrize("events", [5, 6, 9, 13])
def test_cut_off_after_any_event_it_goes_on_from_the_last_checkpoint(
    events: int, llama: Path, tmp_path: Path, whole: Result
) -> None:
    """Steps after the checkpoint are made again; what was written of them, scores and adapter too, is written anew."""
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    cases.leave_after(cases.begin(cases.recipe(llama, data, folder)), events)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line that was cut off
    for name in (".checkpoint.safetensors.x1y2.partial", "adapter/.adapter_model.safetensors.x1y2.partial"):
        (folder / name).write_bytes(b"half")  # files that were
    cases.finish(cases.resume(folder))
    assert result(folder) == whole and not list(folder.rglob("*.partial"))


def test_before_the_first_checkpoint_it_begins_anew(llama: Path, tmp_path: Path, whole: Result) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    cases.leave_after(cases.begin(cases.recipe(llama, data, folder)), 2)
    run = cases.resume(folder)
    assert run.remarks == ["the run was stopped before its first checkpoint: it begins anew"]
    cases.finish(run)
    assert result(folder) == whole
    with pytest.raises(AdapterError, match=r"there is no run in .*nowhere"):
        cases.resume(tmp_path / "nowhere")
    (folder / CHECKPOINT).write_bytes(b"half a checkpo")
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        cases.resume(folder)


def test_a_finished_run_says_so_and_stays_as_it_is(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    expected = uninterrupted(llama, data, folder)
    (folder / "loss.png").unlink()  # killed after the last checkpoint, before the picture
    run = cases.resume(folder)
    (end,) = run.events()
    assert isinstance(end, Stopped) and end.done and end.step == 9
    assert run.remarks == ["all 9 steps of this run are done; nothing is left to train"]
    assert result(folder) == expected and (folder / "loss.png").is_file()
    answer = typer.testing.CliRunner().invoke(app, ["train", "--resume", str(folder)], catch_exceptions=False)
    assert answer.exit_code == 0 and "nothing is left to train" in answer.stderr and "done in" in answer.stdout


def test_changed_data_or_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    cases.stop_at(cases.begin(cases.recipe(base, data, folder)), 3)
    kept, whole = data.read_bytes(), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    data.write_text(kept.decode().replace("dog", "cat"))
    with pytest.raises(AdapterError, match=r"cannot resume \S+run: the data changed since it began"):
        cases.resume(folder)
    checkpoints.causal(base, seed=1)
    with pytest.raises(AdapterError, match="the data and the base changed"):
        cases.resume(folder)
    data.write_bytes(kept)
    with pytest.raises(AdapterError, match="the base changed since it began"):
        cases.resume(folder)
    assert whole == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shutil.copytree(llama, base, dirs_exist_ok=True)
    cases.finish(cases.resume(folder))


def test_an_adapter_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    cases.stop_at(cases.begin(cases.recipe(llama, data, folder)), 3)
    recipe = folder / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("rank: 2", "rank: 3"))
    with pytest.raises(AdapterError, match=r"the recipe changed since it began"):
        cases.resume(folder)


def test_another_number_of_threads_is_said(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    cases.stop_at(cases.begin(cases.recipe(llama, data, folder)), 3)
    torch.set_num_threads(2)
    try:
        run = cases.resume(folder)
    finally:
        torch.set_num_threads(1)
    assert run.remarks == ["the last digits will differ from an uninterrupted run: threads 1 then, 2 now"]
    cases.finish(run)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["checkpoint.safetensors", "adapter_model.safetensors", "metrics.jsonl"])
def test_a_full_disk_leaves_the_older_files_whole(what: str, llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    settings = {"checkpoint_every": 2 if what == CHECKPOINT else 9, "eval_every": 9 if what == "metrics.jsonl" else 3}
    expected = uninterrupted(llama, data, tmp_path / "whole", **settings)
    cases.stop_at(cases.begin(cases.recipe(llama, data, folder, **settings)), 3)
    before = other_files(folder)
    run = cases.resume(folder)
    room = (folder / "metrics.jsonl").stat().st_size + (250 if what == "metrics.jsonl" else 5000)
    with largest_file(room), pytest.raises(AdapterError, match=f"cannot write .*{what}.*: {os.strerror(errno.EFBIG)}"):
        cases.finish(run)
    assert other_files(folder) == before
    cases.finish(cases.resume(folder))
    assert result(folder) == expected


def other_files(folder: Path) -> dict[str, bytes]:
    """Return all files of a run but the metrics, which grow line by line."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}


def test_a_folder_that_is_gone_is_said_and_the_moved_one_is_whole(llama: Path, tmp_path: Path, whole: Result) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    run = cases.begin(cases.recipe(llama, data, folder))
    with pytest.raises(AdapterError, match=rf"cannot write {folder}"):
        for event in run.events():
            if isinstance(event, Trained) and event.step == 5:
                folder.rename(tmp_path / "moved")
                folder.write_text("in the way")
    folder.unlink()
    cases.finish(cases.resume(tmp_path / "moved"))
    assert result(tmp_path / "moved") == whole


# The real command in processes of its own. They are slow to start, so that there are few of them.

LONG = {"steps": 60, "eval_every": 9, "checkpoint_every": 4}


def command(*words: object, threads: int = 1) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NO_COLOR": "1", "COLUMNS": "500"}
    return subprocess.Popen(
        [sys.executable, "-m", "lorank", "train", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until a run has written down a step; fail if it ends before."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 100
    while not (path.is_file() and f'\n{{"step": {step}, "loss"' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def written(tmp_path: Path, llama: Path) -> tuple[Path, Path]:
    """Write the recipe of a longer run, and return it and the run's folder."""
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(cases.recipe(llama, data, folder, **LONG).to_yaml())
    return tmp_path / "recipe.yaml", folder


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_bit(llama: Path, tmp_path: Path) -> None:
    recipe, folder = written(tmp_path, llama)
    expected = uninterrupted(llama, tmp_path / "d.jsonl", tmp_path / "whole", **LONG)
    moments = sorted(random.sample(range(5, 46), 2))
    words: tuple[object, ...] = (recipe,)
    for step in moments:
        process = command(*words)
        wait_for_step(process, folder, step)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)  # 0 where this machine was so busy that it was done by then
        process.communicate()
        words = ("--resume", folder)
    process = command(*words)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert result(folder) == expected, f"killed near steps {moments}"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(llama: Path, tmp_path: Path) -> None:
    recipe, folder = written(tmp_path, llama)
    expected = uninterrupted(llama, tmp_path / "d.jsonl", tmp_path / "whole", **LONG)
    process = command(recipe)
    wait_for_step(process, folder, 10)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "stopping after this step, with a checkpoint" in told and "Traceback" not in told
    run = cases.resume(folder)
    step = run.state.step
    assert 10 <= step < 60
    assert out.splitlines()[-1] == f"stopped at step {step}; go on with: lorank train --resume {folder}"
    cases.finish(run)
    assert result(folder) == expected
