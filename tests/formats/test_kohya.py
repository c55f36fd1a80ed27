"""kohya's format: what it can hold comes back as it was, the rest is refused before a file is there."""

import copy
import json
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Phi3Config, Phi3ForCausalLM

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.formats import FORMATS
from lorank.variants import DoRA, LoHa, LoKr, PiSSA

from .. import models

TARGETS = ["0", "2", "4"]


def network() -> Any:
    """Return a model of convolutions and a linear layer, for inputs (rows, 3, 5, 5)."""
    return models.sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(54, 5))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Return a base, the same with an adapter, and the file it is saved in."""
    base = network()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2, alpha=3), TARGETS)
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter.safetensors", format="kohya")
    return base, model, tmp_path / "adapter.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def edit(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a file, whose names have __ for their first dot; None removes one."""
    tensors: dict[str, Tensor | None] = dict(load_file(path))
    tensors |= {name.replace("__", ".", 1).replace("_weight", ".weight"): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def assert_refused(base: nn.Module, path: Path, *reasons: str) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.load(base, path)
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert not any("adapters" in name for name, _ in base.named_modules())


def assert_not_written(model: nn.Module, path: Path, *reasons: str) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.save(model, path, format="kohya")
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert not path.exists()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_adapter_that_fits_goes_round(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=4, max_size=4))
    kernel = data.draw(st.sampled_from([1, 2, (1, 3), 3]))
    layers = [nn.Conv2d(sizes[0], sizes[1], kernel), nn.Conv2d(sizes[1], sizes[2], 1)]
    base: Any = nn.Module()
    base.down_blocks = nn.ModuleList(layers)
    base.to_out = nn.ModuleDict({"0": nn.Linear(sizes[2], sizes[3])})
    variant = data.draw(st.sampled_from([LoRA, DoRA, LoHa, LoKr]))
    fields: dict[str, Any] = {"rank": data.draw(st.integers(1, 4)), "alpha": data.draw(st.integers(1, 800)) / 8}
    fields["dropout"] = data.draw(st.sampled_from([0.0, 0.25]))
    fields["rank_stabilised"] = data.draw(st.booleans())
    if variant is LoKr:
        fields |= {"factor": data.draw(st.sampled_from([-1, 1, 2, 4, 5]))}
        fields |= {"decompose_both": data.draw(st.booleans())}
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # of ranks that are too high
        lorank.adapt(model, variant(**fields), ["down_blocks.*", "to_out.0"])
    models.disturb(model)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        path = Path(name) / "adapter.safetensors"
        lorank.save(model, path, format="kohya", about={"labels": ["a"]})
        first = path.read_bytes()
        bare = lorank.formats.read(path)
        plan = lorank.load(base, path)
        assert plan.places[0].spec.to_json()["dropout"] == fields["dropout"]
        lorank.save(base, path, format="kohya", about={"labels": ["a"]})
        assert path.read_bytes() == first
    x, other = torch.randn(2, sizes[0], 6, 6), copy.deepcopy(base).eval()
    for layer in ("down_blocks.0", "down_blocks.1", "to_out.0"):
        x = x.mean((-1, -2)) if layer == "to_out.0" else x
        wanted = model.eval().get_submodule(layer)(x)
        apart = torch.linalg.vector_norm(other.get_submodule(layer)(x) - wanted)  # single numbers may nearly cancel
        assert apart <= 1e-4 * torch.linalg.vector_norm(wanted) + 1e-4
        x = wanted
    assert bare.about == {"labels": ["a"]} and len(bare.updates) == 3
    changed = [w for w in warned if "folded" in str(w.message) or "written as LoRA" in str(w.message)]
    if not changed:
        before, after = lorank.adapter_parameters(model), lorank.adapter_parameters(base)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert type(plan.spec) is variant
        assert plan.spec.scale == pytest.approx(variant(**fields).scale)
    assert not changed or variant is LoKr


