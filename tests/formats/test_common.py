"""What all formats have in common: what is folded stays exact, what is lost is said, what is not needed is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorank
from lorank import AdapterError, AdapterWarning, DoRA, LoHa, LoRA, formats
from lorank.converting import verify
from lorank.formats.content import Content, LayerUpdate, gather
from lorank.formats.pairs import Pair

from .. import models

FILES = {
    "peft": "peft",
    "vllm": "vllm",
    "mlx": "mlx",
    "gguf": "a.gguf",
    "kohya": "a.safetensors",
    "loralib": "a.pt",
    "lorank": "lorank",
}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def adapted(spec: Any = None, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    model = models.llama()
    lorank.adapt(model, spec or LoRA(rank=4, alpha=6), list(targets), **options)
    models.disturb(model)
    return model


def of_peft(folder: Path, dtype: torch.dtype) -> Path:
    """Return a folder with an adapter of several scales as PEFT writes it, in a dtype."""
    lorank.save(adapted(alphas={"v_proj": 5}), folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    return folder


def test_formats_declare_what_they_are() -> None:
    assert formats.FORMATS.keys() == FILES.keys() | {"torchtune"}
    assert [name for name, module in formats.FORMATS.items() if not module.WRITES] == ["torchtune"]
    assert all("lora" in module.NATIVE for module in formats.FORMATS.values() if module.WRITES)


@pytest.mark.parametrize("to", FILES)
def test_a_format_is_told_by_what_a_file_holds(to: str, tmp_path: Path) -> None:
    path = tmp_path / FILES[to]
    formats.write(gather(adapted(), "default"), path, to, models.llama())
    assert formats.detect(path) == ("peft" if to == "vllm" else to)
    assert formats.detect(tmp_path) is None and formats.detect(tmp_path / "nothing") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", FILES)
def test_folding_into_narrow_numbers_changes_nothing(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = of_peft(tmp_path / "source", dtype)
    base: Any = models.llama()
    done = lorank.convert(source, tmp_path / FILES[to], to, base)
    assert any("scale folded into B" in note for note in done.folded) == (to not in ("peft", "kohya", "lorank"))
    found = verify(base, source, done.target, {"input_ids": models.ids()}, told_target=done.told)
    assert found.equal and found.largest_difference <= 1e-5 * found.largest_output, found


def test_folding_does_not_overflow() -> None:
    pair = Pair(torch.ones(2, 3), torch.full((4, 2), 60000.0, dtype=torch.float16), 8.0).at(3, 1.0)
    assert pair.B.dtype == torch.float32 and pair.B[:, :2].unique().item() == 480000 and pair.A.shape == (3, 3)
    same = Pair(torch.ones(2, 3), torch.ones(4, 2, dtype=torch.float16), 8.0).at(3, 8.0)
    assert same.B.dtype == torch.float16


def test_parts_of_different_scales_are_folded_exactly(tmp_path: Path) -> None:
    model = models.gpt2()
    lorank.adapt(model, LoRA(rank=2, alpha=3), ["c_attn[q,v]"])
    models.disturb(model)
    content = gather(model, "default")
    for update in content.updates.values():
        update.specs["v"] = LoRA(rank=2, alpha=5)
        for tensors in update.tensors.values():
            tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})
    formats.write(content, tmp_path / "vllm", "vllm", model)
    written = formats.read(tmp_path / "vllm")
    for name, update in content.updates.items():
        A, B = written.updates[name].pair()
        dense = written.updates[name].spec.scale * B.double() @ A.double()
        for part, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
            A, B = (factor.double() for factor in update.pair(part))
            torch.testing.assert_close(dense[rows], update.spec_of(part).scale * B @ A, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("about", [{"x": {1}}, {"x": object()}, {("a", "b"): 1}, {1: 2, "a": 3}])
def test_what_an_adapter_says_of_itself_must_be_json(to: str, about: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no file can hold what `about` says"):
        lorank.save(adapted(), tmp_path / "new" / FILES[to], format=to, about=about)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf", "kohya"])
def test_what_an_adapter_says_of_itself_comes_back(to: str, tmp_path: Path) -> None:
    path = tmp_path / FILES[to]
    about = {"task": "classification", "labels": ["a", "é"], "nested": {"none": None, "number": 1.5}}
    lorank.save(adapted(), path, format=to, about=about)
    found = formats.read(path)
    assert found.about == about and found.task == "classification" and not found.problems
    lorank.save(adapted(), path, format=to, about={"task": ["classification"]})
    assert formats.read(path).task == ("causal-lm" if to == "peft" else None)  # which PEFT's configuration says too


@pytest.mark.parametrize("to", ["peft", "vllm", "mlx", "gguf", "kohya"])
@pytest.mark.parametrize("given", [{"alpha": 3.0}, {"parts": ("q",)}])
@pytest.mark.filterwarnings("ignore::lorank.AdapterWarning")
def test_what_a_file_says_cannot_be_given(to: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = adapted()
    lorank.save(model, tmp_path / FILES[to], format=to)
    lorank.remove(model)
    with pytest.raises(AdapterError, match=f"{next(iter(given))} is for files that do not say it, and this one does"):
        lorank.load(model, tmp_path / FILES[to], **given)
    lorank.load(model, tmp_path / FILES[to])


def test_the_same_of_files_that_do_not_say_everything(tmp_path: Path) -> None:
    mlx, kohya, loralib = (tmp_path / FILES[to] for to in ("mlx", "kohya", "loralib"))
    lorank.save(adapted(), mlx, format="mlx")
    config = json.loads((mlx / "adapter_config.json").read_text())
    del config["lora_parameters"]["scale"]
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    lorank.save(adapted(), kohya, format="kohya")
    save_file({key: tensor for key, tensor in load_file(kohya).items() if "0_self_attn_q_proj.alpha" not in key}, kohya)
    with pytest.warns(AdapterWarning, match="lora_alpha"):
        lorank.save(adapted(), loralib, format="loralib")
    for path in (mlx, kohya, loralib):
        options: dict[str, Any] = {"alpha": 6, "allow_pickle": path == loralib}
        plan = lorank.load(models.llama(), path, **options)
        assert {place.spec.scale for place in plan.places} == {1.5}
        with pytest.raises(AdapterError, match="parts is for files that do not say it"):
            lorank.load(models.llama(), path, parts=("q",), **options)


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("method", ["pissa", "loha", "vera", "olora"])
def test_a_method_that_becomes_lora_is_said_once_with_its_layers(method: str, to: str, tmp_path: Path) -> None:
    model = adapted(lorank.variants.METHODS[method](rank=2), ["q_proj"])
    notes = formats.write(gather(model, "default"), tmp_path / FILES[to], to, model)
    said = [note for note in notes if "as LoRA" in note]
    layers = ", ".join(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    quiet = to in ("peft", "lorank") or (to, method) == ("kohya", "loha")
    assert said == ([] if quiet else [f"{method} written as LoRA, which computes the same: {layers}"])


@pytest.mark.filterwarnings("ignore::lorank.AdapterWarning")
def test_dora_and_others_are_no_one_adapter_of_peft(tmp_path: Path) -> None:
    """Such as kohya's file may hold: PEFT has one `use_dora`, with which it would compute something else."""
    model = adapted(DoRA(rank=2))
    lorank.save(model, tmp_path / "a.safetensors", format="kohya")
    kept = {k: t for k, t in load_file(tmp_path / "a.safetensors").items() if "v_proj.dora_scale" not in k}
    save_file(kept, tmp_path / "a.safetensors")
    mixed = models.llama()
    lorank.load(mixed, tmp_path / "a.safetensors")
    reason = r"one method for all layers.*(DORA|LORA) \(model.layers.0.self_attn.[qv]_proj, .*\) and (DORA|LORA) \("
    with pytest.raises(AdapterError, match=reason):
        lorank.save(mixed, tmp_path / "peft")
    with pytest.raises(AdapterError, match="DoRA has no low-rank form"):
        lorank.save(mixed, tmp_path / "vllm", format="vllm")
    with pytest.raises(AdapterError, match="others are DoRA: mlx-lm reads one method"):
        lorank.save(mixed, tmp_path / "mlx", format="mlx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_dora_beside_a_method_without_factors_is_refused_by_mlx(tmp_path: Path) -> None:
    content = gather(adapted(DoRA(rank=2)), "default")
    content.updates[V] = gather(adapted(LoHa(rank=2), [V]), "default").updates[V]
    with pytest.raises(AdapterError, match=f"{V} is loha, others are DoRA: mlx-lm reads one method for all layers"):
        formats.FORMATS["mlx"].write(content, tmp_path / "mlx", None)


def test_ties_that_vllm_does_not_know_are_said(tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    lorank.adapt(model, LoRA(rank=2), ["embed_tokens"], tie=True)
    with pytest.warns(AdapterWarning, match="the tie of lm_head with model.embed_tokens is lost"):
        lorank.save(model, tmp_path / "vllm", format="vllm")


def _with(content: Content, kind: str, value: float) -> Content:
    """Put a number into one of the tensors that an adapter may hold."""
    tensor = {
        "update": content.updates[Q].tensors["weight"]["A"],
        "bias": torch.zeros(32),
        "copy": torch.ones(32),
        "tokens": torch.zeros(2, 32),
    }[kind]
    tensor.view(-1)[1] = value
    if kind == "bias":
        content.biases, content.bias = {Q: tensor}, "adapted"
    elif kind == "copy":
        content.copies["model.norm"] = {"weight": tensor}
    elif kind == "tokens":
        content.tokens["model.embed_tokens"] = ([1, 2], tensor)
    return content


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["update", "bias", "copy", "tokens"])
def test_nothing_that_is_not_finite_is_converted(kind: str, value: float, tmp_path: Path) -> None:
    formats.write(_with(gather(adapted(), "default"), kind, value), tmp_path / "source", "peft", None)
    with pytest.raises(AdapterError, match="NaN or Inf in model"):
        lorank.convert(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_a_base_that_cannot_be_recognised_any_more_is_said(to: str, tmp_path: Path) -> None:
    base = models.gpt2()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q,v]", "c_fc"])
    models.disturb(model)
    lorank.save(model, tmp_path / "source")
    done = lorank.convert(tmp_path / "source", tmp_path / "target", to)
    assert any("does not say by which base it was trained" in remark for remark in done.remarks)
    assert "parts of transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn are one update" in str(done)
    for update in done.content.updates.values():
        assert update.fingerprints.keys() | update.matrices.keys() <= update.tensors.keys()
    kept = formats.read(tmp_path / "target").updates
    assert {name: bool(update.fingerprints) for name, update in kept.items()} == {n: "c_fc" in n for n in kept}
    found = verify(base, tmp_path / "source", tmp_path / "target", {"input_ids": models.ids()})
    assert found.equal
    with_model = lorank.convert(tmp_path / "source", tmp_path / "again", model=base)
    assert not with_model.remarks


def test_what_was_read_without_its_model_is_not_put_on_one() -> None:
    content = Content(LoRA(rank=2), {Q: LayerUpdate(LoRA(rank=2), {})}, needs_model="give the model")
    assert content.obstacles() == ["give the model"]
    content.problems.append("a problem")
    assert content.obstacles() == ["a problem", "give the model"]
