"""Files go both ways between lorank and the real mlx-lm, which computes the same outputs with them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorank
from lorank import LoRA
from lorank.variants.dora import DoRA

from .. import models
from . import apart

# Loads a model without and with an adapter, and writes the logits of both and the names of the adapted layers.
READ = """
    import json, sys
    import mlx.core as mx
    import mlx_lm
    mx.set_default_device(mx.cpu)
    model_path, adapter_path, ids, out = sys.argv[1:]
    ids = mx.load(ids)["ids"]
    plain, _ = mlx_lm.load(model_path)
    model, _ = mlx_lm.load(model_path, adapter_path=adapter_path)
    mx.save_safetensors(out, {"plain": plain(ids).astype(mx.float32), "adapted": model(ids).astype(mx.float32)})
    print(json.dumps([name for name, module in model.named_modules() if "lora_a" in module]))
"""

# Adapts a model as mlx-lm's `lora` command does, and writes the adapter as its trainer does, with the logits.
WRITE = """
    import json, sys
    from pathlib import Path
    import mlx.core as mx
    import mlx.optimizers
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model_path, adapter_path, ids, out, config = sys.argv[1:]
    config = json.loads(config)
    model, _ = mlx_lm.load(model_path)
    model.freeze()
    linear_to_lora_layers(
        model, config["num_layers"], config["lora_parameters"], use_dora=config["fine_tune_type"] == "dora"
    )
    folder = Path(adapter_path)
    folder.mkdir()
    save_config(config, folder / "adapter_config.json")
    rows = [([(7 * i + 3 * j) % 90 + 5 for j in range(12)], 0) for i in range(4)]
    arguments = TrainingArgs(batch_size=2, iters=6, max_seq_length=32, adapter_file=folder / "adapters.safetensors")
    train(model, mlx.optimizers.Adam(learning_rate=0.03), rows, args=arguments)
    model.eval()
    mx.save_safetensors(out, {"logits": model(mx.load(ids)["ids"]).astype(mx.float32)})
"""


def on_disk(model: Any, folder: Path) -> Path:
    """Write a model with a tokenizer, which mlx-lm does not load one without."""
    # The names that GPT-2's own files have, which mlx-lm expects.
    (model.transformer if model.config.model_type == "gpt2" else model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters", {"rope_theta": 0})  # which mlx-lm looks for where transformers had it before 5
    older = {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"], "n_ctx": 32}
    older["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
    (folder / "config.json").write_text(json.dumps(config | older))
    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def in_mlx(base: Path, adapter: Path, ids: Tensor) -> tuple[Tensor, Tensor, set[str]]:
    """Return the logits of mlx-lm without and with an adapter, and the layers that it has adapters in."""
    files = base.parent / "ids.safetensors", base.parent / "logits.safetensors"
    save_file({"ids": ids}, files[0])
    printed = apart.run("mlx", READ, base, adapter, *files)
    found = load_file(files[1])
    return found["plain"], found["adapted"], set(json.loads(printed.splitlines()[-1]))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_read_by_mlx(model: Any, base: Any, tmp_path: Path, adapted: set[str]) -> dict[str, Any]:
    """Compare mlx-lm's outputs with and without an adapter with ours; return the configuration it has read."""
    x = models.ids()
    lorank.save(model, tmp_path / "adapter", format="mlx")
    plain, theirs, layers = in_mlx(on_disk(base, tmp_path / "base"), tmp_path / "adapter", x)
    torch.testing.assert_close(plain, logits(base, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, logits(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, theirs, atol=1e-3)
    assert layers == adapted
    return json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def test_mlx_reads_the_last_blocks_by_names_within_them(tmp_path: Path) -> None:
    base = models.llama(num_hidden_layers=3)
    model = copy.deepcopy(base)
    targets = ["layers.1.*q_proj", "layers.1.*down_proj", "layers.2.*q_proj", "layers.2.*down_proj", "lm_head"]
    plan = lorank.adapt(model, LoRA(rank=4, alpha=6), targets)
    models.disturb(model)
    config = assert_read_by_mlx(model, base, tmp_path, {place.name for place in plan.places})
    assert config["num_layers"] == 2 and len(plan.places) == 5
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize(
    "targets", [["layers.0.*q_proj"], ["layers.0.*q_proj", "layers.1.*v_proj", "layers.1.*up_proj"]]
)
def test_mlx_reads_any_layers_by_their_full_names(targets: list[str], tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    plan = lorank.adapt(model, LoRA(rank=4, alpha=6), targets)
    models.disturb(model)
    names = {place.name for place in plan.places}
    config = assert_read_by_mlx(model, base, tmp_path, names)
    assert config["lora_parameters"]["keys"] == sorted(names)


def test_mlx_reads_ranks_and_scales_of_every_layer(tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    spec = LoRA(rank=4, alpha=6, rank_stabilised=True)
    plan = lorank.adapt(model, spec, ["q_proj", "v_proj"], ranks={"layers.1.*v_proj": 7})
    models.disturb(model)
    with pytest.warns(lorank.AdapterWarning, match=r"padded with zeros to rank 7|scale folded into B"):
        assert_read_by_mlx(model, base, tmp_path, {place.name for place in plan.places})


def test_mlx_reads_a_tied_embedding(tmp_path: Path) -> None:
    base = models.llama(tie_word_embeddings=True)
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=4, alpha=6), ["embed_tokens", "v_proj"], tie=True)
    models.disturb(model)
    adapted = {"model.embed_tokens", *(f"model.layers.{i}.self_attn.v_proj" for i in range(2))}
    assert_read_by_mlx(model, base, tmp_path, adapted)
    again = copy.deepcopy(base)
    lorank.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again, x := models.ids()), logits(model, x))