def test_what_was_saved_comes_back(saved: tuple[Any, Any, Path]) -> None:
    base, model, path = saved
    assert {key: tuple(tensor.shape) for key, tensor in load_file(path).items()} == {
        "lycoris_0.lora_down.weight": (2, 3, 3, 3),
        "lycoris_0.lora_up.weight": (4, 2, 1, 1),
        "lycoris_2.lora_down.weight": (2, 4, 1, 1),
        "lycoris_2.lora_up.weight": (6, 2, 1, 1),
        "lycoris_4.lora_down.weight": (2, 54),
        "lycoris_4.lora_up.weight": (5, 2),
        **{f"lycoris_{layer}.alpha": () for layer in TARGETS},
    }
    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3", "format": "pt"}
    assert metadata_of(path) == expected
    lorank.load(base, path)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(base(x), model(x))


def test_ranks_and_scales_are_of_each_layer(tmp_path: Path) -> None:
    base = network()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2, alpha=3, dropout=0.5), TARGETS, ranks={"4": 4}, alphas={"0": 7})
    models.disturb(model)
    path = tmp_path / "adapter.safetensors"
    lorank.save(model, path, format="kohya")
    tensors = load_file(path)
    assert [float(tensors[f"lycoris_{layer}.alpha"]) for layer in TARGETS] == [7, 3, 3]
    assert metadata_of(path)["ss_network_dim"] == metadata_of(path)["ss_network_alpha"] == "Dynamic"
    plan = lorank.load(base, path)
    assert [(place.spec.rank, place.spec.scale) for place in plan.places] == [(2, 3.5), (2, 1.5), (4, 0.75)]
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(base.eval()(x), model.eval()(x)) and plan.places[0].spec.to_json()["dropout"] == 0.5


def test_another_method_is_written_as_lora_and_said(tmp_path: Path) -> None:
    base = network()
    model = copy.deepcopy(base)
    lorank.adapt(model, PiSSA(rank=2, alpha=3), TARGETS)
    models.disturb(model)
    with pytest.warns(AdapterWarning, match="pissa written as LoRA, which computes the same: 0, 2, 4"):
        lorank.save(model, tmp_path / "adapter.safetensors", format="kohya")
    plan = lorank.load(base, tmp_path / "adapter.safetensors")
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(base(x), model(x))
    assert plan.places[0].spec.rank == 4


