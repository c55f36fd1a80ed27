"""Every method beside LoRA, with as many trained numbers, on SST-2 with all-MiniLM-L6-v2 (22.7 M parameters).

    LORANK_DATA=path/to/data python -m benchmarks.methods --model path/to/MiniLM --write docs/results/methods.md

Each method trains once, with the rate that suits LoRA here, or one of its own where its steps are of another size. The
loss is that on 500 sentences held out of the training data, the accuracy that on the 872 sentences of the development
set. Rows are written as they are done, and what is there already is not run again.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from lorank.copies import count, own_parameters
from lorank.data import in_order, open_source
from lorank.runs.columns import named_labels
from lorank.runs.prepare import prepare
from lorank.runs.recipe import Recipe
from lorank.runs.run import Evaluated, Run, Stopped
from lorank.tasks.base import evaluating, to_device

RATE = 3e-3
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 8},
    "LoRA+": {"rank": 8, "lora_plus": 16, "rate": 5e-4},
    "DoRA": {"method": "dora", "rank": 8},
    "PiSSA": {"method": "pissa", "rank": 8},
    "OLoRA": {"method": "olora", "rank": 8},
    "MiLoRA": {"method": "milora", "rank": 8},
    "EVA": {"method": "eva", "rank": 8},
    "LoRA-GA": {"method": "lora-ga", "rank": 8},
    "LoRA-FA": {"method": "lora-fa", "rank": 16},
    "AdaLoRA": {"method": "adalora", "rank": 12, "method_options": {"target_rank": 8}, "rate": 2e-2},
    "LoHa": {"method": "loha", "rank": 4},
    "LoKr": {"method": "lokr", "rank": 16, "method_options": {"factor": 2}},
    "VeRA": {"method": "vera", "rank": 1024, "rate": 3e-2},
    "LoRA of rank 2": {"rank": 2},
}


@dataclasses.dataclass(frozen=True)
class Result:
    method: str
    rank: int
    learning_rate: float
    parameters: int
    held_out_loss: float
    accuracy: float
    seconds_per_step: float


def train(model: str, data: Path, name: str, rate: float, steps: int) -> Result:
    """Train one method with one rate, and return how it did."""
    settings = {key: value for key, value in METHODS[name].items() if key != "rate"}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model=model,
            data=str(data / "sst2" / "train.tsv"),
            text="sentence",
            label="label",
            task="classification",
            limit=500 + 16 * steps,
            eval_share=500 / (500 + 16 * steps),
            eval_limit=500,
            targets=["query", "value"],
            learning_rate=rate,
            steps=steps,
            batch_size=16,
            eval_every=steps,
            output=str(Path(folder) / "run"),
            best="loss",
            **settings,
        )
        prepared = prepare(recipe)
        run = Run(prepared)
        events = list(run.events())
        scored = [event for event in events if isinstance(event, Evaluated)][-1]
        end = events[-1]
        assert isinstance(end, Stopped)
        assert prepared.plan.spec is not None, "methods of updates alone are compared here"
        head = sum(count(own_parameters(module)) for module in prepared.plan.copies.values())
        return Result(
            method=name,
            rank=prepared.plan.spec.rank,
            learning_rate=rate,
            parameters=prepared.plan.trainable_parameters - head,
            held_out_loss=scored.scores["loss"],
            accuracy=_on_development_set(run, model, data),
            seconds_per_step=end.seconds / steps,
        )


def _on_development_set(run: Run, model: str, data: Path) -> float:
    """Return the accuracy of a trained model on the development set."""
    prepared = run.prepared
    records = open_source(str(data / "sst2" / "dev.tsv"), "train", None)
    records, _ = named_labels(records, "label", wanted=False)
    examples = prepared.task.examples(records)
    batches = in_order([len(example.ids) for example in examples], 64)
    with evaluating(prepared.model):
        collated = (prepared.task.collate([examples[i] for i in numbers]) for numbers in batches)
        scores = prepared.task.measure(prepared.model, (to_device(batch, prepared.device) for batch in collated))
    return scores["accuracy"]


def table(results: list[Result]) -> str:
    """Return a line for each method."""
    lines = ["| method | rank | trained numbers | rate | held-out loss | accuracy |", "|---" * 6 + "|"]
    for name in METHODS:
        runs = [result for result in results if result.method == name]
        if runs:
            last = runs[-1]
            lines.append(
                f"| {name} | {last.rank} | {last.parameters:,} | {last.learning_rate:g} | {last.held_out_loss:.3f} | "
                f"{last.accuracy:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--results", type=Path, default=Path("methods.jsonl"), help="finished runs, one a line")
    parser.add_argument("--write", type=Path, help="put the table into this page, after the line <!-- table -->")
    given = parser.parse_args()
    data = Path(os.environ["LORANK_DATA"])
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    for name, settings in METHODS.items():
        rate = settings.get("rate", RATE)
        if any(result.method == name and result.learning_rate == rate for result in results):
            continue
        began = time.perf_counter()
        results.append(train(given.model, data, name, rate, given.steps))
        with given.results.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(results[-1])) + "\n")
        print(f"{time.perf_counter() - began:.0f} s: {results[-1]}", flush=True)
    print(table(results))
    if given.write is not None:
        before, _, _ = given.write.read_text(encoding="utf-8").partition("<!-- table -->\n")
        given.write.write_text(f"{before}<!-- table -->\n{table(results)}", encoding="utf-8")


if __name__ == "__main__":
    main()