def test_mlx_reads_dora(tmp_path: Path) -> None:
    base = models.llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = copy.deepcopy(base)
    plan = lorank.adapt(model, DoRA(rank=4, alpha=6), ["q_proj", "v_proj", "down_proj"])
    models.disturb(model)
    assert_read_by_mlx(model, base, tmp_path, {place.name for place in plan.places})


def _gpt_neox() -> Any:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**(models.SMALL_DECODER | {"intermediate_size": 128, "hidden_act": "gelu_new"}))
    ).eval()


def _phi3() -> Any:
    return Phi3ForCausalLM(Phi3Config(**models.SMALL_DECODER)).eval()


def _qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**models.SMALL_DECODER)).eval()


# How to build a model, what to adapt, and what mlx-lm calls these layers in each block and outside.
FAMILIES: dict[str, tuple[Callable[..., Any], list[str], list[str]]] = {
    "gpt_neox": (
        _gpt_neox,
        ["query_key_value", "dense_h_to_4h", "lm_head"],
        ["model.h.{}.attention.query_key_value", "model.h.{}.mlp.dense_h_to_4h", "model.embed_out"],
    ),
    "gpt2": (
        models.gpt2,
        ["c_attn", "c_proj", "wte"],
        ["model.h.{}.attn.c_attn", "model.h.{}.attn.c_proj", "model.h.{}.mlp.c_proj", "model.wte"],
    ),
    "phi3": (
        _phi3,
        ["qkv_proj[q,v]", "gate_up_proj[gate,up]"],
        ["model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"],
    ),
    "qwen2": (_qwen2, ["q_proj", "up_proj"], ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_reads_other_families(family: str, tmp_path: Path) -> None:
    build, targets, layers = FAMILIES[family]
    base = build()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=4, alpha=6), targets, tie=True)
    models.disturb(model)
    assert_read_by_mlx(model, base, tmp_path, {name.format(block) for name in layers for block in range(2)})
    x = models.ids()
    again = copy.deepcopy(base)
    lorank.load(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, x), logits(model, x))


TRAINED: dict[str, dict[str, Any]] = {
    "defaults": {"num_layers": 1, "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}},
    "keys": {
        "num_layers": -1,
        "lora_parameters": {"rank": 3, "dropout": 0.1, "scale": 0.7, "keys": ["self_attn.q_proj", "lm_head"]},
    },
    "embedding": {
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.0, "keys": ["model.embed_tokens", "mlp.up_proj"]},
    },
    "dora": {
        "fine_tune_type": "dora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.0, "keys": ["self_attn.v_proj"]},
    },
}


@pytest.mark.parametrize("settings", TRAINED)
def test_lorank_reads_what_mlx_lm_has_trained(settings: str, tmp_path: Path) -> None:
    base = models.llama(tie_word_embeddings=settings == "embedding")
    config = {"fine_tune_type": "lora", "model": "somewhere", "seed": 0} | TRAINED[settings]
    folder, x = on_disk(base, tmp_path / "base"), models.ids()
    files = tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    save_file({"ids": x}, files[0])
    apart.run("mlx", WRITE, folder, tmp_path / "adapter", *files, json.dumps(config))
    theirs = load_file(files[1])["logits"]
    before = logits(base, x)
    plan = lorank.load(base, tmp_path / "adapter")
    assert plan.places[0].spec.scale == pytest.approx(config["lora_parameters"]["scale"])
    torch.testing.assert_close(logits(base, x), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-3)
