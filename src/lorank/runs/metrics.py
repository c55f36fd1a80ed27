"""What a run writes down: metrics.jsonl, TensorBoard's and Weights & Biases' logs, and the plot of the loss."""

import io
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..extras import require
from ..formats.safetensors_file import write_atomically

FILE, PLOT = "metrics.jsonl", "loss.png"


class Metrics:
    """Every step's numbers, a line of JSON each, and the same numbers for whoever else is to have them."""

    def __init__(
        self, folder: Path, *, after: int = 0, tensorboard: bool = False, wandb: str | None = None, config: Any = None
    ):
        """Open the files of a run that has done `after` steps; what was logged of later ones is dropped."""
        self.path = folder / FILE
        kept = [record for record in read(folder) if record["step"] <= after] if after else []
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically({self.path: lines.encode()})
        self._board = self._run = None
        if wandb:
            library = require("wandb", "wandb=...")
            identity = folder / "wandb_id.txt"
            if not identity.is_file():
                identity.write_text(secrets.token_hex(4))
            known: dict[str, Any] = {"id": identity.read_text(), "dir": str(folder), "name": folder.name}
            try:
                self._run = library.init(project=wandb, resume="allow", config=config, **known)
            except library.Error as error:
                raise AdapterError(f"cannot log to Weights & Biases: {error}") from error
        if tensorboard:
            board = require("torch.utils.tensorboard", "tensorboard=true")
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
        self._file = self.path.open("ab", buffering=0)  # a line that could not be written is not tried again

    def add(self, step: int, **numbers: Any) -> None:
        """Write down numbers of a step; it is on disk when this returns."""
        record = {"step": step, **{key: plain(value) for key, value in numbers.items()}}
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise AdapterError(f"cannot write {self.path}: {error.strerror}") from error
        values = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Finish all logs."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def require_libraries(tensorboard: bool, wandb: str | None) -> None:
    """Raise AdapterError when a library that a run will write with is missing."""
    require("matplotlib", "plotting the loss")
    if tensorboard:
        require("tensorboard", "tensorboard=true")
    if wandb:
        require("wandb", "wandb=...")


def plain(value: Any) -> Any:
    """Return a number as JSON has it: NaN and infinities become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics; a last line that was cut off by a crash is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise AdapterError(f"{path}, line {number} is not JSON: {line[:60]!r}") from None
    return records


def plot(folder: Path, records: Sequence[Mapping[str, Any]], title: str) -> Path:
    """Draw the loss of training and of held-out data over the steps, and return the picture's path."""
    require("matplotlib", "plotting the loss").use("Agg")
    figure, axes = require("matplotlib.pyplot", "plotting the loss").subplots(figsize=(7, 4), layout="constrained")
    steps = [record["step"] for record in records if record.get("loss") is not None]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="#1f5a99", linewidth=1.8, label="training, smoothed")
    held_out = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#d1495b", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    require("matplotlib.pyplot", "plotting the loss").close(figure)
    write_atomically({folder / PLOT: picture.getvalue()})
    return folder / PLOT


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average whose memory is a twentieth of the values."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth
