"""torchtune's pickled adapters: read with the model's help, refused where they are not what they seem."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM as Qwen2,
)

import lorank
from lorank import AdapterError, LoRA
from lorank.formats import FORMATS
from lorank.variants.dora import DoRA

from .. import models

NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
KINDS = {"A": "lora_a.weight", "B": "lora_b.weight", "magnitude": "magnitude"}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Return rows of heads (first halves, second halves) with the halves of each head interleaved."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def as_torchtune(model: Any, interleave: bool = True) -> dict[str, Tensor]:
    """Return an adapter's tensors under torchtune's names, in its order."""
    state = {}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for key, parameter in lorank.adapter_parameters(model).items():
        layer, _, kind = key.partition(".adapters.default.")
        values, ending = parameter.detach().clone(), layer.rpartition(".")[2]
        if interleave and ending in heads and kind != "A":
            values = interleaved(values, heads[ending])
        _, found, within = layer.partition("layers.")
        number, _, name = within.partition(".")
        state[f"{f'layers.{number}.{NAMES[name]}' if found else 'output'}.{KINDS[kind]}"] = values
    return state


def adapted(base: Any, spec: Any = None, targets: Any = ("all-linear", "lm_head")) -> Any:
    model = copy.deepcopy(base)
    lorank.adapt(model, spec or LoRA(rank=2, alpha=3), list(targets))
    models.disturb(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Return a base, the same with an adapter, and the file that torchtune would write."""
    base = models.llama()
    model = adapted(base)
    torch.save(as_torchtune(model), tmp_path / "adapter_model.pt")
    return base, model, tmp_path / "adapter_model.pt"


def same(one: Any, other: Any) -> bool:
    x = models.ids()
    return torch.equal(one(x).logits, other(x).logits)


def edited(file: Path, **changes: Any) -> None:
    state = torch.load(file)
    for key, value in changes.items():
        state[key.replace("__", ".")] = value
    torch.save({key: value for key, value in state.items() if value is not ...}, file)


def assert_refused(base: nn.Module, file: Path, *reasons: str, **given: Any) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.load(base, file, **{"allow_pickle": True, "alpha": 3.0, **given})
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert not any("adapters" in name for name, _ in base.named_modules())


def test_the_file_is_read_with_alpha_given(saved: tuple[Any, Any, Path]) -> None:
    base, model, file = saved
    assert [name for name, chosen in FORMATS.items() if chosen.detect(file)] == ["torchtune"]
    plan = lorank.load(base, file, allow_pickle=True, alpha=3)
    assert same(base, model) and len(plan.places) == 15 and plan.spec == LoRA(rank=2, alpha=3)


def test_alpha_is_in_the_configuration_beside_it(saved: tuple[Any, Any, Path]) -> None:
    base, model, file = saved
    config = {"r": 2, "lora_alpha": 3, "peft_type": "LORA", "base_model_name_or_path": "some/llama"}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    assert lorank.formats.read(file, base, allow_pickle=True).base_model == "some/llama"
    lorank.load(base, file, allow_pickle=True)
    assert same(base, model)


def test_a_directory_is_read_where_there_is_no_export_for_peft(saved: tuple[Any, Any, Path]) -> None:
    base, model, file = saved
    assert FORMATS["torchtune"].detect(file.parent)
    lorank.load(copy.deepcopy(base), file.parent, allow_pickle=True, alpha=3)
    file.rename(file.parent / "adapter_0.pt")
    (file.parent / "adapter_1.pt").write_bytes((file.parent / "adapter_0.pt").read_bytes())
    assert_refused(base, file.parent, "adapter_0.pt, adapter_1.pt: name one of them")
    lorank.save(model, file.parent)
    assert not FORMATS["torchtune"].detect(file.parent)
    lorank.load(base, file.parent)
    assert same(base, model)


