"""A representative part of the sweep: one family of every kind. The whole of it is `python -m tests.sweep`."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from .families import case_of, families
from .procedure import Case, floats, run
from .report import page
from .shrinking import rule
from .worker import result_of

FAMILIES = [
    *("bert", "deberta_v2", "modernbert", "albert", "gpt2", "llama", "gemma2", "qwen3", "gpt_neox"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "t5", "bart", "m2m_100"),
    *("vit", "beit", "convnext", "segformer", "siglip", "clip"),
    *("whisper", "wav2vec2", "hubert", "llava", "qwen2_vl"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_works(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and of its models
        result = run(case_of(family))
    assert (result.outcome, result.reason) == ("works", "")
    assert result.layers > 0


def test_there_are_more_families_than_a_hundred() -> None:
    assert len(families()) > 100
    assert set(FAMILIES) <= set(families())


def test_names_tell_sizes() -> None:
    assert (rule("hidden_size"), rule("num_hidden_layers"), rule("hidden_act")) == (32, 2, None)


class Picky(nn.Module):
    """Does not run with a layer of another class than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.layer) is not nn.Linear:
            raise TypeError("I want my own layer")
        return self.layer(x)


class Unlike(nn.Module):
    """Computes something else on every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


def _case(build: type[nn.Module]) -> Case:
    return Case("made", build.__name__, "text", build, lambda model: {"x": torch.ones(2, 4)})


def test_a_fault_is_found() -> None:
    result = run(_case(Picky))
    assert result.outcome == "FAULT"
    assert result.reason.startswith("TypeError: I want my own layer (test_sweep.py:")


def test_a_model_that_cannot_be_compared_is_not_run() -> None:
    result = run(_case(Unlike))
    assert (result.outcome, result.reason) == ("not run", "two forward passes differ")


def test_what_cannot_be_built_is_told() -> None:
    result = result_of("no_such_family")
    assert result.outcome == "not run"
    assert result.reason


def test_floats_are_found_in_any_output() -> None:
    output = {"logits": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "states": (torch.ones(1), None)}
    assert [len(x) for x in floats(output)] == [2, 1]


def test_the_page_tells_every_family() -> None:
    results = [run(_case(Picky)), result_of("no_such_family")]
    text = page(results, 1e-4, "python -m tests.sweep")
    assert "2 families: 1 FAULT, 1 not run." in text
    assert all(f"| {result.family} |" in text for result in results)
