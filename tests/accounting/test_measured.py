"""The peak that is counted is, within 10 %, the one that real steps have, measured in a fresh process."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory import Case, cases, run

CASES = [
    Case("gpt2 4 x 1024", "adapter-h", 2, 128),
    Case("roberta 6 x 768", "lora", 4, 128),
    Case("llama 8 x 640", "full", 2, 128),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux has it")
def test_the_peak_of_a_step_is_the_one_that_was_counted() -> None:
    for case, found in zip(CASES, run(*CASES), strict=True):
        assert 0.9 < found.ratio < 1.1, (case, found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocators_peak_is_the_one_that_was_counted() -> None:
    several = [case for case in cases("cuda") if case.rows == 4]
    for case, found in zip(several, run(*several), strict=True):
        assert 0.9 < found.ratio < 1.1, (case, found)
