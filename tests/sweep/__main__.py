"""python -m tests.sweep [FAMILY...] [--json FILE] [--write PAGE]: run the sweep, or some of its families."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

from . import torchvision_families
from .families import families
from .procedure import TOLERANCE, Result
from .report import page
from .worker import results


def main() -> int:
    """Run the families that the command line names, or all; return 1 where there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("families", nargs="*", help="folders of transformers.models, or torchvision.NAME; all without")
    parser.add_argument("--json", type=Path, help="write every result here, a line each")
    parser.add_argument("--write", type=Path, help="write the page here, such as docs/architectures.md")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a family (60)")
    options = parser.parse_args()
    names = options.families or [*families(), *torchvision_families.families()]
    if not torchvision_families.available():
        print(f"torchvision is not there, so that its families are not run. {torchvision_families.HOW}")
    found: list[Result] = []
    with (options.json or Path("/dev/null")).open("w", encoding="utf-8") as file:
        for i, result in enumerate(results(names, options.limit), start=1):
            found.append(result)
            print(f"{i}/{len(names)} {told(result)}", flush=True)
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    counts = Counter(result.outcome for result in found)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))
    if options.write:
        command = " ".join(["python -m tests.sweep", *options.families, f"--write {options.write}"])
        options.write.write_text(page(found, TOLERANCE, command), encoding="utf-8")
    return 1 if counts["FAULT"] else 0


def told(result: Result) -> str:
    """Return a result as one line."""
    if result.outcome == "works":
        what = f"{result.layers} layers"
        what += f", {len(result.unused)} not reached by the input" if result.unused else ""
    else:
        what = " ".join(result.reason.split())[:300]
    return f"{result.family} ({result.model}, {result.seconds:.1f} s): {result.outcome}: {what}"


if __name__ == "__main__":
    sys.exit(main())
