"""Merging on disk: how much memory it takes, and what is there when it is killed or the disk is full."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lorank
import lorank.cli
from lorank import LoRA
from lorank.formats import read
from lorank.models import empty_base
from lorank.streaming import merge_checkpoint

from .. import checkpoints, models

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork, signals and limits of POSIX")
MB = 2**20


def child(function: Any, *words: object) -> Any:
    """Start a function in a process of its own, in which all of this is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=words)
    process.start()
    return process


def merge(base: Path, adapter: Path, target: Path, begun: Any = None) -> None:
    torch.set_num_threads(1)
    empty = empty_base(str(base), "causal-lm")
    content = read(adapter, empty)
    if begun is not None:
        begun.set()
    merge_checkpoint(base, content, empty, target)


def base_and_adapter(folder: Path, shards: str, **sizes: Any) -> tuple[Path, Path]:
    base, adapter = folder / "base", folder / "adapter"
    model: Any = LlamaForCausalLM(models.llama(**sizes).config)
    model.save_pretrained(base, max_shard_size=shards)
    checkpoints.causal_tokenizer().save_pretrained(base)
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    models.disturb(model)
    lorank.save(model, adapter)
    return base, adapter


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(small: Path, large: Path) -> None:
    merge(small / "base", small / "adapter", small / "merged")  # what is loaded and kept once is not counted
    before = memory("VmRSS")
    merge(large / "base", large / "adapter", large / "merged")
    (large / "memory").write_text(str(memory("VmHWM") - before))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 64}
    base_and_adapter(tmp_path / "small", "64MB", num_hidden_layers=1, **sizes)
    base, _ = base_and_adapter(tmp_path / "large", "32MB", num_hidden_layers=24, **sizes)
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(shards) >= 6 and sum(shards) > 180 * MB and max(shards) < 33 * MB
    process = child(measure, tmp_path / "small", tmp_path / "large")
    process.join(120)
    assert process.exitcode == 0
    needed = int((tmp_path / "large" / "memory").read_text())
    assert needed < max(shards), f"{needed / MB:.0f} MB for shards of {max(shards) / MB:.0f} MB"


def test_killed_at_any_moment_it_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "100KB", num_hidden_layers=20)
    event = multiprocessing.get_context("forkserver").Event
    merge(base, adapter, tmp_path / "whole")
    wanted = bytes_in(tmp_path / "whole")
    moments, longest, absent = random.Random(0), 0.0, 0
    for i in range(16):
        target, begun = tmp_path / f"merged-{i}", event()
        process = child(merge, base, adapter, target, begun)
        assert begun.wait(60)
        began = time.perf_counter()
        if i:
            time.sleep(moments.uniform(0, longest))
            process.kill()
        process.join()
        longest = longest or time.perf_counter() - began  # the first is not killed
        absent += not target.exists()
        if target.exists():
            assert bytes_in(target) == wanted
    assert absent > 3, "hardly a process was killed in its work"
    LlamaForCausalLM.from_pretrained(tmp_path / "whole")


def merge_on_a_full_disk(errors: Path, *words: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    sys.stdout = sys.stderr = errors.open("w")
    sys.argv = ["lorank", "merge", *words]
    lorank.cli.main()


@pytest.mark.parametrize("option", [(), ("--in-memory",)])
def test_a_full_disk_is_told_and_leaves_nothing(option: tuple[str, ...], tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "100KB")
    assert any(path.stat().st_size > 50_000 for path in base.iterdir())
    (tmp_path / "place").mkdir()
    target, errors = tmp_path / "place" / "merged", tmp_path / "errors"
    words = ("--adapter", adapter, "--model", base, "--out", target, *option)
    process = child(merge_on_a_full_disk, errors, *map(str, words))
    process.join(60)
    assert process.exitcode == 1
    assert f"error: cannot write {target}: " in errors.read_text() and "Traceback" not in errors.read_text()
    assert not list((tmp_path / "place").iterdir())
