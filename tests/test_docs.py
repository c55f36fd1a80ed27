"""Every code block of the README and of docs/ runs, and every output shown is what comes out."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorank import formats, hosts, variants

from . import models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Yield what a page's code may take for granted: a model in path/to/model, and batches for it."""
    models.llama().save_pretrained(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    registries = (formats.FORMATS, hosts.base._HOSTS, hosts.fused_qkv._LAYOUTS, variants.base._VARIANTS)
    before: list[dict[Any, Any]] = [dict(registry) for registry in registries]
    batches = [{"input_ids": ids, "labels": ids} for ids in (models.ids(2, 6) for _ in range(4))]
    yield {"__name__": "docs", "batches": batches}
    for registry, content in zip(registries, before, strict=True):  # what a page registered goes with it
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_is_shown(page: Path, surroundings: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(BLOCK.findall(text)), "a block of a kind that is not run"
    printed = ""
    for kind, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "text":
            assert printed.strip() == block.strip()
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, str(page), "exec"), surroundings)
        printed = output.getvalue()


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
