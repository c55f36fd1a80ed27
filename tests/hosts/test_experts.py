"""Mixtures of experts as transformers keeps them: stacks of matrices, adapted as all-linear does or by name."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models
from ..interop.test_peft import peft_model, read_by_peft

pytestmark = [
    # of peft: a property that this transformers deprecates; and patterns for parameters, which it does not ignore
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted:RuntimeWarning"),
]

SIZES = models.SMALL_DECODER
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
DBRX: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": models.VOCABULARY,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    "pad_token_id": 0,
}
DEEPSEEK: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
JAMBA: dict[str, Any] = SIZES | {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
LLAMA4 = {"intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2}
QWEN = {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
ARIA = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
JETMOE = {key: value for key, value in SIZES.items() if key != "num_attention_heads"} | {"kv_channels": 8} | FOUR

# The name of transformers' classes, the sizes, and (out, in) of the experts' matrices in the last layer.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "mixtral": ("Mixtral", SIZES | FOUR, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}),
    "qwen3-moe": ("Qwen3Moe", SIZES | QWEN | {"head_dim": 8}, {"gate_up_proj": (4, 24, 32), "down_proj": (4, 32, 12)}),
    "gpt-oss": ("GptOss", SIZES | FOUR | {"head_dim": 8}, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}),
    # stored as (experts, in, out), and nothing in the module says so
    "llama4": ("Llama4Text:Llama4", SIZES | LLAMA4, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 16, 32)}),
    "dbrx": ("Dbrx", DBRX, {"w1": (64, 32), "v1": (64, 32), "w2": (64, 32)}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK, {"gate_up_proj": (4, 24, 32), "down_proj": (4, 32, 12)}),
    "granite-moe": ("GraniteMoe", SIZES | FOUR, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}),
    "jamba": ("Jamba", JAMBA, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}),
    "aria": ("AriaText", SIZES | ARIA, {"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}),
    "jetmoe": ("JetMoe", JETMOE, {"weight": (4, 32, 16)}),
}
# A choice of implementation is not offered by all.
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "batched_mm", "grouped_mm")
    if implementation == "eager" or family not in ("llama4", "dbrx", "jetmoe")
]
STACKED = [family for family in FAMILIES if family not in ("dbrx", "jetmoe")]


def build(family: str) -> Any:
    classes, sizes, _ = FAMILIES[family]
    config, _, model = classes.partition(":")
    made = getattr(transformers, f"{config}Config")(**sizes)
    return getattr(transformers, f"{model or config}ForCausalLM")(made).eval()


def run(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


def adapt(model: nn.Module, targets: Any, **options: Any) -> lorank.Plan:
    plan = lorank.adapt(model, LoRA(rank=2, alpha=3, **options), targets)
    models.disturb(model)
    return plan


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def experts(plan: lorank.Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of the last module of experts, by part."""
    places = [
        p for p in plan.places if "expert" in type(p.layer).__name__.lower() and p.host.attribute(p.layer, p.part)
    ]
    return {place.part: place.shape for place in places if place.name == places[-1].name}


@pytest.mark.filterwarnings("ignore:not adapted.*Llama4Router")
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_the_experts_with_one_pair_of_factors_each(family: str) -> None:
    plan = adapt(model := build(family), "all-linear")
    expected = FAMILIES[family][2]
    assert experts(plan) == expected
    for place in plan.places:
        if place.part not in expected or place.part == "weight":
            continue
        leaf: Any = model.get_submodule(f"{place.name}.adapters.default.{place.part}")
        *number, out, in_ = place.shape
        assert leaf.A.shape == (*number, 2, in_)
        assert leaf.B.shape == (*number, out, 2)
    assert not any("expert" in name for name, reason in plan.left_out.items() if "router" not in name)


