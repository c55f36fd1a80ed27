"""Adapters of nn.MultiheadAttention in PEFT's own layout: one pair for q, k and v, and one for the out_proj."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError

from .test_peft import peft_model


class Net(nn.Module):
    """Self-attention, attention to something else, and a linear layer."""

    def __init__(self, **options: Any):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, **options)
        self.second = nn.MultiheadAttention(8, 4, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        return self.head(x + self.second(x, other, other)[0])


CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["first", "second", "head"]},
    "one": {"target_modules": ["second"]},
    "rank-stabilised": {"target_modules": ["first", "second"], "use_rslora": True},
    "patterns": {
        "target_modules": ["first", "second", "head"],
        "rank_pattern": {"second": 3},
        "alpha_pattern": {"first": 7, "second": 0.5},
    },
}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 8), torch.randn(6, 2, 8)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def written(base: nn.Module, path: Path, **config: Any) -> nn.Module:
    """Return a model of PEFT that was saved."""
    theirs = peft_model(copy.deepcopy(base), r=2, **({"lora_alpha": 3} | config))
    theirs.save_pretrained(str(path))
    return theirs


# It says so of its own layers, which were merged for the forward and are asked to be again.
pytestmark = pytest.mark.filterwarnings("ignore:A(ll adapters are a)?lready (un)?merged:UserWarning")


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("settings", CONFIGS)
def test_lorank_reads_what_peft_writes(settings: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, x = Net(**options).eval(), inputs()
    theirs = written(base, tmp_path / "theirs", **CONFIGS[settings])
    model = copy.deepcopy(base)
    lorank.load(model, tmp_path / "theirs")
    assert_near(model(*x), theirs(*x))
    assert not torch.allclose(model(*x), base(*x), atol=1e-3)
    lorank.save(model, tmp_path / "ours")
    lorank.load(again := copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(*x), model(*x))
    lorank.merge(model)
    assert_near(model(*x), theirs.merge_and_unload()(*x))  # pyright: ignore[reportCallIssue]


def test_each_part_has_its_rows_of_the_pair_and_the_scale_of_its_attention(tmp_path: Path) -> None:
    base = Net()
    written(base, tmp_path, **CONFIGS["patterns"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    plan = lorank.load(base, tmp_path)
    told = {place.label: (place.spec.rank, getattr(place.spec, "alpha", 0)) for place in plan.places}
    assert told == {
        **{f"first[{part}]": (2, 7) for part in "qkv"},
        **{f"second[{part}]": (3, 0.5) for part in "qkv"},
        "first.out_proj": (2, 14),  # PEFT adds that one twice
        "second.out_proj": (3, 1),
        "head": (2, 3),
    }
    read = lorank.formats.read(tmp_path, base).updates["second"]
    A, B = (tensors[f"base_model.model.second.lora_{factor}.weight"] for factor in "AB")
    assert all(torch.equal(read.tensors[part]["A"], A) for part in "qkv")
    assert torch.equal(torch.cat([read.tensors[part]["B"] for part in "qkv"]), B)


def test_without_a_model_the_pair_of_the_projections_stays_one(tmp_path: Path) -> None:
    written(Net(), tmp_path, **CONFIGS["one"])
    content = lorank.formats.read(tmp_path)
    assert {name: list(update.tensors) for name, update in content.updates.items()} == {
        "second": ["weight"],
        "second.out_proj": ["weight"],
    }
    assert content.updates["second.out_proj"].spec.scale == 2 * content.updates["second"].spec.scale


def test_it_is_read_inside_of_a_transformer(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    theirs = written(base, tmp_path, target_modules=["self_attn"])
    lorank.load(model := copy.deepcopy(base), tmp_path)
    x, _ = inputs()
    theirs.train()  # in eval mode one kernel takes the weights, and PEFT hands it those of the base
    assert_near(model(x), theirs(x))
    assert not torch.allclose(model(x), base(x), atol=1e-3)


@pytest.mark.parametrize("version", ["0.21.3", "0.22.0", "1.0.0.dev0@UNKNOWN"])
def test_a_version_that_may_add_the_out_proj_once_is_refused(version: str, tmp_path: Path) -> None:
    base = Net()
    written(base, tmp_path, **CONFIGS["one"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": version}))
    with pytest.raises(AdapterError, match=rf"adds the update of out_proj twice; whether {version}"):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base = Net()
    written(base, tmp_path, **CONFIGS["one"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.second.lora_B.weight"
    for rows, message in ((23, r"no pair of factors of q, k and v"), (12, r"second\[q\]: B is \(4, 2\) in the file")):
        save_file(tensors | {key: tensors[key][:rows].clone()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            lorank.load(base, tmp_path)
    other = nn.ModuleDict({"second": nn.MultiheadAttention(8, 2, kdim=8, vdim=6)})
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="second"):
        lorank.load(other, tmp_path)
    assert lorank.adapter_names(base) == lorank.adapter_names(other) == []
