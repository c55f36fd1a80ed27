"""Files go both ways between lorank and the real peft, and training steps are the same."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import LoRA

from .. import models
from ..contract.cases import CASES

BUILD: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "gpt2": (models.gpt2, ["c_attn", "c_proj"]),
    "roberta": (models.roberta, ["query", "value"]),
    "deberta": (models.deberta, ["query_proj", "value_proj", "output.dense"]),
    "llama": (models.llama, ["q_proj", "v_proj", "down_proj"]),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "fractional-alpha": {"r": 3, "lora_alpha": 0.5},
}
HEADS = {"roberta": "classifier", "deberta": "classifier"}

# peft reads a property that this transformers deprecates; and it tells about Conv1D's layout for every layer
_DEPRECATED = ".*is_gradient_checkpointing. is deprecated.*"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{_DEPRECATED}:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


def peft_model(base: nn.Module, **config: Any) -> peft.PeftModel:
    """Return a peft model whose adapter has an effect."""
    model = peft.get_peft_model(base, peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert "lora_" not in name or parameter.requires_grad
    return model.eval()  # pyright: ignore[reportReturnType]


def read_by_peft(base: nn.Module, path: Path) -> nn.Module:
    """Load an adapter with peft; every warning of its loader (missing and unexpected keys) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        return peft.PeftModel.from_pretrained(base, str(path)).eval()  # pyright: ignore[reportArgumentType]


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


@pytest.fixture(params=BUILD)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("settings", CONFIGS)
def test_lorank_reads_what_peft_writes(family: str, settings: str, tmp_path: Path) -> None:
    build, targets = BUILD[family]
    base, x = build(), models.ids()
    head = [HEADS[family]] if family in HEADS else None
    model = copy.deepcopy(base)
    theirs = peft_model(copy.deepcopy(base), target_modules=targets, modules_to_save=head, **CONFIGS[settings])
    theirs.save_pretrained(str(tmp_path))
    before = output(model, x)
    plan = lorank.load(model, tmp_path)
    torch.testing.assert_close(output(model, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(model, x), before, atol=1e-3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == plan.trainable_parameters
    report = lorank.merge(model)
    merged = theirs.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(output(model, x), output(merged, x), rtol=1e-5, atol=1e-5)
    assert report.worst is not None and report.worst.relative_error < 1e-5


@pytest.mark.parametrize("settings", CONFIGS)
def test_peft_reads_what_lorank_writes(family: str, settings: str, tmp_path: Path) -> None:
    build, targets = BUILD[family]
    base, x = build(), models.ids()
    config = CONFIGS[settings]
    spec = LoRA(config["r"], config["lora_alpha"], rank_stabilised=config.get("use_rslora", False))
    model = copy.deepcopy(base)
    lorank.adapt(model, spec, targets, train_also=[HEADS[family]] if family in HEADS else [])
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)
    written = {p.removesuffix(".weight") for p in load_file(tmp_path / "adapter_model.safetensors")}
    taken = peft.get_peft_model_state_dict(theirs)  # pyright: ignore[reportArgumentType]
    assert {p.removesuffix(".weight") for p in taken} == written


def test_a_file_goes_round_unchanged(family: str, tmp_path: Path) -> None:
    build, targets = BUILD[family]
    base = build()
    theirs = peft_model(copy.deepcopy(base), target_modules=targets, r=4, lora_alpha=8)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    lorank.load(base, tmp_path / "theirs")
    lorank.save(base, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_steps_are_the_same(family: str, dropout: float, tmp_path: Path) -> None:
    build, targets = BUILD[family]
    base = build()
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, lora_dropout=dropout)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(str(tmp_path))
    ours = copy.deepcopy(base)
    lorank.load(ours, tmp_path)
    batches = [models.ids(4, 9) for _ in range(4)] * 5
    curves = [losses(theirs, batches), losses(ours, batches)]
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-4)
    assert curves[1][-4:].mean() < curves[1][:4].mean()