@pytest.mark.filterwarnings("ignore:not adapted.*Llama4Router")
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_every_implementation_computes_with_the_experts_as_adapted(family: str, implementation: str) -> None:
    model, x = build(family), models.ids(4, 9)
    base = run(model, x)
    adapt(model, "all-linear")
    y = run(model, x)
    if implementation != "eager":
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
    found = run(model, x)
    assert_near(found, y)
    assert not torch.allclose(y, base, atol=1e-2)
    found.square().mean().backward()
    lorank.check(model, moved=True)
    with torch.no_grad():
        assert_near(run(model, x), y)
        with lorank.merged(model):
            assert_near(run(model, x), y)
    with lorank.disabled(model):
        assert_near(run(model, x), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_alone_by_name_have_their_effect(family: str) -> None:
    for part in FAMILIES[family][2]:
        model, x = build(family), models.ids()
        base = run(model, x)
        target = {"dbrx": f"mlp.{part}", "jetmoe": "mlp.output_linear"}.get(family, f"experts.{part}")
        plan = adapt(model, target)
        assert {place.part for place in plan.places} == {part}
        y = run(model, x)
        assert not torch.allclose(y, base, atol=1e-3)
        y.square().mean().backward()
        lorank.check(model, moved=True)
        lorank.merge(model)
        assert_near(run(model, x), y)


def test_a_part_and_the_whole_are_named_in_the_ways_that_the_guide_tells() -> None:
    model = build("mixtral")
    layers = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for target, parts in {
        "experts": ["gate_up_proj", "down_proj"],
        "experts[down_proj]": ["down_proj"],
        "experts.down_proj": ["down_proj"],
        "down_proj": ["down_proj"],
        "layers.*.gate_up_proj": ["gate_up_proj"],
        "re:.*experts.*_proj": ["gate_up_proj", "down_proj"],
    }.items():
        places = lorank.plan(model, LoRA(rank=2), target).places
        assert [place.label for place in places] == [f"{layer}[{part}]" for layer in layers for part in parts], target
    with pytest.raises(AdapterError, match=r"it has no part up_proj; its parts are gate_up_proj, down_proj"):
        lorank.plan(model, LoRA(rank=2), "experts[up_proj]")
    with pytest.raises(AdapterError, match="selects no layer"):
        lorank.plan(model, LoRA(rank=2), "experts.up_proj")


def test_one_name_selects_dense_layers_and_experts() -> None:
    model, x = build("deepseek-v3"), models.ids()
    base = run(model, x)
    plan = adapt(model, ["down_proj", "!shared_experts"])
    assert [place.label for place in plan.places] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.experts[down_proj]",
    ]
    y = run(model, x)
    for i in range(2):
        alone = copy.deepcopy(model)
        lorank.remove(alone)
        adapt(alone, [f"layers.{i}.*down_proj", "!shared_experts"])
        assert not torch.allclose(run(alone, x), base, atol=1e-3)
    lorank.merge(model)
    assert_near(run(model, x), y)


def test_a_router_is_a_matrix_by_its_name() -> None:
    model, x = build("mixtral"), models.ids()
    plan = adapt(model, "gate.weight")
    assert [place.shape for place in plan.places] == [(4, 32), (4, 32)]
    y = run(model, x)
    y.square().mean().backward()
    lorank.check(model, moved=True)
    lorank.merge(model)
    assert_near(run(model, x), y)


@pytest.mark.filterwarnings("ignore:not adapted.*Llama4Router")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_brings_the_same_factors_back(family: str, tmp_path: Path) -> None:
    model, x = build(family), models.ids()
    adapt(model, "all-linear", dropout=0.1)
    y = run(model, x)
    before = {name: p.clone() for name, p in lorank.adapter_parameters(model).items()}
    lorank.save(model, tmp_path)
    lorank.remove(model)
    plan = lorank.load(model, tmp_path)
    after = lorank.adapter_parameters(model)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(run(model, x), y)
    assert {place.spec for place in plan.places} == {LoRA(rank=2, alpha=3, dropout=0.1)}


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "jamba"])
def test_checkpointed_gradients_are_the_same_with_dropout_too(family: str) -> None:
    model, x, gradients = build(family).train(), models.ids(), []
    adapt(model, "all-linear", dropout=0.2)
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(1)
        model(x, labels=x).loss.backward()
        gradients.append([p.grad.clone() for p in lorank.adapter_parameters(model).values()])  # pyright: ignore
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "granite-moe"])
def test_a_merged_model_is_saved_with_its_experts_as_transformers_writes_them(family: str, tmp_path: Path) -> None:
    model, x = build(family), models.ids()
    adapt(model, "all-linear")
    y = run(model, x)
    with lorank.merged(model):
        model.save_pretrained(tmp_path / "block")
    lorank.merge(model)
    model.save_pretrained(tmp_path / "merged")
    for folder in ("block", "merged"):
        assert_near(run(type(model).from_pretrained(tmp_path / folder).eval(), x), y)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj", "gate_up_proj"], ["experts.down_proj"]], ids=str)
