"""lorank demo: the whole story on real weights, in minutes on a CPU."""

import os
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import err, out, result, say, table
from .options import Json
from .progress import Display, clock

_INTRODUCTION = """SmolLM2-135M, a language model with real weights, is to learn two tasks, with an adapter for each:
  describe  Queue.get(self, block=True, timeout=None)  ->  what does it do?
  name      Remove and return an item.  ->  what is it called?"""


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="a few steps only: shows that everything works")] = False,
    folder: Annotated[str, typer.Option("--out", help="where the adapters go")] = "lorank-demo",
    as_json: Json = False,
) -> None:
    """Train two adapters on one small language model, and compare, switch, merge and save them.

    The model is SmolLM2-135M, from a package; the data are the descriptions of the functions of the Python that runs
    this. No network, no GPU, a few minutes.

    \b
    Examples:
      lorank demo
      lorank demo --quick
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars for unpacking; nothing is downloaded here

    from ..demo.data import pairs
    from ..demo.story import FULL, QUICK, SKILLS, SPEC, TARGETS, Demo
    from ..demo.weights import smollm2

    began = time.monotonic()
    with err.status("reading the standard library, loading SmolLM2-135M ..."):
        train, held_out = pairs()
        demo = Demo(smollm2(), train, held_out, QUICK if quick else FULL)
    say(_INTRODUCTION)
    say(f"Data: {len(train):,} functions of the standard library; {len(held_out):,} of other packages are held out.")
    say(f"The adapters have rank {SPEC.rank}, on {' and '.join(TARGETS)}; the model's own weights are frozen.")
    scores = {}
    for skill in SKILLS:
        before = demo.score(skill, None)
        _learn(demo, skill)
        scores[skill.name] = {"before": before, "after": demo.score(skill, skill.name)}
    facts = {
        **demo.facts(Path(folder)),
        "scores": {name: {when: vars(score) for when, score in found.items()} for name, found in scores.items()},
        "outputs": demo.side_by_side(),
        "folder": folder,
        "seconds": round(time.monotonic() - began, 1),
    }

    def show() -> None:
        _show_scores(facts)
        _show_outputs(facts)
        _show_facts(facts)
        if quick:
            out.print("(--quick trains a few steps only; lorank demo without it learns more)")
        _show_next(str(demo.folder), folder)

    result(facts, as_json, show)


def _learn(demo: Any, skill: Any) -> None:
    """Train one skill, with a bar."""
    from ..runs.run import Trained, peak_memory

    say(f"\nadapter '{skill.name}': {skill.says}", "bold")
    display = Display(demo.size.steps)
    with display.showing():
        began = time.perf_counter()
        for step, tokens in demo.learn(skill):
            now = time.perf_counter()
            speed, memory = tokens / (now - began), peak_memory(step.loss.device)
            rate, loss = step.learning_rate, float(step.loss)
            display.trained(Trained(step.index, demo.size.steps, loss, rate, speed, memory))
            began = now


def _show_scores(facts: dict[str, Any]) -> None:
    from ..demo.story import SKILLS

    rows = []
    for skill in SKILLS:
        before, after = facts["scores"][skill.name]["before"], facts["scores"][skill.name]["after"]
        row = {"on held-out examples": f"{skill.says} ({before['asked']})"}
        row |= {"loss": f"{before['loss']:.2f} -> {after['loss']:.2f}"}
        row |= {"perplexity": f"{before['perplexity']:.1f} -> {after['perplexity']:.1f}"}
        rows.append(row | {"right to the letter": f"{before['right']} -> {after['right']}"})
    out.print()
    table(rows, "Before and after, the base and with its adapter", numbers=tuple(rows[0])[1:])


def _show_outputs(facts: dict[str, Any]) -> None:
    """Show what one model in memory answers with no adapter, and with each."""
    for row in facts["outputs"]:
        out.print()
        out.print(" | ".join(row["prompt"].splitlines()), style="bold")
        for who in ("base", "describe", "name", "truth"):
            mark = "  <- learned this" if who == row["skill"] else ""
            out.print(f"  {who:9} {row[who][:90]}{mark}")


def _show_facts(facts: dict[str, Any]) -> None:
    from ..accounting import readable

    trained, size = next(iter(facts["trainable_parameters"].values())), next(iter(facts["adapter_bytes"].values()))
    base = facts["base_parameters"]
    bits = "are the same bits as at the start" if facts["base_unchanged"] else "ARE NOT THE SAME as at the start"
    lines = {
        "trained": f"{trained:,} parameters an adapter, {trained / base:.2%} of the base's {base:,}",
        "on disk": f"{readable(size)} an adapter, {readable(facts['base_bytes'])} the base",
        "merged": "into the weights the adapters answer the same: logits of up to "
        f"{max(facts['largest_logit'].values()):.0f} differ by at most {max(facts['merged_differs_by'].values()):.0e}",
        "switched": f"one base in memory gave all the answers above in turn; its weights {bits}",
        "took": f"{clock(facts['seconds'])} altogether",
    }
    out.print()
    for what, text in lines.items():
        out.print(f"{what:9} {text}")


def _show_next(model: str, folder: str) -> None:
    out.print("\nYour own data, in three commands (any model of the hub will do, or a folder):", style="bold")
    train = f"lorank train --model {shlex.quote(model)} --data yours.jsonl --prompt question --completion answer"
    for command in (
        f"{train} --output runs/mine",
        "lorank generate --adapter runs/mine --prompt 'a question'",
        "lorank merge --adapter runs/mine --out merged",
    ):
        out.print(f"  {command}")
    out.print(f"What is in an adapter of this demo: lorank inspect {shlex.quote(folder)}/describe")