def test_dora_has_magnitudes_in_the_order_of_the_rows(tmp_path: Path) -> None:
    base = models.llama()
    model = adapted(base, DoRA(rank=2, alpha=3), ["q_proj", "k_proj", "v_proj"])
    torch.save(as_torchtune(model), tmp_path / "adapter_0.pt")
    plan = lorank.load(base, tmp_path / "adapter_0.pt", allow_pickle=True, alpha=3)
    assert same(base, model) and plan.spec == DoRA(rank=2, alpha=3)


def test_qwen_has_its_rows_in_transformers_order(tmp_path: Path) -> None:
    base: Any = Qwen2(Qwen2Config(**models.SMALL_DECODER)).eval()
    model = adapted(base)
    torch.save(as_torchtune(model, interleave=False), tmp_path / "adapter_0.pt")
    lorank.load(base, tmp_path / "adapter_0.pt", allow_pickle=True, alpha=3)
    assert same(base, model)


def test_dora_that_scales_a_bias_is_refused(tmp_path: Path) -> None:
    base: Any = Qwen2(Qwen2Config(**models.SMALL_DECODER)).eval()
    model = adapted(base, DoRA(rank=2, alpha=3), ["q_proj", "up_proj"])
    torch.save(as_torchtune(model, interleave=False), tmp_path / "adapter_0.pt")
    assert_refused(base, tmp_path / "adapter_0.pt", "q_proj: torchtune's DoRA scales the bias")


def test_phi_has_parts_of_fused_projections(tmp_path: Path) -> None:
    base: Any = Phi3ForCausalLM(Phi3Config(**models.SMALL_DECODER)).eval()
    model = adapted(base, targets=["qkv_proj[q,v]", "gate_up_proj[up]"])
    state = {}
    parts = {"qkv_proj.q": "attn.q_proj", "qkv_proj.v": "attn.v_proj", "gate_up_proj.up": "mlp.w3"}
    for name, update in lorank.formats.content.gather(model, "default").updates.items():
        number, layer = name.split(".")[2], name.rpartition(".")[2]
        for part, tensors in update.tensors.items():
            there = f"layers.{number}.{parts[f'{layer}.{part}']}"
            state |= {f"{there}.{KINDS[kind]}": tensor for kind, tensor in tensors.items()}
    torch.save(state, tmp_path / "adapter_0.pt")
    plan = lorank.load(base, tmp_path / "adapter_0.pt", allow_pickle=True, alpha=3)
    assert same(base, model) and {place.part for place in plan.places} == {"q", "v", "up"}


def test_the_output_of_a_classifier_is_its_score(tmp_path: Path) -> None:
    sizes: dict[str, Any] = models.SMALL_DECODER | {"num_labels": 3}
    base: Any = LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()
    model = adapted(base, targets=["q_proj", "score"])
    torch.save(as_torchtune(model), tmp_path / "adapter_0.pt")
    lorank.load(base, tmp_path / "adapter_0.pt", allow_pickle=True, alpha=3)
    assert same(base, model)


def test_a_bare_model_has_no_prefix(saved: tuple[Any, Any, Path]) -> None:
    base, model, file = saved
    edited(file, output__lora_a__weight=..., output__lora_b__weight=...)
    lorank.load(base.model, file, allow_pickle=True, alpha=3)
    x = models.ids()
    assert torch.equal(base.model(x).last_hidden_state, model.model(x).last_hidden_state)


def test_what_the_file_does_not_say_is_asked_for(saved: tuple[Any, Any, Path]) -> None:
    base, _, file = saved
    assert_refused(base, file, "allow_pickle=True", allow_pickle=False)
    assert_refused(base, file, "pass alpha", alpha=None)
    with pytest.raises(AdapterError, match="give the model"):
        lorank.convert(file, file.parent / "peft", allow_pickle=True, alpha=3)
    assert_refused(models.gpt2(), file, "a model of type gpt2")
    assert_refused(models.Plain(), file, "none of transformers'")


