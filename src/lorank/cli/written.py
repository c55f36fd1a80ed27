"""What `lorank eval --metrics` and `lorank score` share: answers written for the data, kept in a file, and scored."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError, raise_problems
from ..evaluation import Decoding, require_room
from ..formats.safetensors_file import write_atomically
from ..models import longest
from ..runs.loading import Loaded
from ..surgery import activate
from ..tasks import CausalLM, Output, Question
from ..tasks.base import evaluating
from ..tasks.writing import questions, score, write
from .console import err, number, table

Named = dict[str | None, list[Output]]  # by adapter; None is the base


def ask(loaded: Loaded, tasks: Mapping[str | None, Any], records: Any, decoding: Decoding, batch_size: int) -> Named:
    """Return what the base and adapters write for records, each in the way in which it was trained."""
    asked: dict[str | None, list[Question]] = {}
    for name, task in tasks.items():
        if not isinstance(task, CausalLM):
            raise AdapterError(f"--metrics scores what language models write; this is a {task.kind}")
        asked[name] = questions(task, records)
        require_room(
            task.tokenizer,
            [question.prompt for question in asked[name]],
            decoding,
            longest(loaded.model.config, task.tokenizer),
            special_tokens=task.rendering.special_tokens,
            around=len(task.special or ()),
        )
    return {name: _written(loaded, name, tasks[name], asked[name], decoding, batch_size) for name in asked}


def _written(
    loaded: Loaded, name: str | None, task: CausalLM, asked: list[Question], decoding: Decoding, batch_size: int
) -> list[Output]:
    from rich.progress import track

    activate(loaded.model, *([name] if name else []))
    with evaluating(loaded.model):
        made = write(loaded.model, task, asked, decoding, batch_size=batch_size)
        shown = f"{name or 'the base'} writes"
        found = dict(track(made, shown, len(asked), console=err, transient=True, disable=not err.is_terminal))
    return [found[i] for i in range(len(asked))]


def keep(found: Named, path: str) -> None:
    """Write outputs as JSON lines: adapter (null for the base), prompt, output, references. The file appears whole."""
    lines = [
        {"adapter": name, "prompt": one.question.prompt, "output": one.text, "references": one.question.references}
        for name, outputs in found.items()
        for one in outputs
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically({Path(path): text.encode()})


def kept(path: str) -> Named:
    """Return the outputs of a file as `keep` writes it; raises AdapterError that names the lines that are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # and at nothing else, as U+2028
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 text: {error}") from None
    found: Named = {}
    problems = []
    for number_, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name, output = _read(json.loads(line))
            found.setdefault(name, []).append(output)
        except (ValueError, TypeError, KeyError, AttributeError):
            problems.append(f"line {number_:,} is no {{output, references}}: {line:.60}")
    raise_problems(f"cannot score {path}", problems[:5] or ([] if found else ["it has no output"]))
    return found


def _read(line: Any) -> tuple[str | None, Output]:
    references = line["references"] if "references" in line else [line["reference"]]
    texts = [line["output"], *references]
    if isinstance(references, str) or not references or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return line.get("adapter"), Output(Question(line.get("prompt") or "", tuple(references)), line["output"])


def scored(found: Named, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of scores for each adapter."""
    rows = []
    for name, outputs in found.items():
        with err.status(f"scoring {name or 'the base'} ..."):
            rows.append({"adapter": name, **score(outputs, names)})
    return rows


def counts(found: Named) -> dict[str, int]:
    """Return of how many prompts and references the outputs of one adapter are."""
    first = next(iter(found.values()))
    return {"prompts": len(first), "references": sum(len(output.question.references) for output in first)}


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print rows of scores as a table."""
    alone = "(base)" if any(row["adapter"] for row in rows) else "-"  # another program's, or a model's that has none
    shown = [{"adapter": row["adapter"] or alone} | {key: number(row[key]) for key in list(row)[1:]} for row in rows]
    table(shown, title, numbers=list(shown[0])[1:])
