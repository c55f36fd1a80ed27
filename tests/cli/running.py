"""Run the command line in this process, and a few things that its tests share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorank import AdapterError
from lorank.cli import app


def run(*words: object, typed: str | None = None) -> Any:
    """Run a command that goes well, and return what it printed."""
    found = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


def run_json(*words: object) -> Any:
    """Run a command with --json, and return its result; it must be JSON as the standard has it, without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(run(*words, "--json").stdout, parse_constant=refuse)


def refused(reason: str, *words: object) -> None:
    """Run a command that raises an AdapterError, and prints no result before."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(found.exception, AdapterError), (found.output, found.exception)
    with pytest.raises(AdapterError, match=reason):
        raise found.exception
    assert found.stdout == ""


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
