"""A run on the screen: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from .console import err, number, say

_QUIET = 10.0  # seconds between plain lines


class Display:
    """Shows events of a run."""

    def __init__(self, steps: int, begin: int = 0):
        self.steps, self.first = steps, begin
        self.began = self.spoke = time.monotonic()
        self.loss: float | None = None  # smoothed
        self.bar: Progress | None = None

    @contextmanager
    def showing(self) -> Iterator["Display"]:
        """Keep the bar on the screen for a block."""
        if not err.is_terminal:
            yield self
            return
        fixed = Column(no_wrap=True)
        self.bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=fixed),
            TextColumn("{task.fields[numbers]}", table_column=fixed),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("left", table_column=fixed),
            console=err,
            expand=True,
        )
        with self.bar:
            self.task = self.bar.add_task("", total=self.steps, completed=self.first, numbers="")
            yield self

    def trained(self, event: Any) -> None:
        """Show an optimiser step."""
        from ..accounting import readable

        self.loss = event.loss if self.loss is None else 0.9 * self.loss + 0.1 * event.loss
        numbers = f"loss {self.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s  {readable(event.memory)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=event.step, numbers=numbers)
            return
        now = time.monotonic()
        if event.step == self.first + 1:  # it takes longer than others, and the evaluation before it is no step
            self.began = self.spoke = now
            say(f"step {event.step}/{self.steps}  {numbers}")
        elif event.step == self.steps or now - self.spoke >= _QUIET:
            self.spoke = now
            left = (now - self.began) / (event.step - self.first - 1) * (self.steps - event.step)
            say(f"step {event.step}/{self.steps}  {numbers}  {clock(left)} left")

    def evaluated(self, event: Any) -> None:
        """Show the scores of an evaluation."""
        scores = "  ".join(f"{name} {number(value)}" for name, value in event.scores.items())
        line = Text(f"held out, step {event.step}: {scores}")
        if event.kept:
            line.append("  (best so far, kept)", style="green")
        err.print(line)


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
