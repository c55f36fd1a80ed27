"""lorank inspect: the numbers are those of the dense update, and what is wrong with a file is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorank
from lorank import LoRA
from lorank.cli import app
from lorank.examining import examine

from .. import models
from ..formats.test_torchtune import as_torchtune
from .running import refused, run, run_json


def adapter_in(
    folder: Path, model: Any, targets: Any, spec: LoRA | None = None, size: float = 0.2, **options: Any
) -> Any:
    lorank.adapt(model, spec or LoRA(rank=4, alpha=6), targets, **options)
    if size:
        models.disturb(model, size=size)
    lorank.save(model, folder)
    return model


def broken(folder: Path, ending: str, value: float) -> None:
    """Put a value into a tensor of an adapter, as another tool would write the file."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith(ending)).view(-1)[0] = value
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("build", "targets", "spec"),
    [
        (models.llama, ["embed_tokens", "q_proj", "down_proj"], LoRA(rank=4, alpha=6)),
        (models.gpt2, ["c_attn", "c_proj"], LoRA(rank=3, alpha=5, rank_stabilised=True)),
    ],
)
def test_norms_are_those_of_the_dense_update(build: Any, targets: Any, spec: LoRA, tmp_path: Path) -> None:
    model = build()
    before = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    adapter_in(tmp_path / "adapter", model, targets, spec)
    count = sum(parameter.numel() for parameter in lorank.adapter_parameters(model).values())
    found = run_json("inspect", tmp_path / "adapter")
    lorank.merge(model.double())
    after = model.state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert {layer["name"] for layer in found["layers"]} == changed - {"lm_head"}
    for layer in found["layers"]:
        name = f"{layer['name']}.weight"
        assert layer["norm"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5)
        assert layer["rank"] == spec.rank and layer["scale"] == pytest.approx(spec.scale)
    assert found["parameters"] == count == sum(layer["parameters"] for layer in found["layers"])
    assert not found["problems"] and not found["remarks"]
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert found["bytes"] == size


def test_layers_that_are_alike_share_a_line(tmp_path: Path) -> None:
    adapter_in(tmp_path / "adapter", models.llama(), ["q_proj", "v_proj"], train_also=["lm_head"])
    lines = run("inspect", tmp_path / "adapter").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [f"model.layers.{{0-1}}.self_attn.{n}_proj" for n in "qv"]
    assert lines[1].split()[1:3] == ["2", "4"]
    assert "trained whole: lm_head" in lines and lines[-1] == "nothing looks wrong"
    every = run("inspect", tmp_path / "adapter", "--all").stdout
    assert all(f"model.layers.{i}.self_attn.{name}_proj" in every for i in range(2) for name in "qv")


