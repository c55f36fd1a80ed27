"""Faults of other tools, by the thread that reports them: keys that never loaded."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models

TENSORS = "adapter_model.safetensors"


def trained(tmp_path: Path, name: str = "default") -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a base, the same with an adapter, and an input; the adapter is saved in tmp_path."""
    base, x = models.llama(), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), ["q_proj", "v_proj"], name=name)
    models.disturb(model)
    lorank.save(model, tmp_path)
    return base, model, x


def rewrite(path: Path, change: dict[str, str | None]) -> None:
    """Rename tensors in a file, or drop them (None); lorank's header goes, as with any other tool's file."""
    tensors = load_file(path / TENSORS)
    kept = {change.get(key, key): tensor for key, tensor in tensors.items()}
    save_file({key: tensor for key, tensor in kept.items() if key is not None}, path / TENSORS)


@pytest.mark.parametrize("name", ["lora", "weight", "lora_A", "base_layer", "model", "adapters"])
def test_peft_2699_an_adapter_may_have_any_name(name: str, tmp_path: Path) -> None:
    base, model, x = trained(tmp_path, name)
    lorank.load(base, tmp_path, name=name)
    assert torch.equal(base(x).logits, model(x).logits)


@pytest.mark.parametrize("thread", ["peft#2772", "peft#2773"])
@pytest.mark.parametrize("layer", ["weight", "weight_proj", "lora_A", "base_layer_fc", "bias", "default"])
def test_a_layer_may_have_any_name(thread: str, layer: str, tmp_path: Path) -> None:
    base, x = nn.ModuleDict({layer: nn.Linear(6, 6), "other": nn.Linear(6, 6)}), torch.randn(2, 6)
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), [layer])
    models.disturb(model)
    lorank.save(model, tmp_path)
    lorank.load(base, tmp_path)
    assert torch.equal(base[layer](x), model[layer](x))
    with lorank.disabled(base):
        assert not torch.equal(base[layer](x), model[layer](x))


@pytest.mark.parametrize("thread", ["peft#1932", "peft#1323", "peft#2084", "peft#2118"])
def test_missing_and_unexpected_keys_are_errors_and_nothing_else_is(thread: str, tmp_path: Path) -> None:
    base, model, x = trained(tmp_path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(tmp_path, {})
    twin = copy.deepcopy(base)
    lorank.load(twin, tmp_path)  # a good file: no false alarm, and pytest turns warnings into errors
    assert torch.equal(twin(x).logits, model(x).logits)

    rewrite(tmp_path, {key: None})
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: the file lacks lora_B"):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []


def test_keys_without_a_place_are_named_with_the_nearest_right_name(tmp_path: Path) -> None:
    base, _, _ = trained(tmp_path)
    old = "base_model.model.model.layers.1.self_attn.q_proj."
    new = "base_model.model.model.layers.1.self_attn.q_prj."
    rewrite(tmp_path, {f"{old}{factor}.weight": f"{new}{factor}.weight" for factor in ("lora_A", "lora_B")})
    with pytest.raises(
        AdapterError, match=r"adapts model\.layers\.1\.self_attn\.q_prj.*nearest: model\.layers\.1\.self_attn\.q_proj"
    ):
        lorank.load(base, tmp_path)


def test_keys_without_the_prefix_of_peft_load(tmp_path: Path) -> None:
    base, model, x = trained(tmp_path)
    rewrite(tmp_path, {key: key.removeprefix("base_model.model.") for key in load_file(tmp_path / TENSORS)})
    lorank.load(base, tmp_path)
    assert torch.equal(base(x).logits, model(x).logits)


def test_keys_with_an_adapter_name_in_them_load(tmp_path: Path) -> None:
    base, model, x = trained(tmp_path)
    keys = load_file(tmp_path / TENSORS)
    rewrite(tmp_path, {key: key.replace(".weight", ".default.weight") for key in keys})
    lorank.load(base, tmp_path)
    assert torch.equal(base(x).logits, model(x).logits)


def test_peft_3755_modules_to_save_are_whole_components(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)
            self.subhead = nn.Linear(6, 2)

    base = Heads()
    model = copy.deepcopy(base)
    plan = lorank.adapt(model, LoRA(rank=2), ["body"], train_also=["head"])
    assert list(plan.copies) == ["head"]
    models.disturb(model)
    lorank.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    rewrite(tmp_path, {})
    assert list(lorank.load(base, tmp_path).copies) == ["head"]


def test_a_typo_in_train_also_is_an_error() -> None:
    with pytest.raises(AdapterError, match=r"train_also 'clasifier' names no module; nearest: classifier"):
        lorank.adapt(models.roberta(), LoRA(), ["query"], train_also=["clasifier"])
