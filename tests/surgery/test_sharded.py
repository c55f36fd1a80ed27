"""Adapted models sharded over two processes with PyTorch's fully_shard."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TENSORS = "adapter_model.safetensors"


@pytest.mark.slow
def test_a_sharded_model_trains_and_every_process_saves_the_whole_adapter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [*command, "-m", "tests.surgery.sharded_worker", str(tmp_path)]
    subprocess.run(worker, check=True, cwd=Path(__file__).parents[2], timeout=300)
    whole = load_file(tmp_path / "whole" / TENSORS)
    for rank in range(2):
        saved = load_file(tmp_path / f"sharded-{rank}" / TENSORS)
        assert saved.keys() == whole.keys()
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, whole[key])