def test_parts_count_as_one_layer(tmp_path: Path) -> None:
    model = models.gpt2()
    before = model.transformer.h[1].attn.c_attn.weight.detach().clone()
    adapter_in(tmp_path / "adapter", model, ["c_attn[q,v]"])
    found = run_json("inspect", tmp_path / "adapter")
    lorank.merge(model)
    norm = float((model.transformer.h[1].attn.c_attn.weight - before).detach().norm())
    layer = next(layer for layer in found["layers"] if layer["name"] == "transformer.h.1.attn.c_attn")
    assert layer["norm"] == pytest.approx(norm, rel=1e-4) and layer["shape"] == [96, 32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_a_problem(value: float, tmp_path: Path) -> None:
    adapter_in(tmp_path / "adapter", models.llama(), ["q_proj"], train_also=["norm"])
    for ending in ("layers.1.self_attn.q_proj.lora_B.weight", "norm.weight"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
        broken(tmp_path / "copy", ending, value)
        found = CliRunner().invoke(app, ["inspect", str(tmp_path / "copy")])
        assert found.exit_code == 1 and "PROBLEM: NaN or Inf in model." in found.stdout
        as_json = CliRunner().invoke(app, ["inspect", str(tmp_path / "copy"), "--json"])

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        assert as_json.exit_code == 1
        assert len(json.loads(as_json.stdout, parse_constant=refuse)["problems"]) == 1


def test_layers_without_effect_are_remarked(tmp_path: Path) -> None:
    model = adapter_in(tmp_path / "fresh", models.llama(), ["q_proj"], size=0)
    assert run_json("inspect", tmp_path / "fresh")["remarks"] == ["every ΔW is zero: this adapter was never trained"]
    models.disturb(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.adapters["default"].B.zero_()
        model.model.layers[1].self_attn.q_proj.adapters["default"].A[0, 0] = 5000
    lorank.save(model, tmp_path / "half")
    zero, huge = run_json("inspect", tmp_path / "half")["remarks"]
    assert "model.layers.0.self_attn.q_proj" in zero and "did not train" in zero
    assert "values above 1000" in huge and "model.layers.1.self_attn.q_proj: A" in huge


def test_a_pickle_is_opened_only_when_that_is_allowed(tmp_path: Path) -> None:
    adapter_in(tmp_path / "adapter", models.llama(), ["q_proj"])
    wanted = run_json("inspect", tmp_path / "adapter")["layers"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    refused("is a pickle", "inspect", tmp_path / "adapter")
    assert run_json("inspect", tmp_path / "adapter", "--allow-pickle")["layers"] == wanted


# peft reads a property that this transformers deprecates
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")
def test_a_file_of_the_real_peft_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["query"], modules_to_save=["classifier"])
    model: Any = peft.get_peft_model(models.roberta(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    found = run_json("inspect", tmp_path)
    assert len(found["layers"]) == 2 and found["copies"] == ["classifier"] and not found["problems"]
    for layer in found["layers"]:
        lora = model.get_submodule(f"base_model.model.{layer['name']}")
        assert layer["norm"] == pytest.approx(float(lora.get_delta_weight("default").detach().norm()), rel=1e-5)
        assert layer["alpha"] == 10 and layer["scale"] == 2.5


def test_settings_that_cannot_be_honoured_are_a_problem(tmp_path: Path) -> None:
    adapter_in(tmp_path / "adapter", models.llama(), ["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_bias": True}))
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter")])
    assert found.exit_code == 1 and "PROBLEM: adapter_config.json: lora_bias is True" in found.stdout


def test_what_only_the_model_tells_is_a_remark(tmp_path: Path) -> None:
    model = adapter_in(tmp_path / "peft", models.llama(), ["q_proj", "v_proj"])
    lorank.save(model, tmp_path / "kohya.safetensors", format="kohya")
    (tmp_path / "tune").mkdir()
    torch.save(as_torchtune(model), tmp_path / "tune" / "adapter_model.pt")
    told = run_json("inspect", tmp_path / "peft")["layers"]
    for path, words, reason in (
        (tmp_path / "kohya.safetensors", [], "known with their model alone"),
        (tmp_path / "tune", ["--allow-pickle", "--alpha", 6], "torchtune has other names"),
    ):
        found = run_json("inspect", path, *words)
        assert found["problems"] == [] and [reason in remark for remark in found["remarks"]] == [True]
        assert sorted(layer["norm"] for layer in found["layers"]) == pytest.approx(sorted(x["norm"] for x in told))
        assert "remark: " in run("inspect", path, *words).stdout


def test_a_run_stands_for_its_adapter(tmp_path: Path) -> None:
    adapter_in(tmp_path / "run" / "adapter", models.llama(), ["q_proj"])
    (tmp_path / "run" / "recipe.yaml").write_text("model: m\ndata: d\n")
    assert run_json("inspect", tmp_path / "run") == run_json("inspect", tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "adapter")
    refused("has no adapter yet; go on with lorank train --resume", "inspect", tmp_path / "run")
    refused("no adapter|not an adapter|cannot read", "inspect", tmp_path)


def test_layers_of_every_kind_are_listed(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {"lstm": torch.nn.LSTM(4, 6), "conv": torch.nn.Conv2d(4, 4, 3, groups=2), "embed": torch.nn.Embedding(9, 4)}
    )
    lorank.adapt(model, lorank.LoRA(rank=2), ["lstm", "conv"], train_tokens={"embed": [3, 7]})
    lorank.save(model, tmp_path)
    found = examine(tmp_path)
    assert {(layer.name, layer.shape) for layer in found.layers} == {
        ("conv", (4, 18)),
        ("lstm[weight_ih_l0]", (24, 4)),
        ("lstm[weight_hh_l0]", (24, 6)),
    }
    assert found.tokens == {"embed": [3, 7]}
    assert found.parameters == sum(p.numel() for p in lorank.adapter_parameters(model).values())