def test_without_a_model_it_can_be_looked_at(saved: tuple[Any, Any, Path]) -> None:
    _, model, file = saved
    content = lorank.formats.read(file, allow_pickle=True, alpha=3)
    assert not content.problems and "give the model" in str(content.needs_model)
    names = {"layers.0.attn.q_proj", "layers.1.mlp.w2", "output"}
    assert len(content.updates) == 15 and names <= content.updates.keys()
    A = lorank.adapter_parameters(model)["model.layers.0.self_attn.q_proj.adapters.default.A"]
    assert torch.equal(content.updates["layers.0.attn.q_proj"].tensors["weight"]["A"], A)


def test_what_the_file_says_cannot_be_given(saved: tuple[Any, Any, Path]) -> None:
    base, _, file = saved
    assert_refused(base, file, "parts is for files that do not say it", parts=("q",))
    (file.parent / "adapter_config.json").write_text('{"lora_alpha": 3}')
    assert_refused(base, file, "alpha is for files that do not say it", alpha=5)


def test_it_is_not_written(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match='format="peft"'):
        lorank.save(saved[1], tmp_path / "other", format="torchtune")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 3, "lora_alpha": 3}, "its factors have rank 2, adapter_config.json says 3"),
        ({"lora_alpha": "3"}, "lora_alpha is '3'"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"r": 2}, "pass alpha"),
        ([], "holds a list"),
    ],
)
def test_configurations_that_cannot_be_right(saved: tuple[Any, Any, Path], config: Any, reason: str) -> None:
    base, _, file = saved
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    assert_refused(base, file, reason, alpha=None)


def test_tensors_that_cannot_be_right(saved: tuple[Any, Any, Path]) -> None:
    base, _, file = saved
    edited(
        file,
        output__lora_b__weight=...,
        layers__0__attn__q_proj__lora_b__weight=torch.ones(31, 2),
        layers__0__attn__k_proj__lora_b__weight=torch.tensor(1.0),
        layers__0__mlp__w1__lora_a__weight=torch.ones(2, 2, 2),
        layers__0__mlp__w2__lora_a__weight=torch.ones(2, 47),
        layers__0__mlp__w3__lora_a__weight=torch.full((2, 32), float("inf")),
        layers__0__mlp__experts__lora_gate_a=torch.ones(2, 2, 2),
        layers__7__mlp__w1__lora_a__weight=torch.ones(2, 32),
        layers__7__mlp__w1__lora_b__weight=torch.ones(48, 2),
        decoder__layers__0__attn__q_proj__lora_a__weight=torch.ones(2, 32),
        layers__0__attn__v_proj__magnitude=torch.ones(5),
        steps=3,
    )
    assert_refused(
        base,
        file,
        "lm_head: the file lacks lora_b",
        "q_proj.lora_b.weight: it is (31, 2), which are no rows of 4 heads",
        "k_proj.lora_b.weight: it is (), which are no rows of 2 heads",
        "mlp.gate_proj: lora_a (2, 2, 2) and lora_b (48, 2) are no pair",
        "mlp.down_proj: A is (2, 47) in the file",
        "mlp.up_proj: A holds NaN or Inf",
        "lora_gate_a is no tensor of an adapter in a model of this kind",
        "model.layers.7.mlp.gate_proj, which this model has not",
        "decoder.layers.0.attn.q_proj.lora_a.weight is no tensor",
        "v_proj: magnitude is (5,) in the file",
        "steps is no tensor",
    )


def test_damaged_and_hostile_files(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    base, _, file = saved
    whole = file.read_bytes()
    for length in (len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        assert_refused(base, file)
    marker = tmp_path / "ran"
    file.write_bytes(
        b"\x80\x02cos\nsystem\nX%s\x85R0}(X\x12\x00\x00\x00o.lora_a.weightaaaaX\x0f\x00\x00\x00o.lora_b.weightu."
        % (len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode())
    )
    assert FORMATS["torchtune"].detect(file)
    assert_refused(base, file)
    assert not marker.exists()
