"""What TensorBoard and Weights & Biases get is what metrics.jsonl has."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorank import AdapterError

from . import cases

# tensorboard's own readers are older than the protobuf and numpy that they run on
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def written(folder: Path) -> dict[tuple[str, int], float]:
    """Return the numbers of metrics.jsonl, rounded to float32 as TensorBoard keeps them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (key, record["step"]): float(torch.tensor(value, dtype=torch.float32))
        for record in records
        for key, value in record.items()
        if key != "step"
    }


def test_tensorboard_shows_the_numbers_of_the_metrics(llama: Path, tmp_path: Path) -> None:
    """After steps that were lost and made again too: those that were logged first are gone."""
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    wanted = cases.recipe(llama, data, folder, tensorboard=True, steps=6, checkpoint_every=4)
    cases.leave_after(cases.begin(wanted), 7)  # the first evaluation, five steps and another evaluation
    assert max(step for _, step in scalars(folder)) == 5
    cases.finish(cases.resume(folder))
    found = scalars(folder)
    assert found == written(folder)
    assert {"loss", "eval_loss", "learning_rate", "grad_norm"} <= {key for key, _ in found}
    assert sorted(step for key, step in found if key == "loss") == [1, 2, 3, 4, 5, 6]


def test_wandb_logs_without_a_network(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    cases.stop_at(cases.begin(cases.recipe(llama, data, folder, wandb="trial", steps=4)), 2)
    cases.finish(cases.resume(folder))
    identity = (folder / "wandb_id.txt").read_text()
    logs = sorted((folder / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(logs) == 2  # before and after the stop, of one run
    for log in logs:
        content = log.read_bytes()
        for key in (b"grad_norm", b"learning_rate", b"tokens_per_second", b"trial"):
            assert key in content


@pytest.mark.parametrize(
    "library, extra, settings",
    [
        ("tensorboard", "tensorboard", {"tensorboard": True}),
        ("wandb", "wandb", {"wandb": "trial"}),
        ("matplotlib", "train", {}),
    ],
)
def test_a_library_that_is_missing_is_named_before_anything_is_written(
    library: str, extra: str, settings: dict[str, Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    data = cases.completions(tmp_path / "d.jsonl")
    with pytest.raises(AdapterError, match=rf"needs {library}: pip install 'lorank\[{extra}\]'"):
        cases.begin(cases.recipe(llama, data, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_service_that_refuses_is_an_error_of_ours(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", wandb="a/b"))  # no name that wandb takes
    with pytest.raises(AdapterError, match="cannot log to Weights & Biases: Invalid project name"):
        cases.finish(run)
