"""Faults of other tools, by the thread that reports them: merges that changed the answer, embeddings, tied weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lorank
from lorank import AdapterError, LoRA

from .. import models


def adapted(model: nn.Module, targets: list[str], **options: Any) -> Tensor:
    """Adapt a model with an adapter that has an effect; return its logits on an input from a fixed seed."""
    lorank.adapt(model, LoRA(rank=4), targets, **options)
    models.disturb(model)
    return logits(model)


def logits(model: nn.Module) -> Tensor:
    return model(torch.arange(5, 26).view(3, 7)).logits


def assert_computes_and_saves(model: Any, y: Tensor, folder: Path) -> None:
    """Check that a model gives the logits y, and does so again when it was saved and loaded."""
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-5)
    model.save_pretrained(folder)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), y, rtol=1e-5, atol=1e-5)


DIFFERS = [
    *("peft#1388", "peft#1836", "peft#1035", "peft#2502", "peft#2764", "Qwen#1168"),
    *("LlamaFactory#5186", "LlamaFactory#5218", "LlamaFactory#3096", "LlamaFactory#10596"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*shares its weight with:lorank.AdapterWarning")  # refused at merging


@pytest.mark.parametrize("thread", DIFFERS)
def test_merged_output_is_the_adapters_output(thread: str, tmp_path: Path) -> None:
    model = models.llama()
    y = adapted(model, ["all-linear"])
    lorank.merge(model)
    assert_computes_and_saves(model, y, tmp_path)


def test_peft_1836_going_in_and_out_a_hundred_times_changes_no_bit() -> None:
    model = models.llama().to(torch.bfloat16)
    adapted(model, ["q_proj", "v_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(100):
        with lorank.merged(model):
            pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bfloat16_merge_tells_what_rounding_cost() -> None:
    model = models.llama().to(torch.bfloat16)
    lorank.adapt(model, LoRA(rank=4), ["q_proj"])
    models.disturb(model, size=0.01)
    layer = model.model.layers[0].self_attn.q_proj
    before, update = layer.weight.float(), layer.adapters["default"].delta_weight(layer).detach()
    report = lorank.merge(model)
    lost = (layer.weight.detach().float() - before - update).norm() / update.norm()
    row = next(row for row in report.rows if row.label == "model.layers.0.self_attn.q_proj")
    assert row.relative_error == pytest.approx(float(lost), rel=1e-4)
    assert "bfloat16" in str(report)


def test_a_bfloat16_merge_that_loses_most_of_the_update_warns() -> None:
    model = models.llama().to(torch.bfloat16)
    lorank.adapt(model, LoRA(rank=4), ["q_proj"])
    models.disturb(model, size=1e-5)
    with pytest.warns(lorank.AdapterWarning, match=r"rounding to bfloat16 lost \d+% of the update"):
        lorank.merge(model)


@pytest.mark.parametrize("thread", ["LlamaFactory#9051", "LlamaFactory#8998", "LlamaFactory#6105"])
def test_what_is_exported_is_the_merged_model(thread: str, tmp_path: Path) -> None:
    model = models.llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = adapted(model, ["q_proj", "v_proj"])
    report = lorank.merge(model)
    assert [row.label for row in report.rows] == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "v")
    ]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    changed = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{row.label}.weight" for row in report.rows}
    torch.testing.assert_close(logits(again), y, rtol=1e-5, atol=1e-5)


def test_peft_1977_a_bfloat16_merge_multiplies_in_float32() -> None:
    model = models.llama().to(torch.bfloat16)
    adapted(model, ["q_proj"])

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.dtypes: set[torch.dtype] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.__name__:
                self.dtypes.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Products() as products:
        lorank.merge(model)
    assert products.dtypes == {torch.float32}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("thread", ["peft#2018", "unsloth#219", "unsloth#9331", "peft#2864"])
def test_merging_one_side_of_a_tie_is_refused_and_the_way_out_works(thread: str, target: str, tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = adapted(model, [target])
    other = "model.embed_tokens.weight" if target == "lm_head" else "lm_head.weight"
    for attempt in (lorank.merge, lambda model: lorank.merged(model).__enter__()):
        with pytest.raises(AdapterError, match=rf"shares its weight with {other}.*tie_word_embeddings = False"):
            attempt(model)
    assert torch.equal(logits(model), y)
    base = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())

    layer = model.lm_head if target == "lm_head" else model.model.embed_tokens
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    model.config.tie_word_embeddings = False
    lorank.merge(model)
    assert_computes_and_saves(model, y, tmp_path)


def test_peft_2018_a_tie_in_a_plain_module_is_seen_too() -> None:
    model = models.Plain(tied=True)
    lorank.adapt(model, LoRA(rank=2), ["head"])
    models.disturb(model)
    with pytest.raises(AdapterError, match=r"head shares its weight with embed\.weight"):
        lorank.merge(model)


@pytest.mark.parametrize("thread", ["peft#2092", "peft#2898", "peft#1689", "trl#1287"])
def test_an_adapter_file_holds_no_base_weights(thread: str, tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    model.resize_token_embeddings(models.VOCABULARY + 3)
    adapted(model, ["embed_tokens", "q_proj"])
    lorank.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in lorank.adapter_parameters(model).values())
    assert all("lora_" in key for key in tensors)


@pytest.mark.parametrize("thread", ["axolotl#2277", "LlamaFactory#8859"])
def test_another_vocabulary_is_named_before_anything_changes(thread: str, tmp_path: Path) -> None:
    base = models.llama()
    trained = copy.deepcopy(base)
    trained.resize_token_embeddings(models.VOCABULARY + 3)
    adapted(trained, ["embed_tokens"], train_also=["lm_head"])
    lorank.save(trained, tmp_path)
    with pytest.raises(AdapterError) as error:
        lorank.load(base, tmp_path)
    assert "model.embed_tokens: A is (4, 100) in the file, the model needs (4, 97)" in str(error.value)
    assert "lm_head.weight is (100, 32) in the file, the model needs (97, 32)" in str(error.value)
    assert lorank.adapter_names(base) == []


def test_a_trained_head_of_a_tied_model_stays_the_adapters(tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    y = adapted(model, ["q_proj"], train_also=["lm_head"])
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    lorank.load(model, tmp_path)
    assert torch.equal(logits(model), y)
    with pytest.raises(AdapterError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        lorank.merge(model)


QUANTISED = [*("peft#1043", "peft#2321", "qlora#28", "qlora#254"), *("unsloth#195", "unsloth-zoo#810")]


@pytest.mark.parametrize("thread", QUANTISED)
def test_a_packed_base_is_refused_until_it_can_be_merged_as_it_was_trained(thread: str) -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match="its weight is packed as uint8; it needs a host of its own"):
        lorank.adapt(nn.Sequential(layer), LoRA(rank=2), "0")
