"""mlx-lm's format: what it can hold comes back as it was, the rest is refused before a file is there."""

import copy
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.formats import FORMATS
from lorank.formats.content import gather
from lorank.variants.dora import DoRA

from .. import models

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
TARGETS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Return a base, the same with an adapter, and the folder it is saved in."""
    base = models.llama()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2, alpha=3), TARGETS)
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter", format="mlx")
    return base, model, tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    """Change settings of `lora_parameters`, or of the configuration itself; ... removes one."""
    config = json.loads((folder / CONFIG).read_text())
    for name, value in changes.items():
        place = config["lora_parameters"] if name in ("rank", "scale", "alpha", "dropout") else config
        place[name] = value
        if value is ...:
            del place[name]
    (folder / CONFIG).write_text(json.dumps(config))


def assert_refused(base: nn.Module, folder: Path, *reasons: str) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.load(base, folder)
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert not any("adapters" in name for name, _ in base.named_modules())


def assert_not_written(model: nn.Module, folder: Path, *reasons: str) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.save(model, folder, format="mlx")
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert not folder.exists()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_every_adapter_that_fits_goes_round(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    size, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    base: Any = nn.Module()
    base.embed = nn.Embedding(7, size)
    base.blocks = nn.ModuleList([nn.ModuleDict({"in": nn.Linear(size, size + 1), "out": nn.Linear(size + 1, size)})])
    base.blocks.extend(copy.deepcopy(base.blocks[0]) for _ in range(blocks - 1))
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    dora = data.draw(st.booleans())
    targets = data.draw(st.lists(st.sampled_from(layers[dora:]), min_size=1, unique=True))
    rank, alpha = data.draw(st.integers(1, min(4, size))), data.draw(st.floats(0.01, 100))
    spec = (DoRA if dora else LoRA)(rank, alpha, data.draw(st.sampled_from([0.0, 0.25])), data.draw(st.booleans()))
    lorank.adapt(base, spec, targets)
    models.disturb(base)
    before = lorank.adapter_parameters(base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        lorank.save(base, folder, format="mlx", about={"labels": ["a"]})
        bare = lorank.formats.read(folder)
        config = json.loads((folder / CONFIG).read_text())
        first = (folder / TENSORS).read_bytes()
        lorank.remove(base)
        plan = lorank.load(base, folder)
        lorank.save(base, folder, format="mlx", about={"labels": ["a"]})
        assert (folder / TENSORS).read_bytes() == first
    after = lorank.adapter_parameters(base)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert bare.about == {"labels": ["a"]} and not bare.problems and bare.updates.keys() == set(targets)
    assert plan.spec is not None and plan.spec.scale == pytest.approx(spec.scale) and type(plan.spec) is type(spec)
    parameters = config["lora_parameters"]
    assert parameters["rank"] == rank and parameters["dropout"] == spec.dropout
    assert _selected(base, config["num_layers"], parameters["keys"]) == set(targets)


def _selected(model: Any, num_layers: int, keys: list[str]) -> set[str]:
    """Return the layers that mlx-lm would adapt, as its `linear_to_lora_layers` finds them."""
    count = len(model.blocks)
    within = {
        f"blocks.{number}.{name}"
        for number in range(count)[-max(num_layers, 0) :]
        for name in model.blocks[number]
        if name in keys
    }
    return within | {name for name, _ in model.named_modules() if name in keys}


def test_what_was_saved_comes_back(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    again = copy.deepcopy(base)
    lorank.load(again, folder)
    lorank.load(base, folder / TENSORS)
    x = models.ids()
    assert torch.equal(base(x).logits, model(x).logits) and torch.equal(again(x).logits, model(x).logits)


def test_saving_again_replaces_the_adapter_and_leaves_other_files(saved: tuple[Any, Any, Path]) -> None:
    _, model, folder = saved
    before = load_file(folder / TENSORS)
    (folder / "README.md").write_text("mine")
    models.disturb(model)
    lorank.save(model, folder, format="mlx")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, TENSORS]
    assert not torch.equal(load_file(folder / TENSORS)["lm_head.lora_a"], before["lm_head.lora_a"])


def test_one_rank_and_scale_for_all(tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2, alpha=3), TARGETS, ranks={"down_proj": 5})
    models.disturb(model)
    with pytest.warns(AdapterWarning) as warned:
        lorank.save(model, tmp_path / "adapter", format="mlx")
    assert sorted(str(w.message).partition(": ")[2].partition(":")[0] for w in warned) == [
        "padded with zeros to rank 5",
        "scale folded into B, where it is not 1.5",
    ]
    x = models.ids()
    lorank.load(base, tmp_path / "adapter")
    torch.testing.assert_close(base(x).logits, model(x).logits)


def test_a_wider_dtype_is_written_narrower_and_said(tmp_path: Path) -> None:
    model = models.llama().double()
    lorank.adapt(model, LoRA(rank=2), TARGETS)
    models.disturb(model)
    with pytest.warns(AdapterWarning, match="written in float32"):
        lorank.save(model, tmp_path / "adapter", format="mlx")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / TENSORS).values()} == {torch.float32}


def test_parts_of_a_fused_projection_become_one_pair(tmp_path: Path) -> None:
    base = models.gpt2()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q,v]"])
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter", format="mlx")
    assert load_file(tmp_path / "adapter" / TENSORS)["model.h.0.attn.c_attn.lora_a"].shape == (32, 4)
    lorank.load(base, tmp_path / "adapter")
    torch.testing.assert_close(base(x := models.ids()).logits, model(x).logits)


def test_what_the_format_cannot_hold_is_refused_whole(tmp_path: Path) -> None:
    model = models.bert()
    lorank.adapt(model, LoRA(rank=2), ["query"], train_also=["classifier"], bias="adapted")
    reasons = ["classifier is trained whole", "the bias of bert.encoder.layer.0.attention.self.query is trained"]
    assert_not_written(model, tmp_path / "adapter", *reasons)
    convolution = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 2))
    lorank.adapt(convolution, LoRA(rank=2), "*")
    assert_not_written(convolution, tmp_path / "adapter", "0: its weight is no plain matrix")
    alone = nn.Linear(3, 2)
    lorank.adapt(alone, LoRA(rank=2), "all-linear")
    assert_not_written(alone, tmp_path / "adapter", "this is one layer")


def test_dora_of_embeddings_and_beside_lora_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, DoRA(rank=2), ["q_proj", "embed_tokens"])
    assert_not_written(model, tmp_path / "adapter", "model.embed_tokens: DoRA of an embedding")
    content = gather(model, "default")
    del content.updates["model.embed_tokens"]
    content.updates["model.layers.1.self_attn.q_proj"].spec = LoRA(rank=2)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj is lora, others are DoRA"):
        FORMATS["mlx"].write(content, tmp_path / "adapter", model)
    assert not (tmp_path / "adapter").exists()


def test_one_of_two_tied_layers_is_refused(tmp_path: Path) -> None:
    for target in ("embed_tokens", "lm_head"):
        model = models.llama(tie_word_embeddings=True)
        with pytest.warns(AdapterWarning):
            lorank.adapt(model, LoRA(rank=2), [target])
        assert_not_written(model, tmp_path / "adapter", "shares its weight with", "tie=True")


def test_about_must_be_json(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="about"):
        lorank.save(saved[1], tmp_path / "other", format="mlx", about={"a": object()})
    assert not (tmp_path / "other").exists()


def test_peft_s_directory_is_another(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, model, folder = saved
    lorank.save(model, tmp_path / "peft")
    assert FORMATS["mlx"].detect(folder) and FORMATS["mlx"].detect(folder / TENSORS)
    assert not FORMATS["mlx"].detect(tmp_path / "peft")
    assert not FORMATS["mlx"].detect(tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds an adapter of PEFT"):
        lorank.save(model, tmp_path / "peft", format="mlx")
    lorank.load(saved[0], tmp_path / "peft")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fine_tune_type": "full"}, "this is a model"),
        ({"fine_tune_type": "qlora"}, "fine_tune_type is 'qlora'"),
        ({"fine_tune_type": "dora"}, "the file lacks m"),
        ({"lora_parameters": [1]}, "lora_parameters is [1]"),
        ({"rank": 3}, "its factors have rank 2, adapter_config.json says 3"),
        ({"rank": "2"}, "rank is '2'"),
        ({"rank": ...}, "rank is None"),
        ({"rank": True}, "rank is True"),
        ({"rank": 10**400}, "too large"),
        ({"scale": ...}, "has no scale"),
        ({"scale": float("nan")}, "alpha is nan"),
        ({"scale": 10**400}, "too large"),
        ({"scale": [2]}, "scale is [2]"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"dropout": 10**400}, "too large"),
        ({"alpha": 16}, "pass the alpha that was meant"),
    ],
)
def test_settings_that_cannot_be_right(saved: tuple[Any, Any, Path], changes: dict[str, Any], reason: str) -> None:
    base, _, folder = saved
    edit(folder, **changes)
    assert_refused(base, folder, reason)


@pytest.mark.parametrize("changes", [{"scale": ...}, {"alpha": 16, "scale": 0.1875}])
def test_alpha_can_be_given_where_the_file_is_silent(saved: tuple[Any, Any, Path], changes: dict[str, Any]) -> None:
    base, model, folder = saved
    edit(folder, **changes)
    lorank.load(base, folder, alpha=3)
    assert torch.equal(base(x := models.ids()).logits, model(x).logits)


def test_tensors_that_cannot_be_right(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    tensors = load_file(folder / TENSORS)
    block = "model.layers.0.self_attn"
    changed: dict[str, torch.Tensor | None] = {
        "lm_head.lora_b": None,
        f"{block}.q_proj.m": torch.ones(32),
        f"{block}.norm.weight": torch.ones(3),
        f"{block}.z_proj.lora_a": torch.ones(32, 2),
        f"{block}.z_proj.lora_b": torch.ones(2, 32),
        f"{block}.v_proj.lora_a": torch.ones(4, 2, 3),
        f"{block}.v_proj.lora_b": torch.ones(4, 3, 2),
        f"{block}.k_proj.lora_a": torch.ones(32, 2),
        f"{block}.k_proj.lora_b": torch.ones(3, 16),
        "model.layers.1.mlp.down_proj.lora_a": torch.ones(47, 2),
        "model.layers.1.self_attn.q_proj.lora_a": torch.full((32, 2), float("nan")),
    }
    kept = {key: changed.get(key, tensor) for key, tensor in (changed | tensors).items() if key not in changed}
    kept |= {key: tensor for key, tensor in changed.items() if tensor is not None}
    save_file({key: tensor for key, tensor in kept.items() if tensor is not None}, folder / TENSORS)
    assert_refused(
        base,
        folder,
        "lm_head: the file lacks lora_b",
        "q_proj: the file has a magnitude m, which is DoRA's",
        "norm.weight is no tensor of an adapter",
        "z_proj, which this model has not",
        "v_proj: factors of stacked experts",
        "k_proj: lora_a (32, 2) and lora_b (3, 16) are no pair",
        "down_proj: A is (2, 47) in the file",
        "q_proj: A holds NaN or Inf",
    )


def test_damaged_files(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    tensors, config = (folder / TENSORS).read_bytes(), (folder / CONFIG).read_bytes()
    for length in (0, 4, 9, 60, len(tensors) // 2, len(tensors) - 1):
        (folder / TENSORS).write_bytes(tensors[:length])
        assert_refused(base, folder, "not a whole safetensors file")
    (folder / TENSORS).unlink()
    assert_refused(base, folder, "has no adapters.safetensors")
    (folder / TENSORS).write_bytes(tensors)
    for text in (config[:30], b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / CONFIG).write_bytes(text)
        assert_refused(base, folder, "adapter_config.json")
    (folder / CONFIG).unlink()
    assert_refused(base, folder, "has no adapter_config.json")


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), which=st.sampled_from([CONFIG, TENSORS]))
def test_a_byte_changed_is_read_or_refused(place: float, value: int, which: str) -> None:
    model = models.sequential(nn.Linear(3, 2))
    lorank.adapt(model, LoRA(rank=2), "0")
    with tempfile.TemporaryDirectory() as name:
        lorank.save(model, name, format="mlx")
        content = bytearray((Path(name) / which).read_bytes())
        content[int(place * len(content))] = value
        (Path(name) / which).write_bytes(content)
        with suppress(AdapterError):
            lorank.load(models.sequential(nn.Linear(3, 2)), name)