def test_parts_of_a_fused_projection_become_one_pair(tmp_path: Path) -> None:
    base: Any = Phi3ForCausalLM(Phi3Config(**models.SMALL_DECODER)).eval()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), ["qkv_proj[q,v]"])
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter.safetensors", format="kohya")
    lorank.load(base, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(base(x := models.ids()).logits, model(x).logits)


def test_what_the_format_cannot_hold_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = models.bert()
    lorank.adapt(model, LoRA(rank=2), ["query", "word_embeddings"], train_also=["classifier"], bias="adapted")
    reasons = ["classifier is trained whole", "the bias of bert.encoder.layer.0.attention.self.query is trained"]
    assert_not_written(model, path, *reasons, "word_embeddings: kohya's format has no update of an embedding")
    model = models.llama()
    lorank.adapt(model, LoRA(rank=2), ["q_proj"], train_tokens=[7])
    assert_not_written(model, path, "rows of 1 tokens of model.embed_tokens are trained")
    model = models.gpt2()
    lorank.adapt(model, LoRA(rank=2), ["c_fc"])
    assert_not_written(model, path, "transformer.h.1.mlp.c_fc: its weight lies transposed")
    others = models.sequential(nn.LSTM(3, 3), nn.ConvTranspose2d(3, 3, 2), nn.Bilinear(3, 3, 3))
    lorank.adapt(others, LoRA(rank=2), "*")
    assert_not_written(others, path, *(f"{i}: LyCORIS adapts linear layers and convolutions alone" for i in range(3)))
    encoder = models.sequential(nn.TransformerEncoderLayer(4, 2))
    lorank.adapt(encoder, LoRA(rank=2), ["linear1", "out_proj"])
    reason = "PyTorch reads its weight without calling it"
    assert_not_written(encoder, path, f"0.linear1: {reason}", f"0.self_attn.out_proj: {reason}")
    alone = nn.Linear(3, 2)
    lorank.adapt(alone, LoRA(rank=2), "all-linear")
    assert_not_written(alone, path, "the model: it is one layer")
    tied = models.sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    lorank.adapt(tied, LoRA(rank=2), ["0"], tie=True)
    assert_not_written(tied, path, "1 shares its weight with 0")


def test_a_scale_that_alpha_cannot_say_is_refused(tmp_path: Path) -> None:
    for alpha in (1e-60, 1e29):
        model = network()
        lorank.adapt(model, LoRA(rank=2, alpha=alpha), TARGETS)
        path = tmp_path / f"{alpha}.safetensors"
        if alpha > 1:
            lorank.save(model, path, format="kohya")
        else:
            assert_not_written(model, path, "its scale 5e-61 is out of the range of float32")


def test_the_path_is_a_safetensors_file(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, model, path = saved
    assert_not_written(model, tmp_path / "adapter.pt", "has to end in .safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is a directory"):
        lorank.save(model, tmp_path / "folder.safetensors", format="kohya")
    before = path.read_bytes()
    with pytest.raises(AdapterError, match="about"):
        lorank.save(model, path, format="kohya", about={"a": object()})
    assert path.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["adapter.safetensors", "folder.safetensors"]


def test_names_that_are_the_same_with_underscores(tmp_path: Path) -> None:
    base: Any = nn.Module()
    base.proj_q, base.proj, base.other = nn.Linear(3, 3), nn.ModuleDict({"q": nn.Linear(3, 3)}), nn.Linear(3, 3)
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), ["proj_q"])
    assert_not_written(model, tmp_path / "one.safetensors", "proj_q: proj.q has the same name where dots are _")
    lorank.remove(model)
    lorank.adapt(model, LoRA(rank=2), ["other"])
    path = tmp_path / "adapter.safetensors"
    lorank.save(model, path, format="kohya")
    save_file({key.replace("other", "proj_q"): tensor for key, tensor in load_file(path).items()}, path)
    assert_refused(base, path, "proj_q: it may be proj_q or proj.q, which have one name where dots are _")
    del base.proj["q"]
    base.proj["q"] = nn.ModuleDict({"inner": nn.Linear(3, 3)})  # no layer, so it cannot be meant
    assert [place.name for place in lorank.load(base, path).places] == ["proj_q"]