@pytest.mark.parametrize("family", STACKED)
def test_lorank_reads_what_peft_writes_of_parameters(
    family: str, targets: list[str], stabilised: bool, tmp_path: Path
) -> None:
    base, x = build(family), models.ids()
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "use_rslora": stabilised}
    theirs = peft_model(copy.deepcopy(base), target_modules=["o_proj"], target_parameters=targets, **config)
    theirs.save_pretrained(str(tmp_path))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path)
    assert {place.part for place in plan.places} == {"weight", *(target.rpartition(".")[2] for target in targets)}
    assert_near(run(model, x), run(theirs, x))
    assert not torch.allclose(run(model, x), run(base, x), atol=1e-3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.trainable_parameters
    lorank.merge(model)
    assert_near(run(model, x), run(theirs.merge_and_unload(), x))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("family", [*STACKED, "jetmoe"])
def test_peft_reads_what_lorank_writes_of_experts(family: str, stabilised: bool, tmp_path: Path) -> None:
    base, x = build(family), models.ids()
    model = copy.deepcopy(base)
    # peft takes every gate_proj and up_proj of some families for experts, those of dense layers too
    targets = ["mlp.input_linear", "mlp.output_linear"] if family == "jetmoe" else ["o_proj", "*experts.*_proj"]
    adapt(model, [*targets, "!shared_experts"] if family == "deepseek-v3" else targets, rank_stabilised=stabilised)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    assert_near(run(theirs, x), run(model, x))
    assert not torch.allclose(run(model, x), run(base, x), atol=1e-3)


def test_peft_reads_ranks_and_alphas_of_experts(tmp_path: Path) -> None:
    base, x = build("mixtral"), models.ids()
    model = copy.deepcopy(base)
    ranks, alphas = {"layers.1.mlp.experts": 3, "layers.0.self_attn.*": 1}, {"layers.0.mlp.experts": 5.5}
    lorank.adapt(model, LoRA(rank=2, alpha=3), ["o_proj", "experts"], ranks=ranks, alphas=alphas)
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_near(run(theirs, x), run(model, x))


def test_ranks_and_alphas_of_each_parameter_in_a_file_of_peft_count(tmp_path: Path) -> None:
    base, x = build("mixtral"), models.ids()
    theirs = peft_model(
        copy.deepcopy(base),
        target_modules=["o_proj"],
        target_parameters=["gate_up_proj", "down_proj"],
        r=2,
        lora_alpha=8,
        rank_pattern={"gate_up_proj": 4, r"layers\.1.*o_proj": 3},
        alpha_pattern={r"^model\.layers\.0\.mlp\.experts\.down_proj": 7},
    )
    theirs.save_pretrained(str(tmp_path))
    plan = lorank.load(base, tmp_path)
    told = {
        place.label.removeprefix("model.layers."): (place.spec.rank, getattr(place.spec, "alpha", 0))
        for place in plan.places
    }
    assert told["0.mlp.experts[down_proj]"] == (2, 7)
    assert told["1.mlp.experts[down_proj]"] == (2, 8)
    assert told["1.mlp.experts[gate_up_proj]"] == (4, 8)
    assert told["1.self_attn.o_proj"] == (3, 8)
    assert_near(run(base, x), run(theirs, x))


def test_files_that_peft_made_of_separate_experts_are_read_as_it_fuses_them(tmp_path: Path) -> None:
    base, x = build("mixtral"), models.ids()
    # the names that this model had in transformers 4: peft fuses w1 and w3 to a gate_up_proj of twice the rank
    theirs = peft_model(copy.deepcopy(base), target_modules=["w1", "w2", "w3", "o_proj"], r=2, lora_alpha=3)
    theirs.save_pretrained(str(tmp_path))
    plan = lorank.load(base, tmp_path)
    assert {place.part: place.spec.rank for place in plan.places} == {"weight": 2, "gate_up_proj": 4, "down_proj": 2}
    assert_near(run(base, x), run(theirs, x))


def test_a_parameter_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    base = build("mixtral")
    theirs = peft_model(copy.deepcopy(base), target_modules=["o_proj"], target_parameters=["down_proj"], r=2)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_parameters": ["down_prj"]}))
    with pytest.raises(AdapterError, match="target_parameters names 'down_prj', which this model has not"):
        lorank.load(base, tmp_path)
    file.write_text(json.dumps(config | {"target_parameters": ["down_proj", "gate_up_proj"]}))
    with pytest.raises(AdapterError, match="lacks its factors"):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []
