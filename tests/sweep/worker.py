"""The process that runs cases: reads a name a line, writes a result a line. One that hangs or dies is replaced."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import IO

from .procedure import Result, failed, run

TORCHVISION = "torchvision."  # what the names of its families begin with


def results(names: Iterable[str], limit: float) -> Iterator[Result]:
    """Yield the result of every case, from a process of each library's own that gets `limit` seconds for a case."""
    process: subprocess.Popen[str] | None = None
    library = ""
    for name in names:
        before, library = library, name.rpartition(".")[0]
        if process is not None and before != library:
            process.kill()
            process.wait()
        if process is None or process.poll() is not None:
            process = _started()
        yield _asked(process, name, limit)
    if process is not None:
        process.kill()
        process.wait()


def _started() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sweep.worker"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)


def _asked(process: subprocess.Popen[str], name: str, limit: float) -> Result:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], limit)
    line = process.stdout.readline() if ready else ""
    if line:
        return Result(**json.loads(line))
    process.kill()
    code = process.wait()
    why = f"the process ended with code {code}" if ready else f"took more than {limit:g} seconds"
    return Result(name, outcome="not run", reason=why)


def result_of(name: str) -> Result:
    """Return the result of one case, with what goes wrong before it runs."""
    try:
        if name.startswith(TORCHVISION):
            from . import torchvision_families

            return run(torchvision_families.case_of(name.removeprefix(TORCHVISION)))
        from .families import case_of

        return run(case_of(name))
    except Exception as error:
        return failed(name, error)


def main(answers: IO[str]) -> None:
    """Answer every line of the standard input."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        answers.write(json.dumps(dataclasses.asdict(result_of(line.strip()))) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)  # what models print goes elsewhere
        main(stream)
