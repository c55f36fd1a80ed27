"""lorank plan: counts of what an adapter would be, from a configuration alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorank
from lorank import LoRA, baselines
from lorank.runs.recipe import BASELINES

from .. import models
from .running import refused, run, run_json

PREFIX = ("--method", "prefix-embedding", "--length", 64, "--method-options")
FAMILIES = {
    "llama": (models.llama, "all-linear", {}),
    "gpt2": (models.gpt2, "c_attn[q,v]", {"bias": "adapted"}),
    "bert": (models.bert, "attention,!*.0.*", {"task": "classification", "labels": 3}),
    "roberta": (models.roberta, "query,value", {"task": "classification", "labels": 3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_adapt_makes(family: str, tmp_path: Path) -> None:
    build, targets, options = FAMILIES[family]
    model = build()
    model.config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # no weights are there to be read
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    found = run_json("plan", tmp_path, "--method", "lora", "--targets", targets, "--rank", 3, "--length", 24, *words)
    also = ["classifier"] if "task" in options else []
    bias = options.get("bias", "none")
    made = lorank.adapt(
        model,
        LoRA(rank=3, alpha=6),
        targets.split(",") if "[" not in targets else [targets],
        train_also=also,
        bias=bias,
    )
    assert found["trainable_parameters"] == sum(p.numel() for p in lorank.adapter_parameters(model).values())
    assert found["base_parameters"] == made.base_parameters
    assert [layer["name"] for layer in found["layers"]] == [place.label for place in made.places]
    assert [(layer["out"], layer["in"]) for layer in found["layers"]] == [place.shape for place in made.places]
    assert {layer["rank"] for layer in found["layers"]} == {3}
    assert found["trained_whole"] == list(made.copies) == also
    lorank.save(model, tmp_path / "adapter")
    assert found["checkpoint_bytes"] == 4 * found["trainable_parameters"]
    if "[" not in targets:  # PEFT's layout has no parts, and writes zeros between them
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
        assert found["checkpoint_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_more_tokens_and_wider_numbers_take_more_memory(tmp_path: Path) -> None:
    models.llama().config.save_pretrained(tmp_path)

    def total(*words: Any) -> int:
        memory = run_json("plan", tmp_path, "--method", "lora", "--length", 64, *words)["memory"]
        assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
        return memory["total"]

    usual = total()
    assert total("--batch-size", 16) > usual > total("--length", 32)
    assert total("--dtype", "bfloat16") < usual
    assert total("--gradient-checkpointing") < usual
    assert total("--accumulate", 2) > usual
    full = total("--method", "full")
    assert total("--method", "full", "--optimiser-states", 0) < full


def test_people_read_a_table(tmp_path: Path) -> None:
    models.gpt2().config.save_pretrained(tmp_path)
    shown = run(*("plan", tmp_path, "--method", "lora", "--targets", "c_attn[q,v]", "--rank", 2, "--length", 32)).stdout
    assert "transformer.h.{0-1}.attn.c_attn[q]" in shown and "adapter file: about" in shown
    assert "512 parameters to train" in shown and "memory of a step on 8 x 32 tokens" in shown
    assert "at inference: none added once merged" in shown


def test_a_regression_has_one_output(tmp_path: Path) -> None:
    models.bert().config.save_pretrained(tmp_path)
    found = run_json(
        "plan", tmp_path, "--method", "lora", "--task", "regression", "--targets", "query", "--rank", 1, "--length", 32
    )
    assert found["trainable_parameters"] == 2 * (32 + 32) + 32 + 1
    model = AutoModelForSequenceClassification.from_config(models.bert(num_labels=1).config)
    assert found["base_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    models.llama().config.save_pretrained(tmp_path)
    refused("q_prj.*q_proj", "plan", tmp_path, "--targets", "q_prj")
    refused("it takes no --rank, model", "plan", tmp_path, "--paper", "--rank", 3)
    refused("needs the --method", "plan", tmp_path, "--method-options", "{size: 2}")
    refused("no option 'sise'.*size", "plan", tmp_path, "--method", "adapter-h", "--method-options", "{sise: 2}")
    refused("length is 65; this model reads at most 64", "plan", tmp_path, "--length", 65)
    refused("no room in a context of 64", "plan", tmp_path, *PREFIX, "{prefix: 62, infix: 1}")
    refused("device is 'tpu'", "plan", tmp_path, "--device", "tpu")
    refused("task is 'generation'", "plan", tmp_path, "--task", "generation")
    refused("dtype is 'int8'", "plan", tmp_path, "--dtype", "int8")
    refused("alpha is 0", "plan", tmp_path, "--alpha", 0)
    refused("bias is 'some'", "plan", tmp_path, "--bias", "some")
    refused("has no config.json", "plan", tmp_path.parent)
    refused("there is no folder", "plan", tmp_path / "none")


METHODS = ("lora", *BASELINES)


def test_lora_and_each_baseline_stand_side_by_side(tmp_path: Path) -> None:
    config = models.gpt2().config
    config.n_positions = 128  # a prefix of the usual size needs the room
    config.save_pretrained(tmp_path)
    found = run_json("plan", tmp_path, "--targets", "c_attn[q,v]", "--batch-size", 2, "--length", 16)
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == list(METHODS)
    applying = {name: row for name, row in rows.items() if not row["does_not_apply"]}
    assert set(METHODS) - set(applying) == {"adapter-d"}  # which drops five blocks of two
    assert "there are 2" in rows["adapter-d"]["does_not_apply"]
    for name, row in applying.items():
        memory, model = row["memory"], AutoModelForCausalLM.from_config(config)
        assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
        trained = row["trainable_parameters"]
        if name == "full":
            assert trained == row["base_parameters"] == sum(p.numel() for p in model.parameters())
            assert row["checkpoint_bytes"] == memory["base"]
        elif name != "lora":
            lorank.adapt(model, baselines.BASELINES[name]())
            assert trained == sum(p.numel() for p in lorank.adapter_parameters(model).values())
            lorank.save(model, tmp_path / name)
            (file,) = (tmp_path / name).glob("*.safetensors")
            size = sum(tensor.nbytes for tensor in load_file(file).values())
            assert row["checkpoint_bytes"] == size
        assert memory["gradients"] == 4 * trained and memory["optimiser"] == 8 * trained
        assert row["step_flops_per_token"] > row["forward_flops_per_token"] > 0
    assert rows["full"]["step_flops_per_token"] > 1.2 * rows["bitfit"]["step_flops_per_token"]
    assert rows["prefix-embedding"]["forward_flops_per_token"] > 1.5 * rows["full"]["forward_flops_per_token"]
    shown = run("plan", tmp_path, "--targets", "c_attn[q,v]", "--batch-size", 2, "--length", 16).stdout
    assert "adapter-d does not apply: " in shown and "adapter-h (size 64)" in shown
    assert f"{rows['full']['trainable_parameters']:,}" in shown
    assert all(f"{name} at inference: " in shown for name in applying)


def test_a_method_that_makes_no_sense_says_why(tmp_path: Path) -> None:
    models.llama(max_position_embeddings=128).config.save_pretrained(tmp_path)
    found = run_json("plan", tmp_path, "--batch-size", 1, "--length", 8)
    reasons = {row["method"]: row["does_not_apply"] for row in found["methods"] if row["does_not_apply"]}
    assert set(reasons) == {"bitfit", "adapter-d"} and "this model has none" in reasons["bitfit"]


def test_gpt3_is_planned_in_seconds() -> None:
    """Every method on its 175 billion parameters, of which not one is loaded."""
    words = ("gpt3-175b", "--targets", "c_attn[q,v]", "--dtype", "float16", "--batch-size", 1, "--length", 2048)
    began = time.process_time()
    found = run_json("plan", *words)
    assert time.process_time() - began < 20
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["lora"]["trainable_parameters"] == 37_748_736
    assert rows["full"]["trainable_parameters"] == 174_604_259_328
    assert rows["full"]["checkpoint_bytes"] == 349_208_518_656
    assert rows["full"]["memory"]["total"] > 3 * rows["lora"]["memory"]["total"]
    assert rows["bitfit"]["trainable_parameters"] == 12_988_416
    assert not any(row["does_not_apply"] for row in rows.values())


def test_the_papers_figures_are_shown_with_verdicts_and_reasons() -> None:
    found = run_json("plan", "--paper")
    assert len(found["rows"]) == 74 and {row["table"] for row in found["rows"]} == {"1", "2", "3", "4", "5", "15"}
    row = next(row for row in found["rows"] if row["row"] == "GPT-2 M LoRA")
    assert (row["printed"], row["counted"], row["verdict"]) == ("0.35M", 393_216, "differs")
    assert "0.1 % of the model" in row["reason"] and row["method"][0]["rank"] == 4
    assert {claim["printed"] for claim in found["claims"]} >= {"35 MB", "10,000x", "354 GB, not 35 TB"}
    shown = run("plan", "--paper").stdout
    assert "393,216  differs" in shown and "174,604,259,328" in shown and "37.75 MB" in shown