def test_without_a_model_names_stay_as_they_are(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, _, path = saved
    content = lorank.formats.read(path)
    assert list(content.updates) == ["lycoris_0", "lycoris_2", "lycoris_4"]
    assert "known with their model alone" in str(content.needs_model) and not content.problems
    with pytest.raises(AdapterError, match="known with their model alone"):
        lorank.convert(path, tmp_path / "peft")
    assert content.updates["lycoris_0"].shapes == {"weight": (4, 3, 3, 3)}
    FORMATS["kohya"].write(content, tmp_path / "again.safetensors", None)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    content.updates["a.b"] = content.updates["a_b"] = content.updates["lycoris_0"]
    with pytest.raises(AdapterError, match=r"a_b: another layer has the same name in such a file, lycoris_a_b"):
        FORMATS["kohya"].write(content, tmp_path / "more.safetensors", None)


def test_layers_that_the_model_has_not(saved: tuple[Any, Any, Path]) -> None:
    base, _, path = saved
    tensors = load_file(path)
    names = {"lycoris_0": "lora_unet_input_blocks_1_0", "lycoris_2": "lora_unet_2", "lycoris_4": "lora_unet_44"}
    save_file({names[key.partition(".")[0]] + "." + key.partition(".")[2]: t for key, t in tensors.items()}, path)
    reasons = ["names are those of the models before diffusers", "44: this model has no such layer; nearest: 4"]
    assert_refused(base, path, *reasons)
    save_file({key.replace("lycoris_", "other_"): tensor for key, tensor in tensors.items()}, path)
    assert_refused(
        base, path, "other_0.alpha is no tensor of a layer: those begin with lora_unet_, lora_te_ or lycoris_"
    )


def text_model(kind: Any, layers: int = 1, size: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=size,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return kind(config).eval()


class UNet2DConditionModel(nn.Module):
    """A model with the name of diffusers' class."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (UNet2DConditionModel(), "lora_unet_to_q"),
        (text_model(CLIPTextModel), "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        (text_model(CLIPTextModelWithProjection), "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        (models.llama(num_hidden_layers=1), "lycoris_model_layers_0_self_attn_q_proj"),
    ],
)
def test_the_prefix_is_of_the_model_s_class(tmp_path: Path, model: Any, name: str) -> None:
    base = copy.deepcopy(model)
    lorank.adapt(model, LoRA(rank=2), ["*q_proj" if "proj" in name else "to_q"])
    models.disturb(model)
    path = tmp_path / "adapter.safetensors"
    if "lora_te" in name:
        with pytest.warns(AdapterWarning, match="SDXL has lora_te1 and lora_te2"):
            lorank.save(model, path, format="kohya")
    else:
        lorank.save(model, path, format="kohya")
    assert {key.partition(".")[0] for key in load_file(path)} == {name}
    lorank.load(base, path)
    for own, other in zip(
        lorank.adapter_parameters(model).values(), lorank.adapter_parameters(base).values(), strict=True
    ):
        assert torch.equal(own, other)


def test_a_file_for_several_models(tmp_path: Path) -> None:
    made = {"lora_unet": UNet2DConditionModel(), "lora_te1": text_model(CLIPTextModel, 1)}
    made["lora_te2"] = text_model(CLIPTextModelWithProjection, 2, 32)
    path, tensors = tmp_path / "one.safetensors", {}
    for prefix, model in made.items():
        lorank.adapt(copied := copy.deepcopy(model), LoRA(rank=2), ["*q_proj" if "te" in prefix else "to_q"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)
            lorank.save(copied, path, format="kohya")
        for key, tensor in load_file(path).items():
            tensors[key.replace("lora_te_", f"{prefix}_")] = tensor
    save_file(tensors, path)
    for prefix, model in made.items():
        with pytest.warns(AdapterWarning) as warned:
            plan = lorank.load(model, path)
        others = {"lora_unet": 1, "lora_te1": 1, "lora_te2": 2}
        layers = others.pop(prefix)
        assert len(plan.places) == layers
        expected = {f"its {n} layers {other}_… are for another model, and were left out" for other, n in others.items()}
        assert {str(w.message).rpartition(": ")[2] for w in warned} == expected
    only = {key.replace("lora_te1", "lora_te3"): t.clone() for key, t in tensors.items() if "lora_te1" in key}
    save_file(tensors | only, path)
    assert_refused(text_model(CLIPTextModel), path, "of which more than one fit this one")
    assert_refused(models.llama(), path, "none of them fit this one; lora_te1_… does not")


def test_alpha(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    base, _, path = saved
    original = path.read_bytes()
    edit(path, lycoris_0__alpha=None, lycoris_4__alpha=torch.tensor([6.0], dtype=torch.bfloat16))
    with pytest.warns(AdapterWarning, match=r"0: no alpha, which kohya takes as the rank \(scale 1\)"):
        plan = lorank.load(copy.deepcopy(base), path)
    assert [place.spec.scale for place in plan.places] == [1, 1.5, 3]
    plan = lorank.load(copy.deepcopy(base), path, alpha=5)  # said by who loads it
    assert [place.spec.scale for place in plan.places] == [2.5, 1.5, 3]
    for wrong, reason in (
        (torch.tensor(0.0), "alpha is 0; of 0 kohya makes the scale 1, and other tools no update at all"),
        (torch.tensor(float("nan")), "alpha is nan"),
        (torch.tensor([1.0, 2.0]), "alpha is (2,); it must be one number"),
        (torch.tensor(3), "alpha is int64 in the file; it must be floating-point"),
        (torch.ones(0), "alpha is empty"),
        (torch.tensor(1e31), "alpha is 9.9"),
    ):
        path.write_bytes(original)
        edit(path, lycoris_0__alpha=wrong)
        assert_refused(base, path, reason)


def test_tensors_that_cannot_be_right(saved: tuple[Any, Any, Path]) -> None:
    base, _, path = saved
    original = path.read_bytes()
    down, up = torch.ones(2, 54), torch.ones(5, 2)
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({"lora_up_weight": None}, "4: the file lacks lora_up.weight"),
        ({"lora_down_weight": None}, "4: the file lacks lora_down.weight"),
        ({"lora_down_weight": down[:1]}, "lora_down (1, 54) and lora_up (5, 2) are no pair of factors"),
        ({"lora_down_weight": down[0]}, "lora_down (54,) and lora_up (5, 2) are no pair of factors"),
        ({"lora_up_weight": up[0]}, "lora_up.weight is (2,); it must be a matrix"),
        ({"lora_down_weight": down[:, :53].clone()}, "its update is (5, 53), the layer's weight (5, 54)"),
        ({"lora_down_weight": down.view(2, 6, 3, 3)}, "its update has the kernel (3, 3), the layer has none"),
        ({"lora_down_weight": torch.ones(0, 54)}, "lora_down.weight is empty"),
        ({"lora_down_weight": down.int()}, "lora_down.weight is int32"),
        ({"lora_down_weight": down * float("inf")}, "4: A holds NaN or Inf"),
        ({"lora_mid_weight": torch.ones(3, 3, 1)}, "lora_mid.weight (3, 3, 1) and the factor of 2 rows"),
        ({"dora_scale": torch.ones(1, 54)}, "dora_scale is (1, 54), and 5 rows have as many lengths"),
        ({"dora_scale": torch.ones(())}, "dora_scale is (), and 5 rows"),
        ({"diff": torch.ones(5, 54)}, "diff is a difference of the whole weight, and no adapter"),
        ({"diff_b": torch.ones(5)}, "diff_b is a difference of the whole bias"),
        ({"what": torch.ones(5)}, "what is no tensor that lorank knows of this format"),
        ({"hada_w1_a": torch.ones(5, 2)}, "the file has factors of LoRA and LoHa for it"),
        ({"lora_up_weight": None, "lora_down_weight": None}, "the file has factors of no method for it"),
    ]
    for changes, reason in cases:
        path.write_bytes(original)
        edit(path, **{f"lycoris_4__{kind}": tensor for kind, tensor in changes.items()})
        assert_refused(base, path, reason)
    path.write_bytes(original)
    edit(path, lycoris_0__lora_down_weight=torch.ones(2, 3, 9, 1))
    assert_refused(base, path, "0: its update has the kernel (9, 1), the layer (3, 3)")


def layer_file(path: Path, **tensors: Tensor) -> Path:
    """Write a file with tensors of one linear layer, 4, of 5 outputs and 54 inputs."""
    save_file({f"lycoris_4.{kind}": tensor for kind, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 54), "hada_w2_a": (5, 2)}, "the file lacks hada_w2_b"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (3, 54)}, "hada_w1_a (5, 2) and hada_w1_b (3, 54) are no pair"),
        (
            {"hada_w1_a": (5, 2), "hada_w1_b": (2, 54), "hada_w2_a": (5, 3), "hada_w2_b": (3, 54)},
            "its two products are of different shapes or ranks",
        ),
        ({"hada_w1_a": (2, 5), "hada_w1_b": (2, 54), "hada_t1": (3, 2, 1)}, "hada_t1 (3, 2, 1) do not belong together"),
        ({"hada_w1_a": (2, 5), "hada_w1_b": (2, 54), "hada_t1": (2,)}, "hada_t1 (2,) do not belong together"),
        ({"lokr_w1": (1, 6)}, "the file has no lokr_w2 for it, no whole factor"),
        ({"lokr_w1": (1, 6), "lokr_w2_a": (5, 2)}, "the file has lokr_w2_a for it, no whole factor"),
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 9), "lokr_w2_a": (5, 2)}, "lokr_w2, lokr_w2_a for it, no whole factor"),
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 8)}, "its update is (5, 48), the layer's weight (5, 54)"),
        ({"lokr_w1": (6,), "lokr_w2": (5, 9)}, "no matrices"),
        ({"lokr_w1": (1, 6, 1), "lokr_w2": (5, 9)}, "no matrices"),
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 9), "lokr_t2": (2, 2, 1)}, "and a whole lokr_w2"),
        ({"lokr_w1": (1, 6), "lokr_w2_a": (5, 2), "lokr_w2_b": (3, 9)}, "are no pair of factors"),
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 9), "lokr_t1": (2, 2, 1)}, "a core of lokr_w1"),
        (
            {"lokr_w1_a": (1, 1), "lokr_w1_b": (1, 6), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 9)},
            "the factors of its lokr_w1 and of its lokr_w2 have ranks 1 and 2",
        ),
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 9), "dora_scale": (5, 1)}, "DoRA of LoRA alone"),
    ],
)
def test_products_that_cannot_be_right(tmp_path: Path, tensors: dict[str, Any], reason: str) -> None:
    made = {kind: torch.ones(shape) for kind, shape in tensors.items()}
    assert_refused(network(), layer_file(tmp_path / "one.safetensors", **made), reason)


@pytest.mark.parametrize(
    ("shapes", "alpha", "scale"),
    [
        ({"lokr_w1": (1, 6), "lokr_w2": (5, 9)}, 3.0, 1.0),  # both whole: no scale
        ({"lokr_w1": (5, 6), "lokr_w2": (1, 9)}, 3.0, 1.0),  # a division that no factor gives
        ({"lokr_w1": (5, 6), "lokr_w2_a": (1, 2), "lokr_w2_b": (2, 9)}, 3.0, 1.5),
        ({"lokr_w1": (1, 6), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 9)}, 3.0, 1.5),
        ({"lokr_w1": (1, 6), "lokr_w2_a": (5, 7), "lokr_w2_b": (7, 9)}, 3.5, 0.5),  # of a rank that would be whole
        ({"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 6), "lokr_w2": (1, 9)}, 3.0, 1.5),
    ],
)
def test_every_kronecker_product_is_read(tmp_path: Path, shapes: dict[str, Any], alpha: float, scale: float) -> None:
    base, x = network(), torch.randn(2, 54)
    made = {kind: torch.randn(shape) for kind, shape in shapes.items()}
    C = made["lokr_w1"] if "lokr_w1" in made else made["lokr_w1_a"] @ made["lokr_w1_b"]
    D = made["lokr_w2"] if "lokr_w2" in made else made["lokr_w2_a"] @ made["lokr_w2_b"]
    wanted = base[4](x) + scale * x @ torch.kron(C, D).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        lorank.load(base, layer_file(tmp_path / "one.safetensors", alpha=torch.tensor(alpha), **made))
    torch.testing.assert_close(base[4](x), wanted, rtol=1e-4, atol=1e-4)


def test_a_kernel_may_be_written_flat_and_a_matrix_as_a_kernel(saved: tuple[Any, Any, Path]) -> None:
    base, model, path = saved
    tensors = load_file(path)
    key = "lycoris_{}.lora_{}.weight"
    for layer in ("0", "2"):
        for side in ("down", "up"):
            tensors[key.format(layer, side)] = tensors[key.format(layer, side)].flatten(1)
    for side in ("down", "up"):
        tensors[key.format(4, side)] = tensors[key.format(4, side)][..., None, None]
    save_file(tensors, path)
    lorank.load(base, path)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(base(x), model(x))


def test_padding_that_lycoris_does_not_know_is_said(tmp_path: Path) -> None:
    model = models.sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    lorank.adapt(model, LoRA(rank=2), ["0"])
    with pytest.warns(AdapterWarning, match="0: LyCORIS pads its input with zeros"):
        lorank.save(model, tmp_path / "adapter.safetensors", format="kohya")


def test_other_formats_are_others(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, _, path = saved
    assert [name for name, module in FORMATS.items() if module.detect(path)] == ["kohya"]
    model = models.llama()
    lorank.adapt(model, LoRA(rank=2), ["q_proj"])
    for name, file in (("peft", "adapter_model.safetensors"), ("mlx", "adapters.safetensors")):
        lorank.save(model, tmp_path / name, format=name)
        assert not FORMATS["kohya"].detect(tmp_path / name) and not FORMATS["kohya"].detect(tmp_path / name / file)
        (tmp_path / name / "kohya.safetensors").write_bytes(path.read_bytes())  # beside another one's configuration
        assert lorank.formats.read(tmp_path / name / "kohya.safetensors", network()).updates.keys() == set(TARGETS)
    for variant in (LoKr(2), LoHa(2)):
        lorank.remove(model)
        lorank.adapt(model, variant, ["q_proj"])
        lorank.save(model, tmp_path / variant.variant)
        assert not FORMATS["kohya"].detect(tmp_path / variant.variant / "adapter_model.safetensors")
    save_file(models.llama().state_dict() | {"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert not FORMATS["kohya"].detect(tmp_path / "model.safetensors")
    assert not FORMATS["kohya"].detect(tmp_path / "absent.safetensors")


def test_damaged_files(saved: tuple[Any, Any, Path]) -> None:
    base, _, path = saved
    whole = path.read_bytes()
    for length in (0, 4, 9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        told = length > 8 + int.from_bytes(whole[:8], "little")  # what it is
        assert_refused(base, path, "not a whole safetensors file" if told else "is no adapter in a format")
    start = json.dumps({"lycoris_0.lora_up.weight": 1}).encode()
    for header in (b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b"[1]", start):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert_refused(base, path, "not a whole safetensors file" if header == start else "is no adapter in a format")
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert_refused(base, path, "is no adapter in a format")


@pytest.mark.parametrize("about", ["[1]", "{", "[" * 100_000])
def test_metadata_that_cannot_be_right(saved: tuple[Any, Any, Path], about: str) -> None:
    base, _, path = saved
    save_file(load_file(path), path, {"lorank.about": about})
    assert_refused(base, path, "its `about` is no JSON object")


@pytest.mark.parametrize("dropout", ["None", "nan", "7", "x"])
def test_dropouts_that_are_none(saved: tuple[Any, Any, Path], dropout: str) -> None:
    base, _, path = saved
    save_file(load_file(path), path, {"ss_network_dropout": dropout})
    assert lorank.load(base, path).places[0].spec.to_json()["dropout"] == 0


@settings(deadline=None, max_examples=80)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), spec=st.sampled_from([LoRA(2), LoKr(1)]))
def test_a_byte_changed_is_read_or_refused(place: float, value: int, spec: Any) -> None:
    model = models.sequential(nn.Linear(4, 6), nn.Conv2d(4, 4, 3))
    lorank.adapt(model, spec, ["0", "1"])
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        path = Path(name) / "adapter.safetensors"
        lorank.save(model, path, format="kohya")
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] = value
        path.write_bytes(content)
        with suppress(AdapterError):
            lorank.load(models.sequential(nn.Linear(4, 6), nn.Conv2d(4, 4, 3)), path)
