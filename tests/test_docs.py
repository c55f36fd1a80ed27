"""Every code block of the README and of docs/ runs, and every output shown is what comes out.

`python` blocks share one namespace, and `text` is what the block before prints. `console` blocks hold `$ lorank ...`
lines, each with its output, in which numbers may differ, but for counts in full (1,234), and a line `...` stands for
any lines. A `yaml` or `json` block that begins with a comment `# name` is a file of that name.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lorank import formats, hosts, variants
from lorank.cli import app
from lorank.errors import AdapterError

from . import checkpoints, models
from .hub_server import Hub, connected

ROOT = Path(__file__).parents[1]
COMMANDS = (  # each page goes on from the one before
    *("train", "compare", "reproduce", "eval", "score", "generate", "merge", "inspect", "plan", "demo"),
    *("convert", "combine", "resize", "scale", "diff", "extract", "push", "pull"),
)
CHAPTERS = [
    *([page] for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))),
    [ROOT / "docs" / "commands" / f"{name}.md" for name in COMMANDS],
    *([page] for page in sorted((ROOT / "docs" / "results").glob("*.md"))),
]
PAGES = [page for chapter in CHAPTERS for page in chapter]
BLOCK = re.compile(r"^```(python|text|console|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:yaml|jsonl))$", re.MULTILINE)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Yield what a page's code may take for granted: a model in path/to/model, batches for it, and a hub."""
    models.llama().save_pretrained(tmp_path / "path" / "to" / "model")
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    registries = (formats.FORMATS, hosts.base._HOSTS, hosts.fused_qkv._LAYOUTS, variants.METHODS)
    before: list[dict[Any, Any]] = [dict(registry) for registry in registries]
    batches = [{"input_ids": ids, "labels": ids} for ids in (models.ids(2, 6) for _ in range(4))]
    hub = Hub()
    hub.big = 10**9
    with hub.running(), connected(hub, tmp_path / "home"):
        yield {"__name__": "docs", "batches": batches}
    for registry, content in zip(registries, before, strict=True):  # what a page registered goes with it
        registry.clear()
        registry.update(content)


def write_files(folder: Path) -> None:
    """Write what the pages of the command line start from: models in `base` and `encoder`, data, and the recipes."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    checkpoints.causal(folder / "base")
    checkpoints.encoder(folder / "encoder")
    for name, count in (("questions", 60), ("held_out", 12)):
        records = [{"question": f"what is {i}?", "answer": f"it is {i % 7}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, count in (("reviews", 80), ("dev", 20)):
        rows = [f"a {('bad', 'good')[i % 2]} film {i}\t{('negative', 'positive')[i % 2]}" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")


def run_console(block: str) -> list[tuple[str, str, str]]:
    """Run a block's commands; return each with the output shown and the output there is."""
    found = []
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        words = shlex.split(command)
        assert words[0] == "lorank", command
        result = CliRunner().invoke(app, words[1:])
        output = result.output
        if isinstance(result.exception, AdapterError):
            output += f"error: {result.exception}\n"
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        found.append((command, shown, output))
    return found


def masked(text: str) -> str:
    """Return a text in which numbers look alike, blanks between words do, and any hub is the real one.

    Those in full (1,234), but for speeds, are counts, and stay.
    """
    text = re.sub(r"http://127\.0\.0\.1:\d+", "https://huggingface.co", text)
    text = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?![\d,]|\.\d| tokens/s)|\d[\d,.:]*(?:e[+-]?\d+)?", r"<\1>", text)
    return "\n".join(re.sub(r"[ \t-]+", " ", line).strip() for line in text.strip().splitlines())


def matches(shown: str, output: str) -> bool:
    """Tell whether a shown output is what came out, but for numbers and lines left out with `...`."""
    pattern = "\n".join(".*?" if line == "..." else re.escape(line) for line in masked(shown).splitlines())
    return re.fullmatch(pattern, masked(output), re.DOTALL) is not None


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter[0].stem)
def test_code_blocks_run_and_print_what_is_shown(chapter: list[Path], surroundings: dict[str, Any]) -> None:
    for page in chapter:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(BLOCK.findall(text)), f"{page}: a block of a kind that is not run"
        printed = ""
        for kind, block in BLOCK.findall(text):
            if kind == "text":
                assert printed.strip() == block.strip()
            elif kind == "yaml":
                name = FILE.match(block)
                assert name, "a file's block begins with its name, as a comment"
                Path(name[1]).write_text(block, encoding="utf-8")
            elif kind == "console":
                for command, shown, output in run_console(block):
                    assert matches(shown, output), f"{page.name}: $ {command}\n{output}"
            else:
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    line = text[: text.index(block)].count("\n")
                    exec(compile("\n" * line + block, str(page), "exec"), surroundings)
                printed = output.getvalue()


def test_every_command_has_a_page() -> None:
    assert sorted(COMMANDS) == sorted(command.name or "" for command in app.registered_commands)
    assert sorted(COMMANDS) == sorted(page.stem for page in (ROOT / "docs" / "commands").glob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_table_of_layouts_has_as_many_modules_as_the_readme_says() -> None:
    from lorank.hosts.fused_qkv import _LAYOUTS

    claimed = re.search(r"layouts of (\d+) modules", PAGES[0].read_text(encoding="utf-8"))
    known = [owner for owner, _ in _LAYOUTS if owner.startswith("transformers.")]
    assert claimed and int(claimed[1]) == len(known)
    assert torch.get_num_threads() == 1
