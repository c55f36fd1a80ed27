"""Adapter files: reproducible, replaced in one step, and checked before anything is loaded."""

import copy
import hashlib
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorank
from lorank import AdapterError, LoRA
from lorank.formats import safetensors_file

from .. import models

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Return a base, the same with an adapter on parts, heads and biases, and the folder it is saved in."""
    base = models.gpt2()
    model = copy.deepcopy(base)
    lorank.adapt(
        model,
        LoRA(rank=2, alpha=3),
        ["c_attn[q,v]", "c_fc"],
        ranks={"c_fc": 3},
        train_also=["lm_head"],
        bias="adapted",
        name="sst2",
    )
    models.disturb(model)
    lorank.save(model, tmp_path / "sst2")
    return base, model, tmp_path / "sst2"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], keep_header: bool = False) -> None:
    """Change the tensors of a file; lorank's header is dropped, or kept as it was."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata if keep_header else None)


def assert_refused(base: nn.Module, folder: Path, *reasons: str) -> None:
    before = [(name, type(module), list(module.__dict__)) for name, module in base.named_modules()]
    with pytest.raises(AdapterError) as error:
        lorank.load(base, folder)
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert [(name, type(module), list(module.__dict__)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_what_was_saved_comes_back_whole(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    x = models.ids()
    plan = lorank.load(base, folder, name="again")
    assert torch.equal(base(x).logits, model(x).logits)
    assert plan.adapter == "again" and plan.bias == "adapted" and list(plan.copies) == ["lm_head"]
    assert {place.part for place in plan.places} == {"q", "v", "weight"}
    assert {place.spec.rank for place in plan.places} == {2, 3}
    assert not any(p.requires_grad for n, p in base.named_parameters() if ".adapters." not in n)


def test_the_safetensors_file_may_be_named_itself(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    lorank.load(base, folder / TENSORS)
    assert lorank.active_adapters(base) == ["default"]


def test_equal_adapters_make_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
        import sys, torch, lorank
        from tests import models
        torch.manual_seed(0)
        model = models.gpt2()
        spec, targets = lorank.LoRA(rank=2), ["c_attn[q,v]", "c_fc"]
        lorank.adapt(model, spec, targets, train_also=["lm_head"], bias="all", ranks={"c_fc": 3})
        models.disturb(model)
        lorank.save(model, sys.argv[1])
    """
    digests = set()
    for hash_seed in ("0", "1"):
        folder = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        digests.add(tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG, TENSORS)))
    assert len(digests) == 1


def test_saving_again_replaces_the_adapter_and_leaves_other_files(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    (folder / "model.safetensors").write_bytes(b"the base")
    (folder / "README.md").write_text("mine")
    models.disturb(model)
    lorank.save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, TENSORS, "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"the base"
    lorank.load(base, folder)
    assert torch.equal(base(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


def test_a_full_disk_leaves_the_old_adapter_whole(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    models.disturb(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(AdapterError, match="cannot write"):
            lorank.save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lorank.load(base, folder)


def test_what_cannot_be_written_is_said(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, model, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file; an adapter is a directory"):
        lorank.save(model, tmp_path / "file")
    with pytest.raises(AdapterError, match="cannot write"):
        lorank.save(model, tmp_path / "file" / "below")
    with pytest.raises(AdapterError, match="unknown format 'onnx'"):
        lorank.save(model, tmp_path, format="onnx")
    with torch.no_grad():
        next(iter(lorank.adapter_parameters(model).values()))[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"cannot save: transformer\.h\.0\.attn\.c_attn: q\.A holds NaN or Inf"):
        lorank.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_of_several_adapters_must_be_named(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, model, _ = saved
    lorank.adapt(model, LoRA(rank=1), "c_fc", name="other")
    lorank.save(model, tmp_path / "active")  # the only active one
    assert json.loads((tmp_path / "active" / CONFIG).read_text())["r"] == 1
    lorank.activate(model, "sst2", "other")
    with pytest.raises(AdapterError, match="cannot save: name one of sst2, other"):
        lorank.save(model, tmp_path / "which")
    lorank.save(model, tmp_path / "which", "sst2")


def test_files_that_are_not_there_or_not_whole_are_named(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    base, _, folder = saved
    assert_refused(base, tmp_path / "nowhere", "there is no such file or directory")
    assert_refused(base, tmp_path, "it is no adapter in a format that lorank reads", "there are adapters in", "sst2")
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-100])
    assert_refused(base, folder, "is not a whole safetensors file")
    (folder / TENSORS).write_bytes(b"")
    assert_refused(base, folder, "is not a whole safetensors file")
    (folder / TENSORS).unlink()
    assert_refused(base, folder, f"has no {TENSORS}")
    (folder / "adapter_model.bin").write_bytes(b"")
    assert_refused(base, folder, "is a pickle: pass allow_pickle=True")
    (folder / TENSORS).write_bytes(whole)
    (folder / CONFIG).write_text("{")
    assert_refused(base, folder, "is not JSON")
    (folder / CONFIG).write_text("[]")
    assert_refused(base, folder, "holds a list, not an object")


def test_tensors_that_were_changed_are_noticed(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).add_(1), keep_header=True)
    assert_refused(base, folder, "their sha256 differs")


def test_a_configuration_that_does_not_belong_to_the_tensors_is_noticed(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    edit_config(folder, lora_alpha=16)
    assert_refused(
        base, folder, "transformer.h.0.attn.c_attn: rank and scale are 4 and 4 in adapter_config.json, 4 and 1.5"
    )


def test_every_problem_of_a_file_is_in_one_error(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    prefix = "base_model.model.transformer.h."

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{prefix}0.mlp.c_fc.lora_A.weight"] = torch.zeros(3, 31)
        tensors[f"{prefix}1.mlp.c_fc.lora_B.weight"][0, 0] = float("inf")
        tensors[f"{prefix}7.mlp.c_fc.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{prefix}7.mlp.c_fc.lora_B.weight"] = torch.zeros(128, 4)
        tensors[f"{prefix}0.extra.weight"] = torch.zeros(3)
        tensors["base_model.model.lm_head.weight"] = torch.zeros(90, 32)

    edit_tensors(folder, spoil)
    assert_refused(
        base,
        folder,
        "transformer.h.0.mlp.c_fc: A is (3, 31) in the file, the model needs (3, 32)",
        "transformer.h.1.mlp.c_fc: B holds NaN or Inf",
        "transformer.h.7.mlp.c_fc, which this model has not",
        "the file has transformer.h.0.extra.weight, for which this model has no place",
        "lm_head.weight is (90, 32) in the file, the model needs (97, 32)",
    )


def test_another_base_is_an_error_unless_asked_for(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    with torch.no_grad():
        base.transformer.h[1].mlp.c_fc.weight.mul_(1.001)  # one matrix of six, by a little
    assert_refused(
        base, folder, "differs from the one this adapter was saved on, in 1 of 6", "by 0.10%", "allow_other_base"
    )
    with pytest.warns(lorank.AdapterWarning, match="in 1 of 6 adapted matrices"):
        lorank.load(base, folder, allow_other_base=True)
    assert lorank.active_adapters(base) == ["default"]


@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_of_the_same_base_is_a_warning(then: torch.dtype, now: torch.dtype, tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base).to(then)
    lorank.adapt(model, LoRA(rank=2), "all-linear")
    lorank.save(model, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    base, other = base.to(now), other.to(now)
    if now == then:
        lorank.load(base, tmp_path)
    else:
        with pytest.warns(lorank.AdapterWarning, match=f"in another dtype .*{str(now).removeprefix('torch.')} now"):
            lorank.load(base, tmp_path)
    with pytest.raises(AdapterError, match="in 14 of 14 adapted matrices"):
        lorank.load(other, tmp_path)


def test_base_tensors_in_a_file_are_ignored_when_equal_and_refused_when_not(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    own = base.transformer.wte.weight.detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.transformer.wte.weight": own}))
    twin = copy.deepcopy(base)
    lorank.load(twin, folder)
    assert lorank.adapter_names(twin) == ["default"]
    edit_tensors(folder, lambda tensors: tensors["base_model.model.transformer.wte.weight"].add_(1))
    assert_refused(base, folder, "brings the base's transformer.wte.weight, and it differs")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("layer_replication", [[0, 1]]), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora")],
        *[("peft_type", "IA3"), ("peft_type", None), ("bias", "some"), ("r", "8"), ("alpha_pattern", {"(?=a)": 1})],
    ],
)
def test_settings_that_would_change_the_outputs_are_refused(
    saved: tuple[Any, Any, Path], setting: str, value: object
) -> None:
    base, _, folder = saved
    edit_config(folder, **{setting: value})
    assert_refused(base, folder, repr(value) if setting != "alpha_pattern" else "(?=a)")


def test_settings_that_are_not_known_are_told(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    edit_config(folder, use_magic=True, unused=None)
    with pytest.warns(lorank.AdapterWarning, match="use_magic is not known here and was ignored"):
        lorank.load(base, folder)


def test_layers_that_the_configuration_names_but_the_file_lacks_are_told(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for factor in ("lora_A", "lora_B"):
            del tensors[f"base_model.model.transformer.h.1.mlp.c_fc.{factor}.weight"]
        del tensors["base_model.model.transformer.h.1.mlp.c_fc.base_layer.bias"]

    edit_tensors(folder, drop)
    with pytest.warns(
        lorank.AdapterWarning, match=r"also names transformer\.h\.1\.mlp\.c_fc, for which the file has no"
    ):
        plan = lorank.load(base, folder)
    assert "transformer.h.1.mlp.c_fc" not in plan.layers


def test_a_pattern_of_a_file_cannot_keep_the_loader_busy(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    edit_tensors(folder, lambda tensors: None)
    edit_config(folder, alpha_pattern={"(.*)*(.*)*(.*)*x$": 5}, target_modules="(.*)*(.*)*(.*)*x")
    lorank.load(base, folder)  # with `re` this would not come back
    assert lorank.active_adapters(base) == ["default"]


def test_packing_sorts_metadata_and_keeps_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5, dtype=torch.float64), "a": torch.arange(4).bfloat16(), "c": torch.zeros(0, 2)}
    packed = safetensors_file.pack(tensors, {"z": "1", "a": "ü", "format": "pt"})
    assert packed == safetensors_file.pack(dict(reversed(tensors.items())), {"format": "pt", "a": "ü", "z": "1"})
    (tmp_path / "x.safetensors").write_bytes(packed)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"a": "ü", "format": "pt", "z": "1"}
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors
    )
    assert safetensors_file.digest(packed) == safetensors_file.digest(safetensors_file.pack(tensors))


def test_a_model_on_the_meta_device_cannot_save_or_load(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, _, folder = saved
    with torch.device("meta"):
        model = models.gpt2()
    with pytest.raises(AdapterError, match="the model is on the meta device"):
        lorank.load(model, folder)
    lorank.adapt(model, LoRA(rank=1), "c_fc")
    with pytest.raises(AdapterError, match="is on the meta device and has no values"):
        lorank.save(model, tmp_path / "meta")


def test_two_files_are_replaced_together_or_not_at_all(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    before = (folder / TENSORS).read_bytes()
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    models.disturb(model)
    with pytest.raises(AdapterError, match="cannot write"):
        lorank.save(model, folder)
    assert (folder / TENSORS).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    assert lorank.adapter_names(base) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: "{",
        lambda header: "[]",
        lambda header: json.dumps({"version": 1}),
        lambda header: json.dumps(header | {"bias": "foo"}),
        lambda header: json.dumps(header | {"layers": 3}),
        lambda header: json.dumps(header | {"spec": {"variant": "lora", "rank": -1}}),
        lambda header: json.dumps(header | {"spec": {"variant": "lora", "dtype": "foo"}}),
        lambda header: json.dumps(header | {"spec": {"variant": "magic"}}),
        lambda header: "[" * 100_000,
    ],
)
def test_a_damaged_header_is_named(saved: tuple[Any, Any, Path], damage: Callable[[dict[str, Any]], str]) -> None:
    base, _, folder = saved
    _, tensors, metadata = safetensors_file.read(folder / TENSORS)
    metadata["lorank"] = damage(json.loads(metadata["lorank"]))
    (folder / TENSORS).write_bytes(safetensors_file.pack(tensors, metadata))
    assert_refused(base, folder, "lorank's header is damaged")


def test_a_header_of_another_version_asks_for_an_update(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    _, tensors, metadata = safetensors_file.read(folder / TENSORS)
    metadata["lorank"] = json.dumps({"version": 2, "sha256": "0"})
    (folder / TENSORS).write_bytes(safetensors_file.pack(tensors, metadata))
    assert_refused(base, folder, "header version 2", "update lorank")


def test_ranks_of_the_configuration_and_the_tensors_must_agree(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    edit_tensors(folder, lambda tensors: None)
    edit_config(folder, r=16)
    assert_refused(base, folder, "transformer.h.0.attn.c_attn: its factors have rank 4, adapter_config.json says 16")


def test_parts_go_into_models_with_the_same_layout_only(saved: tuple[Any, Any, Path]) -> None:
    _, _, folder = saved
    other = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict() for _ in range(2)])})})
    for block in other["transformer"]["h"]:  # pyright: ignore
        block["attn"] = nn.ModuleDict({"c_attn": nn.Linear(32, 96)})
    assert_refused(
        other,
        folder,
        "transformer.h.0.attn.c_attn: the row layout of 'c_attn' in ModuleDict is not known",
        "transformer.h.0.mlp.c_fc, which this model has not",
    )
    wider = models.gpt2()
    wider.transformer.h[0].attn.c_attn = type(wider.transformer.h[0].attn.c_attn)(192, 32)
    wider.transformer.h[0].attn.embed_dim = 64
    assert_refused(wider, folder, "h.0.attn.c_attn: its tensors are not the parts q, v of this model's layer")


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = models.sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    lorank.save(model, tmp_path)
    A, head = "base_model.model.0.lora_A.weight", "base_model.model.1.weight"
    for key, tensor, reason in [
        (A, torch.full((2, 4), 1e300, dtype=torch.float64), "0: A holds numbers that are too large for float32"),
        (A, torch.ones(2, 4, dtype=torch.int64), "0: A is int64 in the file; it must be floating-point"),
        (head, torch.full((4, 4), 1e300, dtype=torch.float64), "1.weight holds numbers that are too large for float32"),
    ]:
        folder = tmp_path / key
        lorank.save(model, folder)
        edit_tensors(folder, lambda tensors, key=key, tensor=tensor: tensors.update({key: tensor}))
        assert_refused(base, folder, reason)


def test_two_names_of_one_layer_may_not_have_two_adapters(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lorank.adapt(base, LoRA(rank=2), ["a", "b"], bias="adapted")
    models.disturb(base)
    lorank.save(base, tmp_path)
    edit_tensors(tmp_path, lambda tensors: None)
    shared = nn.ModuleDict({"a": nn.Linear(4, 4)})
    shared["b"] = shared["a"]
    assert_refused(shared, tmp_path, "adapts a twice, under two of its names", "a bias for a twice")


@pytest.mark.parametrize("name", ["lora_A", "base_layer", "modules_to_save", "lora_embedding_B", "original_module"])
def test_copies_and_biases_of_modules_with_any_name_come_back(name: str, tmp_path: Path) -> None:
    base = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), "body", train_also=[f"{name}.fc"], bias="adapted")
    models.disturb(model)
    lorank.save(model, tmp_path)
    plan = lorank.load(base, tmp_path)
    assert list(plan.copies) == [f"{name}.fc"] and list(plan.biases) == ["body"]


def test_the_default_dtype_and_device_do_not_matter(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    before = (folder / TENSORS).read_bytes()
    torch.set_default_dtype(torch.bfloat16)
    try:
        lorank.load(base, folder)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        lorank.save(model, folder)
    assert (folder / TENSORS).read_bytes() == before


def test_buffers_of_a_copy_may_hold_infinities(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.full((4,), float("-inf")))

    base = models.sequential(nn.Linear(4, 4), Masked())
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    lorank.save(model, tmp_path)
    lorank.load(base, tmp_path)
    assert torch.equal(base[1].adapters["default"].mask, base[1].mask)
