"""extract: from a base and a base with an adapter merged comes the adapter again; what it cannot hold is named."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorank
from lorank import AdapterError, AdapterWarning
from lorank.formats import FORMATS, load, read, writable
from lorank.formats.content import Content
from lorank.variants import LoRA

from .. import checkpoints, models
from .dense import adapter, all_train, close, deltas, experts, nearest


def merged(build: Any, targets: Any, rank: int = 3, **options: Any) -> tuple[Any, Any, Content]:
    """Return a model, a copy with an adapter merged, and the adapter."""
    base = build()
    tuned = deepcopy(base)
    content = adapter(tuned, targets, LoRA(rank=rank, alpha=2 * rank), **options)
    lorank.merge(tuned)
    return base, tuned, content


def convolutions() -> Any:
    return models.sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.LSTM(4, 3))


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (models.llama, ["q_proj", "down_proj"]),
        (models.llama, ["embed_tokens", "lm_head"]),
        (models.gpt2, ["c_attn", "c_proj"]),
        (models.gpt2, ["c_attn[q,v]"]),
        (convolutions, ["0", "2", "3"]),
        (experts, ["experts", "o_proj"]),
    ],
)
def test_a_merged_adapter_comes_out_again(build: Any, targets: Any, tmp_path: Path) -> None:
    base, tuned, content = merged(build, targets)
    found = lorank.extract(base, tuned, targets, rank=3)
    assert close(deltas(found.content), deltas(content), 1e-5)
    assert found.report.error < 1e-5 and not found.left_out
    assert {row.label for row in found.report.rows} == deltas(content).keys()
    for name, update in found.content.updates.items():
        expected = content.updates[name]
        for key in ("shapes", "matrices", "lookup", "transposed", "groups"):
            assert getattr(update, key) == getattr(expected, key)
    found.save(tmp_path)
    load(base, tmp_path)
    lorank.merge(base)
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter, tuned.get_parameter(name), atol=1e-5, rtol=0)


def test_energy_and_the_error_of_a_dense_change() -> None:
    base = models.llama()
    tuned = deepcopy(base)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.up_proj.weight.add_(torch.randn(48, 3) @ torch.randn(3, 32) + 0.1 * torch.randn(48, 32))
    change = {
        f"model.layers.{i}.mlp.up_proj": (
            tuned.model.layers[i].mlp.up_proj.weight - base.model.layers[i].mlp.up_proj.weight
        )
        .detach()
        .double()
        for i in range(2)
    }
    found = lorank.extract(base, tuned, rank=2)
    for row in found.report.rows:
        best, error = nearest(change[row.label], 2)
        torch.testing.assert_close(deltas(found.content)[row.label], best, atol=1e-5, rtol=0)
        assert row.error == pytest.approx(error, rel=1e-5)
        assert row.norm == pytest.approx(float(change[row.label].norm()))
    assert len(found.report.rows) == 2  # the other layers did not change, and have no update
    assert "unchanged, without an update: model.layers.0.self_attn.q_proj" in str(found)
    by_energy = lorank.extract(base, tuned, energy=0.99)
    for row in by_energy.report.rows:
        squares = torch.linalg.svdvals(change[row.label]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[row.rank - 1] >= 0.99 > shares[row.rank - 2]


def test_from_folders_tensor_by_tensor(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    tuned: Any = AutoModelForCausalLM.from_pretrained(base)
    content = adapter(tuned, ["q_proj", "up_proj"], LoRA(rank=3))
    lorank.merge(tuned)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20kB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    found = lorank.extract(base, tmp_path / "tuned", rank=3)
    assert close(deltas(found.content), deltas(content), 1e-5) and not found.left_out
    assert all(parameter.is_meta for parameter in found.model.parameters())
    found.save(tmp_path / "adapter")
    back = read(tmp_path / "adapter")
    assert back.task == "causal-lm" and close(deltas(back), deltas(content), 1e-5)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base)
    lorank.load(loaded, tmp_path / "adapter")  # its fingerprints are the base's
    ids = models.ids()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tuned(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="the base differs"):
        lorank.load(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), tmp_path / "adapter", "again")


def test_a_tied_weight_is_extracted_once(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    tuned: Any = AutoModelForCausalLM.from_pretrained(base)
    adapter(tuned, ["embed_tokens"], LoRA(rank=3), tie=True)
    lorank.merge(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    found = lorank.extract(base, tmp_path / "tuned", ["embed_tokens"], rank=3)
    assert found.content.tied.keys() == {"lm_head"} and not found.left_out
    found.save(tmp_path / "adapter")
    loaded: Any = AutoModelForCausalLM.from_pretrained(base)
    lorank.load(loaded, tmp_path / "adapter")
    ids = models.ids()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tuned(ids).logits, atol=2e-4, rtol=0)


def test_a_bare_encoder_and_a_classifier_with_a_new_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = checkpoints.encoder(tmp_path / "base")
    names = {0: "bad", 1: "good"}
    tuned: Any = AutoModelForSequenceClassification.from_pretrained(base, id2label=names)
    content = adapter(tuned, ["query"], LoRA(rank=3))
    lorank.merge(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.warns(AdapterWarning, match=r"not the tuned model: 2 tensors are in the tuned model alone: classifier"):
        lorank.extract(base, tmp_path / "tuned", rank=3)
    found = lorank.extract(base, tmp_path / "tuned", rank=3, train_also=["classifier"])
    assert close(deltas(found.content), deltas(content), 1e-5)
    assert torch.equal(found.content.copies["classifier"]["weight"], tuned.classifier.weight)
    assert found.content.about == {"task": "classification", "labels": ["bad", "good"]}
    found.save(tmp_path / "adapter")
    again: Any = AutoModelForSequenceClassification.from_pretrained(base)
    lorank.load(again, tmp_path / "adapter")
    ids = models.ids(2, 5).clamp(max=20)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits, atol=1e-5, rtol=0)


def test_what_it_cannot_hold_is_named() -> None:
    base = models.bert()
    tuned = deepcopy(base)
    with torch.no_grad():
        for part in ("query", "value"):
            layer = tuned.bert.encoder.layer[0].attention.self.get_submodule(part)
            layer.weight.add_(torch.randn(32, 1) @ torch.randn(1, 32))
            layer.bias.add_(1)
        tuned.bert.embeddings.LayerNorm.weight.add_(1)
    with pytest.warns(AdapterWarning, match="the base with this adapter is not the tuned model"):
        found = lorank.extract(base, tuned, ["query"], rank=1)
    prefix = "bert.encoder.layer.0.attention.self"
    assert found.left_out == {
        f"{prefix}.value.weight": "differ, and are not targeted",
        f"{prefix}.query.bias": "differ, and are no matrices (train_also, bias)",
        f"{prefix}.value.bias": "differ, and are no matrices (train_also, bias)",
        "bert.embeddings.LayerNorm.weight": "differ, and are no matrices (train_also, bias)",
    }
    assert "1 tensors differ, and are not targeted: bert" in str(found)
    everything = lorank.extract(base, tuned, ["query", "value"], rank=1, bias="adapted", train_also=["LayerNorm"])
    assert not everything.left_out and everything.content.bias == "adapted"
    assert torch.equal(everything.content.biases[f"{prefix}.query"], tuned.get_parameter(f"{prefix}.query.bias"))


def test_parts_that_are_not_targeted_are_named() -> None:
    base, tuned, _ = merged(models.gpt2, ["c_attn"])
    with pytest.warns(AdapterWarning, match=r"4 tensors differ, and are parts that are not targeted"):
        found = lorank.extract(base, tuned, ["c_attn[q]"], rank=3)
    assert set(found.left_out) == {f"transformer.h.{i}.attn.c_attn[{part}]" for i in range(2) for part in "kv"}


def test_dtypes_are_compared_up_to_rounding() -> None:
    base, tuned, content = merged(models.llama, ["q_proj"])
    base.bfloat16()
    found = lorank.extract(base, tuned, ["q_proj"], rank=3)
    assert not found.left_out  # all the rest is the same in bfloat16
    assert "stored as bfloat16 in the base and float32 in the tuned model" in str(found)
    assert not close(deltas(found.content), deltas(content), 1e-6)
    assert close(deltas(found.content), deltas(content), 1e-2)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = merged(models.llama, ["q_proj"])
    with pytest.raises(AdapterError, match="give either a rank, or the share"):
        lorank.extract(base, tuned)
    with pytest.raises(AdapterError, match="the same weights in all that is targeted"):
        lorank.extract(base, tuned, ["v_proj"], rank=2)
    wider = models.llama(vocab_size=models.VOCABULARY + 3)
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight is \(97, 32\) in the base and \(100, 32\) in"):
        lorank.extract(base, wider, ["embed_tokens"], rank=2)
    with pytest.raises(AdapterError, match="has no transformer"):
        lorank.extract(base, models.gpt2(), ["c_attn"], rank=2)
    with pytest.raises(AdapterError, match="give two folders, or two models"):
        lorank.extract(base, tmp_path, rank=2)
    with pytest.raises(AdapterError, match="there is no folder"):
        lorank.extract(tmp_path / "a", tmp_path / "b", rank=2)
    adapter(base, ["q_proj"])
    with pytest.raises(AdapterError, match="a model has the adapters default; merge them"):
        lorank.extract(base, tuned, rank=2)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    lorank.remove(base)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj holds NaN or Inf"):
        lorank.extract(base, tuned, rank=2)


def test_a_rank_above_that_of_the_change_can_be_trained() -> None:
    base, tuned, content = merged(models.llama, ["q_proj", "embed_tokens"], rank=2)
    base, tuned = base.double(), tuned.double()  # or the rounding of W + ΔW has every rank
    with torch.no_grad():
        for layer, update in deltas(content).items():
            W = base.get_submodule(layer).weight
            tuned.get_submodule(layer).weight.copy_(W + (update.T if "embed" in layer else update))
    found = lorank.extract(base, tuned, ["q_proj", "embed_tokens"], rank=6)
    assert {row.rank for row in found.report.rows} == {6} and all_train(found.content)
    assert close(deltas(found.content), deltas(content), 1e-6)


def test_a_format_that_cannot_be_written_is_named_with_those_that_can(tmp_path: Path) -> None:
    base, tuned, _ = merged(models.llama, ["q_proj"])
    found = lorank.extract(base, tuned, ["q_proj"], rank=3)
    for unknown in ("nope", *(set(FORMATS) - set(writable()))):
        with pytest.raises(AdapterError, match=f"unknown format '{unknown}'; known are {', '.join(writable())}"):
            found.save(tmp_path / "x", format=unknown)


def test_a_module_under_two_names_is_compared_once() -> None:
    base: Any = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    base["again"] = base["b"]
    base["a"].register_buffer("made", torch.zeros(4), persistent=False)
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned["a"].weight.add_(1)
        tuned["b"].weight.add_(1)
        tuned["a"].made.add_(1)
    with pytest.warns(AdapterWarning, match=r"1 tensors differ, and are not targeted: b\.weight"):
        found = lorank.extract(base, tuned, ["a"], rank=1)
    assert found.left_out.keys() == {"b.weight"}


def test_a_tensor_under_two_names_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("model."))
    tensors[name.removeprefix("model.")] = tensors[name].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AdapterError, match=f"the checkpoint has {name} under two names"):
        lorank.extract(base, base, rank=1)
