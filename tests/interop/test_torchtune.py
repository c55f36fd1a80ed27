"""Adapters of the real torchtune, in models that it has converted from transformers' files, give the same outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorank
from lorank.variants.dora import DoRA

from .. import models
from . import apart

# Loads models' files with torchtune's checkpointer, gives their adapters random values, and saves them with it.
WRITE = """
    import json, sys
    from pathlib import Path
    import torch
    from safetensors.torch import load_file, save_file
    from torchtune import training
    from torchtune.models import gemma, gemma2, llama3, mistral, phi3, qwen2
    from torchtune.modules.peft import get_adapter_state_dict, get_lora_module_names
    from torchtune.training.checkpointing import FullModelHFCheckpointer

    def write(folder, build, kind, settings):
        torch.manual_seed(0)
        build, base, out = eval(build), folder / "base", folder / "out"
        checkpointer = FullModelHFCheckpointer(base, ["model.safetensors"], kind, out, safe_serialization=True)
        attention, mlp, head = settings.pop("attention"), settings.pop("mlp"), settings.pop("head", False)
        tops = {"apply_lora_to_output": head} if head else {}
        model = build(lora_attn_modules=attention, apply_lora_to_mlp=mlp, **tops, **settings)
        missing, unexpected = model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
        assert not unexpected and all("lora" in name or "magnitude" in name for name in missing), (missing, unexpected)
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        with torch.no_grad():
            for name in missing:
                model.get_parameter(name).add_(0.2 * torch.randn_like(model.get_parameter(name)))
            result = model.eval()(load_file(folder / "ids.safetensors")["ids"])
        save_file({"logits": result.float()}, folder / "logits.safetensors")
        config = {
            "r": settings["lora_rank"],
            "lora_alpha": settings["lora_alpha"],
            "target_modules": get_lora_module_names(attention, mlp, head),
            "peft_type": "LORA",
        }
        state = {training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict()), training.ADAPTER_CONFIG: config}
        checkpointer.save_checkpoint(state, epoch=0, adapter_only=True)

    for name, (build, kind, settings) in json.loads(sys.argv[2]).items():
        write(Path(sys.argv[1]) / name, build, kind, settings)
"""

SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "max_seq_len": 64,
}
SIZES |= {"num_kv_heads": 2, "intermediate_dim": 48, "lora_rank": 4, "lora_alpha": 6.0}
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]
DECODER: dict[str, Any] = models.SMALL_DECODER | {
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def _llama() -> Any:
    rope: Any = {"rope_type": "default", "rope_theta": 500000.0}
    return models.llama(rope_parameters=rope, rms_norm_eps=1e-5)


def _mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**DECODER, sliding_window=None)).eval()


def _qwen2() -> Any:
    rope: Any = {"rope_type": "default", "rope_theta": 1000000.0}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**DECODER, rope_parameters=rope)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def _gemma() -> Any:
    sizes = DECODER | {"rms_norm_eps": 1e-6, "head_dim": 16}
    return GemmaForCausalLM(GemmaConfig(**sizes)).eval()


def _gemma2() -> Any:
    # torchtune caps the last hidden state, and not the logits: the test has neither.
    sizes = DECODER | {
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": None,
    }
    config = Gemma2Config(**sizes)
    model: Any = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # transformers caps the scores in this alone
    return model


def _phi3() -> Any:
    return Phi3ForCausalLM(Phi3Config(**DECODER)).eval()


Case = tuple[Callable[[], Any], str, str, dict[str, Any]]
HEADS: dict[str, Any] = {"attention": ["q_proj", "k_proj", "v_proj"], "mlp": False}
CASES: dict[str, Case] = {
    "llama": (_llama, "llama3.lora_llama3", "LLAMA3", {"attention": ALL, "mlp": True, "head": True}),
    "llama-some": (_llama, "llama3.lora_llama3", "LLAMA3", {"attention": ["k_proj"], "mlp": False}),
    "llama-dora": (_llama, "llama3.lora_llama3", "LLAMA3", HEADS | {"use_dora": True}),
    "mistral": (_mistral, "mistral.lora_mistral", "MISTRAL", HEADS),
    "qwen2": (_qwen2, "qwen2.lora_qwen2", "QWEN2", HEADS | {"mlp": True}),
    "gemma": (_gemma, "gemma.lora_gemma", "GEMMA", HEADS | {"head_dim": 16}),
    "gemma2": (
        _gemma2,
        "gemma2.lora_gemma2",
        "GEMMA2",
        HEADS | {"head_dim": 16, "query_pre_attn_scalar": 16, "final_capping_value": 1e4},
    ),
    "phi3": (_phi3, "phi3.lora_phi3", "PHI3_MINI", {"attention": ALL, "mlp": True}),
    "phi3-some": (_phi3, "phi3.lora_phi3", "PHI3_MINI", {"attention": ["q_proj", "v_proj"], "mlp": False}),
}


# Whether the file that torchtune writes for PEFT beside its own is right. It permutes rows of Qwen's queries and keys
# too, which torchtune has in transformers' order already.
EXPORTED = {"llama": True, "mistral": True, "gemma": True, "qwen2": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Tensor]]:
    """Return each case's base, the folder with torchtune's files for it, and inputs: one process writes all of them."""
    folder = tmp_path_factory.mktemp("torchtune")
    found: dict[str, tuple[Any, Path, Tensor]] = {}
    for name, (build, *_) in CASES.items():
        base, path, x = build(), folder / name, models.ids()
        base.save_pretrained(path / "base")
        save_file({"ids": x}, path / "ids.safetensors")
        found[name] = base, path, x
    wanted = {name: (builder, kind, SIZES | settings) for name, (_, builder, kind, settings) in CASES.items()}
    apart.run("torchtune", WRITE, folder, json.dumps(wanted))
    return found


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_torchtune_s(case: str, written: dict[str, tuple[Any, Path, Tensor]]) -> None:
    base, path, x = written[case]
    folder, theirs = path / "out" / "epoch_0", load_file(path / "logits.safetensors")["logits"]
    before = outputs(base, x)
    # torchtune writes no configuration for Phi.
    alpha = None if (folder / "adapter_config.json").is_file() else 6.0
    plan = lorank.load(base, folder / "adapter_model.pt", allow_pickle=True, alpha=alpha)
    torch.testing.assert_close(outputs(base, x), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-3)
    assert {place.spec.scale for place in plan.places} == {1.5}
    assert all(isinstance(place.spec, DoRA) == ("dora" in case) for place in plan.places)
    if case in EXPORTED:
        lorank.remove(base)
        lorank.load(base, folder)
        assert torch.allclose(outputs(base, x), theirs, rtol=1e-4, atol=1e-5) == EXPORTED[case]
