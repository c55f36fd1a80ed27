"""lorank plan: counts of what an adapter would be, from a configuration alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import lorank
from lorank import LoRA

from .. import models
from .running import refused, run, run_json

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
    found = run_json("plan", tmp_path, "--targets", targets, "--rank", 3, *words)
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
    assert found["adapter_bytes"] == 4 * found["trainable_parameters"]
    if "[" not in targets:  # PEFT's layout has no parts, and writes zeros between them
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
        assert found["adapter_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_more_tokens_and_wider_numbers_take_more_memory(tmp_path: Path) -> None:
    models.llama().config.save_pretrained(tmp_path)

    def total(*words: Any) -> int:
        memory = run_json("plan", tmp_path, *words)["memory"]
        assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
        return memory["total"]

    usual = total()
    assert total("--batch-size", 16) > usual > total("--length", 64)
    assert total("--dtype", "bfloat16") < usual
    assert total("--gradient-checkpointing") < usual


def test_people_read_a_table(tmp_path: Path) -> None:
    models.gpt2().config.save_pretrained(tmp_path)
    shown = run("plan", tmp_path, "--targets", "c_attn[q,v]", "--rank", 2).stdout
    assert "transformer.h.{0-1}.attn.c_attn[q]" in shown and "adapter file: about" in shown
    assert "512 parameters to train" in shown and "memory of a step on 8 examples of 256 tokens" in shown


def test_a_regression_has_one_output(tmp_path: Path) -> None:
    models.bert().config.save_pretrained(tmp_path)
    found = run_json("plan", tmp_path, "--task", "regression", "--targets", "query", "--rank", 1)
    assert found["trainable_parameters"] == 2 * (32 + 32) + 32 + 1
    model = AutoModelForSequenceClassification.from_config(models.bert(num_labels=1).config)
    assert found["base_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    models.llama().config.save_pretrained(tmp_path)
    refused("q_prj.*q_proj", "plan", tmp_path, "--targets", "q_prj")
    refused("task is 'generation'", "plan", tmp_path, "--task", "generation")
    refused("dtype is 'int8'", "plan", tmp_path, "--dtype", "int8")
    refused("alpha is 0", "plan", tmp_path, "--alpha", 0)
    refused("bias is 'some'", "plan", tmp_path, "--bias", "some")
    refused("has no config.json", "plan", tmp_path.parent)
    refused("there is no folder", "plan", tmp_path / "none")
