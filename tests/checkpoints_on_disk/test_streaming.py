"""A checkpoint that was merged on disk is the one that merging in memory and saving gives, bit for bit."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.baselines import AdapterH, BitFit, TopK
from lorank.cli import app
from lorank.formats import read
from lorank.models import empty_base
from lorank.streaming import merge_checkpoint

from .. import checkpoints, models

INDEX = "model.safetensors.index.json"
LABELS = ["bad", "fair", "good"]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def base_in(folder: Path, model: Any, dtype: torch.dtype = torch.float32, shards: str = "50GB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    """Return a model from a folder; every tensor must be there, and nothing else."""
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def trained(
    model: nn.Module, folder: Path, targets: Any, about: Any = None, spec: LoRA | None = None, **kw: Any
) -> Any:
    """Adapt a model, give the adapter an effect, save it to a folder and return the model."""
    lorank.adapt(model, spec or LoRA(rank=4, alpha=8), targets, **kw)
    models.disturb(model, size=0.05)
    lorank.save(model, folder, about=about)
    return model


def merge_on_disk(base: Path, adapter: Path, target: Path, task: str = "causal-lm", **options: Any) -> Any:
    empty = empty_base(str(base), task, labels=len(LABELS))
    return merge_checkpoint(base, read(adapter, empty), empty, target, **options)


def merge_in_memory(model: Any, adapter: Path, target: Path) -> Path:
    """Merge as the library does it; returns the folder."""
    lorank.load(model, adapter)
    lorank.merge(model)
    model.save_pretrained(target)
    return target


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_merge(base: Path, adapter: Path, target: Path, *options: object) -> dict[str, Any]:
    """Run `lorank merge` and return its result."""
    found = run("merge", "--adapter", adapter, "--model", base, "--out", target, "--json", *options)
    assert found.exit_code == 0, (found.output, found.exception)
    return json.loads(found.stdout)


CAUSAL: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "llama": (models.llama, "all-linear", {}),
    "llama-tied": (lambda: models.llama(tie_word_embeddings=True), "attention", {}),
    "llama-rank-stabilised": (models.llama, ["q_proj"], {"spec": LoRA(rank=4, alpha=3, rank_stabilised=True)}),
    "llama-embedding": (models.llama, ["embed_tokens", "q_proj"], {}),
    "llama-head-copied": (models.llama, ["q_proj"], {"train_also": ["lm_head", "norm"]}),
    "llama-embedding-copied": (models.llama, ["q_proj"], {"train_also": ["embed_tokens"]}),
    "llama-ranks": (models.llama, ["q_proj", "v_proj"], {"ranks": {"v_proj": 2}, "alphas": {"v_proj": 5}}),
    "gpt2": (models.gpt2, ["c_attn", "c_proj", "c_fc"], {}),
    "gpt2-parts": (models.gpt2, ["c_attn[q,v]"], {}),
    "gpt2-one-part": (models.gpt2, ["c_attn[k]", "c_proj"], {"train_also": ["ln_f"]}),
}
CLASSIFIERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "roberta": (models.roberta, ["query", "value"]),
    "bert": (models.bert, "attention"),
    "deberta": (models.deberta, ["query_proj", "value_proj", "output.dense"]),
}
HEADS = {"roberta": ["classifier"], "bert": ["classifier"], "deberta": ["classifier", "pooler"]}


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> tuple[Callable[[], Any], Any, dict[str, Any]]:
    return CAUSAL[request.param]


@pytest.mark.parametrize(
    ("dtype", "shards"), [(torch.float32, "50GB"), (torch.float32, "9KB"), (torch.bfloat16, "9KB")]
)
def test_merging_on_disk_is_merging_in_memory(causal: Any, dtype: torch.dtype, shards: str, tmp_path: Path) -> None:
    build, targets, options = causal
    base = base_in(tmp_path / "base", build(), dtype, shards)
    cls = type(build())
    model = trained(loaded(cls, base), tmp_path / "adapter", targets, **options)
    x = models.ids()
    with torch.no_grad():
        wanted = model(x).logits
    report = merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged")
    memory = merge_in_memory(loaded(cls, base), tmp_path / "adapter", tmp_path / "memory")
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(memory))
    assert {row.label for row in report.rows} >= {place.label for place in lorank.plan(build(), LoRA(), targets).places}
    assert [name.rpartition(".")[2] for name in report.copies] == sorted(options.get("train_also", []))
    merged = loaded(cls, tmp_path / "merged")
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(merged(x).logits, wanted, rtol=tolerance, atol=tolerance)


def test_shards_keep_their_files_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama(), shards="9KB")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 5
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == files
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_the_trained_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.gpt2(), dtype)
    trained(loaded(transformers.GPT2LMHeadModel, base), tmp_path / "adapter", ["c_attn"], bias="all")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged")
    memory = tensors_in(
        merge_in_memory(loaded(transformers.GPT2LMHeadModel, base), tmp_path / "adapter", tmp_path / "memory")
    )
    merged = tensors_in(tmp_path / "merged")
    assert merged.keys() == memory.keys()
    kept = read(tmp_path / "adapter").biases
    assert kept and all(torch.equal(merged[f"{name}.bias"], bias.to(dtype)) for name, bias in kept.items())
    for name, tensor in merged.items():  # in memory the bias is the base's and an offset: its last bit may differ
        if name.removesuffix(".bias") in kept:
            torch.testing.assert_close(tensor, memory[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-8)
        else:
            assert torch.equal(tensor, memory[name]), name


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_gets_its_head_and_its_labels(family: str, bare: bool, tmp_path: Path) -> None:
    build, targets = CLASSIFIERS[family]
    whole = build()
    base = base_in(tmp_path / "base", whole.base_model if bare else whole)
    checkpoints.causal_tokenizer().save_pretrained(base)  # --in-memory brings it along
    labels = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model, _ = type(whole).from_pretrained(base, output_loading_info=True, **labels)
    about = {"task": "classification", "labels": LABELS}
    trained(model.eval(), tmp_path / "adapter", targets, about, train_also=HEADS[family])
    with torch.no_grad():
        wanted = model(x := models.ids()).logits
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    run_merge(base, tmp_path / "adapter", tmp_path / "memory", "--in-memory")
    merged = loaded(type(whole), tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(x).logits, wanted, rtol=1e-5, atol=1e-5)
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "memory"))
    assert merged.config.id2label == dict(enumerate(LABELS))
    assert merged.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert merged.config.problem_type == "single_label_classification"
    assert merged.config.architectures == [type(whole).__name__]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_head_with_another_number_of_labels_is_replaced(family: str, tmp_path: Path) -> None:
    targets = CLASSIFIERS[family][1]
    build: Any = CLASSIFIERS[family][0]
    base = base_in(tmp_path / "base", build(num_labels=5))
    checkpoints.causal_tokenizer().save_pretrained(base)
    labels = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model = type(build()).from_pretrained(base, ignore_mismatched_sizes=True, **labels)
    about = {"task": "classification", "labels": LABELS}
    trained(model, tmp_path / "adapter", targets, about, train_also=HEADS[family])
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    run_merge(base, tmp_path / "adapter", tmp_path / "memory", "--in-memory")
    assert loaded(type(model), tmp_path / "merged").config.num_labels == 3
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "memory"))


def test_the_head_of_another_task_is_left_out(tmp_path: Path) -> None:
    config = models.roberta().config
    base = base_in(tmp_path / "base", transformers.RobertaForMaskedLM(config))
    checkpoints.causal_tokenizer().save_pretrained(base)
    about = {"task": "classification", "labels": LABELS}
    model = transformers.RobertaForSequenceClassification.from_pretrained(base, num_labels=3)
    trained(model, tmp_path / "adapter", ["query"], about, train_also=["classifier"])
    assert any(name.startswith("lm_head.") for name in tensors_in(base))
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    run_merge(base, tmp_path / "adapter", tmp_path / "memory", "--in-memory")
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "memory"))
    loaded(transformers.RobertaForSequenceClassification, tmp_path / "merged")


def test_a_classifier_without_names_of_labels_keeps_those_of_its_base(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.bert(num_labels=4))
    model = loaded(transformers.BertForSequenceClassification, base)
    trained(model, tmp_path / "adapter", "attention", {"task": "classification"}, train_also=["classifier"])
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = loaded(transformers.BertForSequenceClassification, tmp_path / "merged")
    assert merged.config.id2label == model.config.id2label and merged.config.num_labels == 4


def test_a_regression_has_one_output(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.bert().base_model)
    checkpoints.causal_tokenizer().save_pretrained(base)
    options = {"num_labels": 1, "problem_type": "regression"}
    model = transformers.BertForSequenceClassification.from_pretrained(base, **options)
    trained(model, tmp_path / "adapter", "attention", {"task": "regression"}, train_also=["classifier"])
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    run_merge(base, tmp_path / "adapter", tmp_path / "memory", "--in-memory")
    merged = loaded(transformers.BertForSequenceClassification, tmp_path / "merged")
    assert merged.config.problem_type == "regression" and merged.config.num_labels == 1
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "memory"))


def test_a_decoder_that_classifies_knows_its_padding(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.gpt2())
    tokenizer = checkpoints.causal_tokenizer()
    tokenizer.save_pretrained(base)
    model = transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    about = {"task": "classification", "labels": LABELS}
    trained(model, tmp_path / "adapter", ["c_attn"], about, train_also=["score"])
    run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = loaded(transformers.GPT2ForSequenceClassification, tmp_path / "merged")
    x = models.ids()
    with torch.no_grad():
        torch.testing.assert_close(merged(x).logits, model.eval()(x).logits, rtol=1e-5, atol=1e-5)


def test_a_bare_decoder_gets_the_names_of_its_language_model(tmp_path: Path) -> None:
    whole = models.gpt2()
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in whole.base_model.state_dict().items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()  # as the hub's GPT-2 has it
    base = base_in(tmp_path / "base", whole)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    trained(model, tmp_path / "adapter", ["c_attn"])
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged")
    merged = loaded(transformers.GPT2LMHeadModel, tmp_path / "merged")
    lorank.merge(model)
    assert_same(merged.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_another_dtype_is_rounded_to_once(own: torch.dtype, dtype: str, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama(), own, shards="20KB")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "all-linear", train_also=["norm"])
    kind = getattr(torch, dtype)
    run_merge(base, tmp_path / "adapter", tmp_path / "merged", "--dtype", dtype)
    wide = loaded(transformers.LlamaForCausalLM, base).float()
    with pytest.warns(AdapterWarning, match="another dtype") if own != torch.float32 else contextlib.nullcontext():
        lorank.load(wide, tmp_path / "adapter")
    lorank.merge(wide)
    merged = tensors_in(tmp_path / "merged")
    assert_same(merged, {name: tensor.to(kind) for name, tensor in wide.state_dict().items()})
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == dtype and "torch_dtype" not in config
    assert loaded(transformers.LlamaForCausalLM, tmp_path / "merged").dtype == kind


def test_a_dtype_that_cannot_hold_the_base_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6  # beyond float16, and not adapted
    base = base_in(tmp_path / "base", model)
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    with pytest.raises(AdapterError, match=r"up_proj\.weight would hold NaN or Inf in float16"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()


def test_whole_numbers_and_unknown_tensors_stay_as_they_are(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    extra = {"model.layers.2.draft.weight": torch.randn(4, 4), "steps": torch.arange(3), "none": torch.empty(0, 4)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors", {"format": "pt"})
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    trained(model, tmp_path / "adapter", "q_proj")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    merged = tensors_in(tmp_path / "merged")
    assert torch.equal(merged["steps"], extra["steps"]) and merged["steps"].dtype == torch.int64
    assert torch.equal(merged["model.layers.2.draft.weight"], extra["model.layers.2.draft.weight"].bfloat16())
    assert merged["none"].shape == (0, 4)


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    (base / "LICENSE").write_text("free")
    (base / "modeling_own.py").write_text("x = 1\n")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "runs").mkdir()
    (base / "runs" / "log").write_text("much")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged")
    kept = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()} - {
        "pytorch_model.bin",
        "runs/log",
    }
    merged = tmp_path / "merged"
    assert {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()} == kept
    for name in kept - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    templates = transformers.AutoTokenizer.from_pretrained(merged).chat_template
    assert templates == {"default": checkpoints.CHAT, "tool_use": "{{ messages }}"}


def assert_refused(base: Path, adapter: Path, reason: str, parent: Path, **options: Any) -> None:
    """Merging raises, and nothing has appeared in the folder `parent`."""
    before = sorted(parent.iterdir())
    with pytest.raises(AdapterError, match=reason):
        merge_on_disk(base, adapter, parent / "merged", **options)
    assert sorted(parent.iterdir()) == before


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama(tie_word_embeddings=True))
    untied = models.llama(tie_word_embeddings=False)
    for name, targets, copied in (
        ("head", ["lm_head"], []),
        ("embedding", ["embed_tokens"], []),
        ("head-copied", ["q_proj"], ["lm_head"]),
        ("embedding-copied", ["q_proj"], ["embed_tokens"]),
    ):
        trained(untied, tmp_path / name, targets, train_also=copied)
        lorank.remove(untied)
        assert_refused(base, tmp_path / name, "shares its weight with", tmp_path, allow_other_base=True)


def test_another_base_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", ["q_proj", "down_proj"])
    model = models.llama()
    model.load_state_dict(tensors_in(base))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 7] += 1e-6  # in the last matrix that is looked at
    other = base_in(tmp_path / "other", model)
    assert_refused(other, tmp_path / "adapter", r"the base differs .* in 1 of \d+ adapted matrices", tmp_path)
    merge_on_disk(other, tmp_path / "adapter", tmp_path / "merged", allow_other_base=True)
    with pytest.warns(AdapterWarning, match="the base differs"):
        lorank.load(model, tmp_path / "adapter", allow_other_base=True)
    with pytest.warns(AdapterWarning, match="another base than the adapter was trained on"):
        lorank.merge(model)
    assert_same(tensors_in(tmp_path / "merged"), model.state_dict())


def test_another_base_that_the_adapter_brings_along_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    model = trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    own = model.model.embed_tokens.weight.detach().clone()
    save_file(tensors | {key: own}, file)
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "same")
    save_file(tensors | {key: own + 1}, file)
    assert_refused(base, tmp_path / "adapter", r"brings the base's model\.embed_tokens\.weight", tmp_path)
    save_file(tensors | {key: torch.cat([own, own[:3]])}, file)
    assert_refused(
        base, tmp_path / "adapter", r"brings the base's model\.embed_tokens\.weight as \(100, 32\)", tmp_path
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.gpt2())
    model = loaded(transformers.GPT2LMHeadModel, base)
    trained(model, tmp_path / "adapter", ["c_attn"], bias="adapted", train_also="ln_f")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    for ending in ("1.attn.c_attn.lora_B.weight", "1.attn.c_attn.base_layer.bias", "ln_f.weight"):
        key = next(name for name in whole if name.endswith(ending))
        broken = {name: tensor.clone() for name, tensor in whole.items()}
        broken[key].view(-1)[3] = value
        save_file(broken, file)
        assert_refused(base, tmp_path / "adapter", "NaN or Inf", tmp_path)


def test_a_target_that_is_there_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(AdapterError, match=f"{name} exists"):
            merge_on_disk(base, tmp_path / "adapter", tmp_path / name)
    with pytest.raises(AdapterError, match="cannot write"):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / "file" / "below")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "empty")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "new" / "deep")
    assert_same(tensors_in(tmp_path / "empty"), tensors_in(tmp_path / "new" / "deep"))
    assert (tmp_path / "full" / "mine").read_text() == "kept" and len(list((tmp_path / "full").iterdir())) == 1
    assert not list(tmp_path.rglob("*partial*"))


def test_bases_that_cannot_be_read_piece_by_piece_are_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama(), shards="20KB")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    assert_refused(base, tmp_path / "adapter", "is not a whole safetensors file", tmp_path)
    shard.unlink()
    assert_refused(base, tmp_path / "adapter", "lacks .*, which its index names", tmp_path)
    shard.write_bytes(whole)
    index = base / INDEX
    index.write_text("[]")
    assert_refused(base, tmp_path / "adapter", "cannot be read", tmp_path)
    index.unlink()
    for file in base.glob("*.safetensors"):
        file.unlink()
    torch.save({}, base / "pytorch_model.bin")
    assert_refused(base, tmp_path / "adapter", r"only pytorch_model\.bin.*--in-memory", tmp_path)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    assert_refused(base, tmp_path / "adapter", "quantised", tmp_path)


def test_an_adapter_that_does_not_fit_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.llama())
    wide = models.llama(intermediate_size=50)
    trained(wide, tmp_path / "wide", ["q_proj", "down_proj", "gate_proj"], train_also=["model.norm"])
    for reason in (r"down_proj: A is \(4, 50\) in the file", r"gate_proj: B is \(50, 4\) in the file"):
        assert_refused(base, tmp_path / "wide", reason, tmp_path)
    deep = models.llama(num_hidden_layers=3)
    trained(deep, tmp_path / "deep", "q_proj", train_also=["model.layers.2.mlp"])
    reason = r"(?s)model\.layers\.2\.self_attn\.q_proj.*model\.layers\.2\.mlp\.\w+\.weight, for which"
    assert_refused(base, tmp_path / "deep", reason, tmp_path)


def test_the_pickle_of_a_base_is_merged_in_memory(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    model = trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    run_merge(base, tmp_path / "adapter", tmp_path / "streamed")
    (base / "model.safetensors").unlink()
    found = run("merge", "--adapter", tmp_path / "adapter", "--model", base, "--out", tmp_path / "merged")
    assert isinstance(found.exception, AdapterError) and "--in-memory" in str(found.exception)
    run_merge(base, tmp_path / "adapter", tmp_path / "merged", "--in-memory")
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "streamed"))
    assert model


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16"), ("--dtype", "float16")])
def test_in_memory_is_the_same_as_streamed(dtype: tuple[str, ...], tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "all-linear", train_also="norm")
    streamed = run_merge(base, tmp_path / "adapter", tmp_path / "streamed", *dtype)
    memory = run_merge(base, tmp_path / "adapter", tmp_path / "memory", "--in-memory", *dtype)
    assert_same(tensors_in(tmp_path / "streamed"), tensors_in(tmp_path / "memory"))
    assert {row["label"] for row in streamed["layers"]} == {row["label"] for row in memory["layers"]}
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory"))
    assert first == second


def test_a_pickled_adapter_is_merged_when_that_is_allowed(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    trained(loaded(transformers.LlamaForCausalLM, base), tmp_path / "adapter", "q_proj")
    shutil.copytree(tmp_path / "adapter", tmp_path / "pickled")
    file = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "pickled" / "adapter_model.bin")
    file.unlink()
    words = ["merge", "--adapter", tmp_path / "pickled", "--model", base, "--out", tmp_path / "merged"]
    refused = run(*words)
    assert isinstance(refused.exception, AdapterError) and "is a pickle" in str(refused.exception)
    assert not (tmp_path / "merged").exists()
    run_merge(base, tmp_path / "adapter", tmp_path / "safe")
    assert run(*words, "--allow-pickle").exit_code == 0
    assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "safe"))
    nameless = run("merge", "--adapter", tmp_path / "pickled", "--out", tmp_path / "other", "--allow-pickle")
    assert isinstance(nameless.exception, AdapterError) and "which base?" in str(nameless.exception)


def test_a_head_that_nobody_trained_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", models.bert().base_model)
    checkpoints.causal_tokenizer().save_pretrained(base)
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    trained(model, tmp_path / "adapter", "attention", {"task": "classification", "labels": LABELS})
    for options in ((), ("--in-memory",)):
        found = run("merge", "--adapter", tmp_path / "adapter", "--model", base, "--out", tmp_path / "merged", *options)
        assert isinstance(found.exception, AdapterError)
        assert "no weights for classifier, and the adapter brings none" in str(found.exception)
        assert not (tmp_path / "merged").exists()


def merge_into(base: Path, adapter: Path, target: Path) -> Path:
    model = empty_base(str(base), "causal-lm")
    merge_checkpoint(base, read(adapter, model), model, target)
    return target


@pytest.mark.parametrize("spec", [BitFit(), TopK(1)])
def test_what_has_no_update_is_merged_into_its_own_base_alone(spec: Any, tmp_path: Path) -> None:
    model = models.gpt2()
    base = base_in(tmp_path / "base", model)
    lorank.adapt(model, spec)
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter")
    found = tensors_in(merge_into(base, tmp_path / "adapter", tmp_path / "out"))
    lorank.merge(model)
    assert_same(found, tensors_in(base_in(tmp_path / "expected", model)))
    other = base_in(tmp_path / "other", models.gpt2())
    with pytest.raises(AdapterError, match="the base differs"):
        merge_into(other, tmp_path / "adapter", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_runs_beside_the_layers_is_not_left_out_in_silence(tmp_path: Path) -> None:
    model = models.gpt2()
    base = base_in(tmp_path / "base", model)
    lorank.adapt(model, [LoRA(rank=2), AdapterH(size=2)], "c_attn")
    lorank.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="runs beside the layers, and changes no weight"):
        merge_into(base, tmp_path / "adapter", tmp_path / "out")