def losses(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Train in train mode, dropout included, and return the loss of every step."""
    model.train()
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(x: Tensor) -> Tensor:
        labels = x if hasattr(model, "lm_head") else x.sum(1) % 3
        return model(input_ids=x, labels=labels).loss

    config = lorank.TrainConfig(steps=20, learning_rate=5e-3)
    return torch.stack([step.loss for step in lorank.train(trained, loss, batches, config)])


def test_rank_and_alpha_patterns_go_both_ways(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    config: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 6, r"layers\.[0-9]+\.self_attn\.q_proj": 3},
        "alpha_pattern": {r".*\.up_proj": 5.5, "layers.0.self_attn.v_proj": 1},
    }
    theirs = peft_model(copy.deepcopy(base), **config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    plan = lorank.load(base, tmp_path / "theirs")
    torch.testing.assert_close(output(base, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    ranks = {
        place.name.removeprefix("model.layers."): (place.spec.rank, getattr(place.spec, "alpha", 0))
        for place in plan.places
    }
    assert ranks["0.self_attn.q_proj"] == (3, 8)
    assert ranks["0.self_attn.v_proj"] == (2, 1)
    assert ranks["1.self_attn.v_proj"] == (2, 8)
    assert ranks["1.mlp.up_proj"] == (6, 5.5)
    lorank.save(base, tmp_path / "ours")
    lorank.remove(base)
    again = read_by_peft(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(output(again, x), output(theirs, x), rtol=1e-5, atol=1e-5)


def test_per_layer_ranks_and_alphas_are_read_by_peft(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(
        model,
        LoRA(rank=4, alpha=8),
        ["q_proj", "down_proj"],
        ranks={"down_proj": 2, "layers.1.self_attn.q_proj": 5},
        alphas={"layers.0.*": 3},
    )
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_biases_go_both_ways(family: str, bias: str, tmp_path: Path) -> None:
    build, targets = BUILD[family]
    base, x = build(), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=targets, r=4, lora_alpha=8, bias=bias)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path / "theirs")
    torch.testing.assert_close(output(model, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    assert len(plan.biases) == sum("bias" in name for name in load_file(tmp_path / "theirs/adapter_model.safetensors"))
    with lorank.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    lorank.save(model, tmp_path / "ours")
    again = read_by_peft(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(output(again, x), output(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_embedding_goes_both_ways(tmp_path: Path) -> None:
    base, x = models.llama(tie_word_embeddings=True), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=["embed_tokens", "q_proj"], r=4, lora_alpha=8)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(base)
    lorank.load(model, tmp_path / "theirs")  # the base's own embedding, which peft wrote too, is recognised
    torch.testing.assert_close(output(model, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    lorank.save(model, tmp_path / "ours")
    again = read_by_peft(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(output(again, x), output(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_parts_are_one_exact_lora_for_peft_and_parts_again_for_lorank(rank_stabilised: bool, tmp_path: Path) -> None:
    base, x = models.gpt2(), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=7, rank_stabilised=rank_stabilised), ["c_attn[q,v]", "mlp.c_proj"])
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {3, 6}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]  # (3 · 32, 6)
    assert not B[32:64].any() and not B[:32, 3:].any() and not B[64:, :3].any()
    fresh = copy.deepcopy(base)
    plan = lorank.load(fresh, tmp_path)
    assert {place.part for place in plan.places if place.name.endswith("c_attn")} == {"q", "v"}
    assert torch.equal(output(fresh, x), output(model, x))


def test_a_file_that_lost_its_header_loads_as_whole_layers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, x = models.gpt2(), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=7), ["c_attn[q,v]"])
    models.disturb(model)
    lorank.save(model, tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    plan = lorank.load(base, tmp_path)
    assert {(place.part, place.spec.rank) for place in plan.places} == {("weight", 6)}
    torch.testing.assert_close(output(base, x), output(model, x), rtol=1e-5, atol=1e-5)


def test_a_minimal_configuration_loads_with_the_defaults_of_peft(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=["q_proj"], r=8, lora_alpha=8)
    theirs.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    lorank.load(base, tmp_path)
    torch.testing.assert_close(output(base, x), output(theirs, x), rtol=1e-5, atol=1e-5)


def test_a_layer_whose_name_ends_anothers_is_the_only_one_that_peft_adapts(tmp_path: Path) -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["fc"](self.fc(x))

    base, x = Twin(), torch.randn(2, 6)
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), "re:fc")
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any("inner" in name for name, _ in theirs.named_parameters() if "lora_" in name)


def test_a_head_that_is_a_sequence_goes_both_ways(tmp_path: Path) -> None:
    head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    base, x = nn.ModuleDict({"body": nn.Linear(6, 6), "head": head}), torch.randn(3, 6)

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return model["head"](model["body"](x))

    theirs = peft_model(copy.deepcopy(base), target_modules=["body"], modules_to_save=["head"], r=2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path / "theirs")
    assert list(plan.copies) == ["head.0", "head.2"]
    torch.testing.assert_close(run(model), run(theirs.base_model.model), rtol=1e-5, atol=1e-5)
    lorank.save(model, tmp_path / "ours")
    again = read_by_peft(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(run(again.base_model.model), run(model), rtol=1e-5, atol=1e-5)  # pyright: ignore


FUSED = {
    "gpt2": (models.gpt2, ["c_attn[q,v]"]),
    "phi3": (lambda: CASES["fused-grouped-query"].model().model, ["qkv_proj[q,k]", "gate_up_proj[up]"]),
    "neox": (lambda: CASES["fused-interleaved"].model().model, ["query_key_value[k,v]"]),
}


@pytest.mark.parametrize("layout", FUSED)
def test_parts_of_every_layout_are_read_by_peft(layout: str, tmp_path: Path) -> None:
    build, targets = FUSED[layout]
    base, x = build(), models.ids()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=7), targets)
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)


def test_the_kind_of_task_is_written_where_peft_acts_on_it(tmp_path: Path) -> None:
    for build, targets, head, kind in [
        (models.llama, "q_proj", [], "CAUSAL_LM"),
        (models.roberta, "query", ["classifier"], "SEQ_CLS"),
        (models.roberta, "query", [], None),  # peft would add the head to what it expects in the file
    ]:
        model = build()
        lorank.adapt(model, LoRA(rank=2), targets, train_also=head)
        lorank.save(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == kind


def test_a_pickled_file_opens_on_request_only(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=["q_proj"], r=4, lora_alpha=8)
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(lorank.AdapterError, match="allow_pickle=True if you trust its origin"):
        lorank.load(base, tmp_path)
    lorank.load(base, tmp_path, allow_pickle=True)
    torch.testing.assert_close(output(base, x), output(theirs, x), rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter_model.bin").write_bytes(b"nonsense")
    with pytest.raises(lorank.AdapterError, match="cannot be read"):
        lorank.load(base, tmp_path, name="again", allow_pickle=True)


def test_modules_to_save_that_peft_matched_by_their_endings_load(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    theirs = peft_model(copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["layernorm"], r=2)
    theirs.save_pretrained(str(tmp_path))
    plan = lorank.load(base, tmp_path)
    assert len(plan.copies) == 4
    torch.testing.assert_close(output(base, x), output(theirs, x), rtol=1e-5, atol=1e-5)
