"""Adapters that versions of PEFT from 0.1 on wrote are read as that version meant them.

`tests/data/peft-versions/make.py` made them with the versions themselves, with the outputs they had there.
"""

import copy
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError

from .test_peft import read_by_peft

FOLDER = Path(__file__).parents[1] / "data" / "peft-versions"


def _makers() -> Any:
    """Return the script that made the files, as a module."""
    spec = importlib.util.spec_from_file_location("peft_versions", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


make = _makers()
ALL = [(version, case) for version, cases in make.CASES_OF.items() for case in cases]

_LOST = r"bias is 'lora_only', and the file lacks its bias \(PEFT 0.7 to 0.20 trained such biases and did not save them"
_MIXED = r"conv: its lora_A mixes the channels of all (its|2) groups"
_EITHER = r"experts\.up: A and B are of the same size, and peft_version is None"
REFUSED = {
    ("0.7.1", "bias-of-adapted"): _LOST,
    ("0.20.0", "bias-of-adapted"): _LOST,
    ("0.14.0", "bias-of-update"): "lora_bias is True, which is not supported",
    ("0.7.1", "conv-in-groups"): _MIXED,
    ("0.15.2", "conv-in-groups"): _MIXED,
    ("0.16.0", "conv-in-groups"): _MIXED,
    ("0.17.1", "experts-square"): _EITHER,
}
READ = [pair for pair in ALL if pair not in REFUSED]
# PEFT has no layer that computes what these do; lorank's own files have them all the same.
LORANK_ALONE = {"attention", "experts-lone", "experts-lone-transposed"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning"),
]


def prepared(version: str, case: str, path: Path, **settings: Any) -> Path:
    """Return a copy of a folder with other settings."""
    shutil.copytree(FOLDER / version / case, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


def base(case: str) -> nn.Module:
    return make.build(make.CASES[case].model)


@functools.cache
def _loaded(version: str, case: str) -> nn.Module:
    model = base(case)
    lorank.load(model, FOLDER / version / case, allow_pickle=True)
    return model


def loaded(version: str, case: str) -> nn.Module:
    """Return a model with the adapter of a case; a pickle takes a process to open, so it is opened once."""
    return copy.deepcopy(_loaded(version, case))


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_files_are_those_that_the_script_makes() -> None:
    found = {(path.parent.name, path.name) for path in FOLDER.glob("*/*") if (path / "adapter_config.json").is_file()}
    assert found == set(ALL)
    assert REFUSED.keys() <= found


@pytest.mark.parametrize(("version", "case"), READ)
def test_lorank_computes_what_the_version_computed(version: str, case: str) -> None:
    model = loaded(version, case)
    expected = load_file(FOLDER / version / case / "expected.safetensors")
    assert_near(make.output(model), expected["output"])
    assert (make.output(model) - make.output(base(case))).abs().max() > 0.01
    if case == "gpt2-embedding":
        return  # tied, which cannot be merged without a word
    lorank.merge(model)
    assert_near(make.output(model), expected["output"])
    if "merged" in expected and case != "dora-embedding":  # 0.13 merged that as something else than it ran
        assert_near(make.output(model), expected["merged"])


@pytest.mark.parametrize(("version", "case"), READ)
def test_what_lorank_saves_of_it_is_what_peft_computes_today(version: str, case: str, tmp_path: Path) -> None:
    model = loaded(version, case)
    lorank.save(model, tmp_path)
    lorank.load(again := base(case), tmp_path)
    assert torch.equal(make.output(again), make.output(model))
    if case in LORANK_ALONE:
        with pytest.raises(ValueError, match="layers_pattern"):
            peft.PeftModel.from_pretrained(base(case), str(tmp_path))  # pyright: ignore[reportArgumentType]
        return
    assert_near(make.output(read_by_peft(base(case), tmp_path)), make.output(model))


@pytest.mark.parametrize(("version", "case"), REFUSED)
def test_what_cannot_be_computed_is_refused_with_the_reason(version: str, case: str) -> None:
    model = base(case)
    before = make.output(model)
    with pytest.raises(AdapterError, match=REFUSED[version, case]):
        lorank.load(model, FOLDER / version / case, allow_pickle=True)
    assert lorank.adapter_names(model) == []
    assert torch.equal(make.output(model), before)


def test_lost_biases_can_be_done_without(tmp_path: Path) -> None:
    """As PEFT reads the file, which has the base's biases then without a word."""
    path = prepared("0.20.0", "bias-of-adapted", tmp_path / "copy", bias="none")
    lorank.load(model := base("plain"), path)
    theirs = peft.PeftModel.from_pretrained(base("plain"), str(path)).eval()  # pyright: ignore[reportArgumentType]
    assert_near(make.output(model), make.output(theirs))


# What the versions around the two changes of the layout say of themselves, and how each read the square stacks.
SAID = {
    "0.17.1": ("0.17.1", "experts-square"),
    "0.18.0": ("0.18.1", "experts-square"),
    "0.18.0.dev0@UNKNOWN": ("0.18.1", "experts-square"),
    "0.19.0": ("0.19.0", "experts-square"),
    "0.19.2.dev0@0123abc": ("0.19.1", "experts-square"),
    "1.0.0": ("0.19.1", "experts-square"),
}


@pytest.mark.parametrize("said", SAID)
def test_the_version_tells_how_stacks_of_square_matrices_lie(said: str, tmp_path: Path) -> None:
    version, case = SAID[said]
    path = prepared(version, case, tmp_path / "copy", peft_version=said)
    lorank.load(model := base(case), path)
    assert_near(make.output(model), load_file(path / "expected.safetensors")["output"])


@pytest.mark.parametrize("said", ["0.18.1.dev0@UNKNOWN", "0.19.0.dev0@0123abc", "0.19.1rc1", "", "new", "0.19", None])
@pytest.mark.parametrize("case", ["experts-square", "experts-oblong"])
def test_where_no_release_tells_only_shapes_can(case: str, said: str | None, tmp_path: Path) -> None:
    path = prepared("0.18.1", case, tmp_path / "copy", peft_version=said)
    model = base(case)
    if case == "experts-oblong":
        lorank.load(model, path)
        assert_near(make.output(model), load_file(path / "expected.safetensors")["output"])
        return
    with pytest.raises(AdapterError, match=r"up to 0\.19\.0 PEFT had them the other way round"):
        lorank.load(model, path)
    assert lorank.adapter_names(model) == []


@pytest.mark.parametrize(
    ("version", "case", "settings", "message"),
    [
        ("0.18.1", "experts-square", {"peft_version": 18}, "peft_version is 18"),
        ("0.1.0", "parts", {"enable_lora": "q"}, "enable_lora is 'q'"),
        ("0.1.0", "parts", {"enable_lora": [True, True, True]}, "its factors have rank 1, adapter_config.json says 2"),
        ("0.1.0", "parts", {"enable_lora": [False, False]}, "are no pair of factors"),
        ("0.1.0", "parts", {"enable_lora": [True] * 5}, "are no factors of 5 of 5 parts"),
        ("0.1.0", "parts", {"enable_lora": [True, True] + [False] * 10**6}, "are no factors of 2 of 1000002 parts"),
        ("0.1.0", "parts", {"enable_lora": [True, False, True, False]}, "the model needs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    version: str, case: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = prepared(version, case, tmp_path / "copy", **settings)
    model = base(case)
    with pytest.raises(AdapterError, match=message):
        lorank.load(model, path, allow_pickle=True)
    assert lorank.adapter_names(model) == []
