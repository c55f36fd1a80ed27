"""Programs whose packages do not go with the tests' own: installed apart, and run in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(environment: str, code: str, *arguments: object) -> str:
    """Run a program with the packages of `.venv/apart-{environment}`, and return what it prints.

    Skips the test where they are not installed.
    """
    packages = Path(sys.prefix) / f"apart-{environment}"
    if not packages.is_dir():
        pytest.skip(f"{packages.name} is not installed (tests/interop/requirements-{environment}.txt)")
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(packages)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
