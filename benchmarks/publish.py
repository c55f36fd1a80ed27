"""Keep a finished `lorank compare` as a page of docs/results: its table, numbers, figure and small adapters.

    python -m benchmarks.publish runs/compare-sst2 docs/results/paper/sst2-bert --base sentence-transformers/MODEL

What names a place on this machine is written as a reader would: the base by its id, data by its name. Adapters are
those of the first seed; one of over 2 MB is left out.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from lorank.comparison.report import FIGURE, RESULTS, TABLE
from lorank.formats import safetensors_file

_LARGEST = 2_000_000  # bytes of an adapter


def publish(run: Path, target: Path, base: str) -> None:
    """Copy what there is to show of a comparison's folder."""
    facts = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    shared = facts["shared"]
    places = {shared["model"]: base, str(run): run.name}
    if data := os.environ.get("LORANK_DATA"):
        places[data.rstrip("/")] = "$LORANK_DATA"
    target.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, TABLE):
        (target / name).write_text(_renamed((run / name).read_text(encoding="utf-8"), places), encoding="utf-8")
    shutil.copyfile(run / FIGURE, target / FIGURE)
    for adapter in sorted(run.glob("*/final/*-seed-0/adapter")):
        if sum(file.stat().st_size for file in adapter.iterdir()) <= _LARGEST:
            _keep_adapter(adapter, target / "adapters" / adapter.parents[2].name, places)


def _keep_adapter(adapter: Path, target: Path, places: dict[str, str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        if file.suffix == ".safetensors":
            packed, _, metadata = safetensors_file.read(file)
            renamed = {key: _renamed(value, places) for key, value in metadata.items()}
            (target / file.name).write_bytes(safetensors_file.with_metadata(packed, renamed))
        else:
            text = _renamed(file.read_text(encoding="utf-8"), places)
            (target / file.name).write_text(text, encoding="utf-8")


def _renamed(text: str, places: dict[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return re.sub(r"[^\s']*/(?=recipes/)", "", text)


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("run", type=Path)
    words.add_argument("target", type=Path)
    words.add_argument("--base", required=True, help="the base's id, or what it is")
    given = words.parse_args()
    publish(given.run, given.target, given.base)
