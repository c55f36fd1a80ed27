"""Real outputs to score: of each meaning in E2E's test set with several references, the last stands for a system's."""

import csv
import os
from pathlib import Path

import pytest


def held_out_references() -> tuple[list[str], list[list[str]]]:
    """Return 616 texts that people wrote, and the 4,063 that others wrote for the same meanings."""
    data = os.environ.get("LORANK_DATA")
    if not data:
        pytest.skip("LORANK_DATA names no folder with the E2E data set")
    groups: dict[str, list[str]] = {}
    with (Path(data) / "e2e" / "test.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["mr"], []).append(row["ref"])
    several = [texts for texts in groups.values() if len(texts) > 1]
    return [texts[-1] for texts in several], [texts[:-1] for texts in several]
