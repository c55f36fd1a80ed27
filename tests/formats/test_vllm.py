"""What vLLM gets: one rank and one scale, with the outputs of the adapter."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import lorank
from lorank import AdapterError, AdapterWarning, LoRA

from .. import models


def adapted(**options: Any) -> tuple[Any, Any]:
    """Return a base, and the same with an adapter of several ranks and scales."""
    base = models.llama().eval()
    model = copy.deepcopy(base)
    options = {"ranks": {"layers.0.*": 2}, "alphas": {"v_proj": 3}} | options
    lorank.adapt(model, LoRA(rank=4, alpha=8), ["q_proj", "v_proj", "down_proj"], **options)
    models.disturb(model)
    return base, model


def read_by_an_old_vllm(base: Any, folder: Path) -> Any:
    """Change the base as vLLM before it knew `rank_pattern` computes: r and lora_alpha of the file for every layer."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert not config["modules_to_save"] and config["bias"] == "none" and not config["use_dora"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    assert names == {name for name in names if base.get_submodule(name).weight.dim() == 2}
    assert len(tensors) == 2 * len(names)
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        base.get_submodule(name).weight.data += scale * B @ A
    return base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT
@torch.no_grad()
def test_ranks_and_scales_are_folded(tmp_path: Path) -> None:
    base, model = adapted()
    x = models.ids()
    with pytest.warns(AdapterWarning) as told:
        lorank.save(model, tmp_path, format="vllm")
    texts = [str(warning.message) for warning in told]
    assert any("padded with zeros to rank 4: model.layers.0" in text for text in texts)
    assert any("scale folded into B, where it is not" in text for text in texts)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {} and config["alpha_pattern"] == {}
    expected = model(x).logits
    for reader in (read_by_an_old_vllm, lambda base, folder: PeftModel.from_pretrained(base, str(folder))):
        torch.testing.assert_close(reader(copy.deepcopy(base), tmp_path)(x).logits, expected, rtol=1e-5, atol=1e-5)
    lorank.load(base, tmp_path)
    torch.testing.assert_close(base(x).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_plain_adapter_is_written_as_it_is(tmp_path: Path) -> None:
    _, model = adapted(ranks={}, alphas={})
    lorank.save(model, tmp_path / "peft")
    lorank.save(model, tmp_path / "vllm", format="vllm")
    own, vllm = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "vllm")
    )
    assert own.keys() == vllm.keys() and all(torch.equal(own[key], vllm[key]) for key in own)


def test_a_rank_above_its_default_is_said(tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, LoRA(rank=20), "q_proj")
    with pytest.warns(AdapterWarning, match="start vLLM with --max-lora-rank 20"):
        lorank.save(model, tmp_path, format="vllm")


@pytest.mark.parametrize(
    "spec, options, says",
    [
        (lorank.DoRA(rank=2), {}, "DoRA has no low-rank form apart from its base"),
        (LoRA(rank=2), {"train_also": ["lm_head"]}, "lm_head is trained whole"),
        (LoRA(rank=2), {"train_tokens": [1, 2]}, "rows of 2 tokens of model.embed_tokens are trained"),
    ],
)
def test_what_vllm_cannot_load_is_refused(spec: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, spec, "q_proj", **options)
    with pytest.raises(AdapterError, match=says):
        lorank.save(model, tmp_path / "adapter", format="vllm")
    assert not (tmp_path / "adapter").exists()
