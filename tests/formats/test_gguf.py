"""llama.cpp's GGUF adapters: there and back, what is refused, and what a damaged file can do."""

import copy
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lorank
from lorank import AdapterError, AdapterWarning, LoRA, formats
from lorank.formats import gguf_file
from lorank.formats.content import Content, LayerUpdate
from lorank.formats.fitting import fit
from lorank.variants.dora import DoRA

from .. import models

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
EMBEDDING, DOWN = "model.embed_tokens", "model.layers.1.mlp.down_proj"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Return a base, the same with an adapter, and the file it is saved in."""
    base = models.llama()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=5), [Q, K, EMBEDDING, "down_proj", "lm_head"], ranks={"down_proj": 2})
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter.gguf", format="gguf", about={"task": "causal-lm", "labels": ["a", "b"]})
    return base, model, tmp_path / "adapter.gguf"


def foreign(path: Path, changes: Callable[[gguf.GGUFWriter], object] | None = None, **metadata: Any) -> Path:
    """Write an adapter of k_proj with the `gguf` package, of any dtypes and with anything else in it."""
    settings = {"type": "adapter", "adapter": "lora", "alpha": 6.0, "architecture": "llama"} | metadata
    writer = gguf.GGUFWriter(path, settings["architecture"])
    writer.add_string("general.type", settings["type"])
    writer.add_string("adapter.type", settings["adapter"])
    if settings["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", settings["alpha"])
    if changes is None:
        add(writer, "blk.1.attn_v.weight", torch.ones(2, 32), torch.ones(16, 2))
    else:
        changes(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, A: Tensor, B: Tensor) -> None:
    writer.add_tensor(f"{name}.lora_a", A.numpy())
    writer.add_tensor(f"{name}.lora_b", B.numpy())


def delta(update: LayerUpdate) -> Tensor:
    A, B = update.pair()
    return update.spec.scale * (B.double() @ A.double())


def assert_refused(path: Path, *reasons: str, model: Any = None) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.load(models.llama() if model is None else model, path)
    for reason in reasons:
        assert reason in str(error.value), str(error.value)


def test_what_was_saved_comes_back(saved: tuple[Any, Any, Path]) -> None:
    base, model, path = saved
    x = models.ids()
    plan = lorank.load(base, path)
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-6, atol=1e-6)
    assert {(place.name, place.spec.rank) for place in plan.places} == {
        *((layer, 3) for layer in (Q, K, EMBEDDING, "lm_head")),
        *((f"model.layers.{i}.mlp.down_proj", 2) for i in (0, 1)),
    }


def test_it_is_read_without_a_model_too(saved: tuple[Any, Any, Path]) -> None:
    base, _, path = saved
    known, unknown = formats.read(path, base), formats.read(path)
    assert not known.problems and not unknown.problems
    assert known.updates.keys() == unknown.updates.keys()
    for name, update in known.updates.items():
        assert torch.equal(delta(update), delta(unknown.updates[name]))
    assert unknown.about == {"task": "causal-lm", "labels": ["a", "b"]} and unknown.task == "causal-lm"
    assert unknown.updates[EMBEDDING].lookup


def test_the_gguf_package_reads_what_is_there(saved: tuple[Any, Any, Path]) -> None:
    _, model, path = saved
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values.pop("lorank.about")
    assert values == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    }
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 12
    own = lorank.adapter_parameters(model)
    A, B = (next(p.detach() for name, p in own.items() if Q in name and name.endswith(end)) for end in ("A", "B"))
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_a"], A)
    # Of each head the first row, the first of its second half, the second row, and so on.
    assert torch.equal(
        tensors["blk.0.attn_q.weight.lora_b"], B[[8 * h + i for h in range(4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]]
    )
    A, B = (
        next(p.detach() for name, p in own.items() if EMBEDDING in name and name.endswith(end)) for end in ("A", "B")
    )
    assert torch.equal(tensors["token_embd.weight.lora_a"], A.T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], B)


def test_equal_adapters_make_equal_bytes(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    base, model, path = saved
    lorank.save(model, tmp_path / "again.gguf", format="gguf", about={"labels": ["a", "b"], "task": "causal-lm"})
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    lorank.load(base, path)
    lorank.save(base, path, format="gguf", about={"labels": ["a", "b"], "task": "causal-lm"})
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["adapter.gguf", "again.gguf"]


def test_an_adapter_of_another_format_needs_no_weights(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, model, path = saved
    lorank.save(model, tmp_path / "peft")
    with torch.device("meta"):
        shell = LlamaForCausalLM(model.config)
    content = formats.read(tmp_path / "peft", shell)
    content.about = formats.read(path).about
    assert formats.FORMATS["gguf"].write(content, tmp_path / "converted.gguf", shell) == []
    assert (tmp_path / "converted.gguf").read_bytes() == path.read_bytes()


def test_scales_are_folded_exactly_whatever_the_dtype(tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    spec = LoRA(rank=4, alpha=3, dtype=torch.bfloat16)
    lorank.adapt(model, spec, ["o_proj", "v_proj"], alphas={"layers.1.self_attn.o_proj": 0.7})
    models.disturb(model)
    with pytest.warns(AdapterWarning, match=r"folded into B, where it is not 3 / rank: model\.layers\.1\.self_attn\.o"):
        lorank.save(model, tmp_path / "a.gguf", format="gguf")
    updates = formats.read(tmp_path / "a.gguf", base).updates
    lorank.save(model, tmp_path / "peft")
    for name, update in formats.read(tmp_path / "peft", base).updates.items():
        assert updates[name].spec.scale == 0.75
        torch.testing.assert_close(delta(updates[name]), delta(update), rtol=1e-6, atol=1e-9)


def test_an_alpha_that_float32_has_not_in_full_is_no_reason_to_fold(tmp_path: Path) -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=3, alpha=16, rank_stabilised=True), "o_proj")
    models.disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorank.save(model, tmp_path / "a.gguf", format="gguf")
    x = models.ids()
    lorank.load(base, tmp_path / "a.gguf")
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)


def test_an_alpha_that_float32_has_not_at_all_is_folded(tmp_path: Path) -> None:
    """As 0 it would mean a scale of 1."""
    spec = LoRA(rank=2, alpha=1e-46)
    factors = {"A": torch.full((2, 48), 1e15), "B": torch.full((32, 2), 1e30)}
    content = Content(spec, {DOWN: LayerUpdate(spec, {"weight": factors})})
    (note,) = formats.FORMATS["gguf"].write(content, tmp_path / "a.gguf", models.llama())
    assert "where it is not 1 / rank" in note
    read = formats.read(tmp_path / "a.gguf").updates[DOWN]
    torch.testing.assert_close(delta(read), delta(content.updates[DOWN]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (None, 1.0), (6.0, 3.0), (-1.0, -0.5)])
def test_the_scale_is_alpha_by_rank_or_one(alpha: float | None, scale: float, tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.gguf", alpha=alpha)
    (update,) = formats.read(path, models.llama()).updates.values()
    assert update.spec == LoRA(rank=2, alpha=2 * scale)
    model = models.llama()
    lorank.load(model, path)
    layer = model.model.layers[1].self_attn.v_proj
    x = torch.randn(2, 32)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, layer.weight + scale * torch.ones(16, 2) @ torch.ones(2, 32))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_packed_factors_are_unpacked_as_the_gguf_package_does(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    A, B = (gguf.quants.quantize(torch.randn(rows, columns).numpy(), number) for rows, columns in ((32, 32), (16, 32)))

    def changes(writer: gguf.GGUFWriter) -> None:
        for factor, data in (("a", A), ("b", B)):
            writer.add_tensor(f"blk.0.attn_v.weight.lora_{factor}", data, raw_dtype=number)

    (update,) = formats.read(foreign(tmp_path / "a.gguf", changes), models.llama()).updates.values()
    for found, packed in zip(update.pair(), (A, B), strict=True):
        assert torch.equal(found.float(), torch.from_numpy(gguf.quants.dequantize(packed, number)))


def test_rows_without_the_number_of_heads_need_the_model(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.gguf", lambda w: add(w, "blk.1.attn_k.weight", torch.ones(2, 32), torch.randn(16, 2)))
    unknown, known = formats.read(path), formats.read(path, models.llama())
    assert not unknown.problems and "by heads, whose number only the model says" in str(unknown.needs_model)
    assert known.needs_model is None and list(known.updates) == list(unknown.updates) == [K]
    rows = [content.updates[K].tensors["weight"]["B"] for content in (unknown, known)]
    assert not torch.equal(*rows) and torch.equal(rows[0].sort(0).values, rows[1].sort(0).values)
    with pytest.raises(AdapterError, match="only the model says: give the model"):
        lorank.convert(path, tmp_path / "peft")
    with pytest.raises(AdapterError, match="only the model says: give the model"):
        fit(models.llama(), unknown, "default", activate=True, allow_other_base=False)
    lorank.convert(path, tmp_path / "peft", model=models.llama())
    assert torch.equal(formats.read(tmp_path / "peft").updates[K].tensors["weight"]["B"], rows[1])


def test_a_file_of_a_model_with_other_heads_is_refused(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    other = models.llama(num_attention_heads=2, num_key_value_heads=1)  # the shapes of q are the same
    assert_refused(saved[2], "with 4 heads of queries and 2 of keys, and this one has 2 heads of queries", model=other)

    def changes(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count(0)
        writer.add_head_count_kv(0)
        add(writer, "blk.1.attn_k.weight", torch.ones(2, 32), torch.randn(16, 2))

    found = formats.read(foreign(tmp_path / "a.gguf", changes))
    assert "whose number only the model says" in str(found.needs_model)


def test_only_adapters_are_detected(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    detect = formats.FORMATS["gguf"].detect
    assert detect(saved[2])
    assert detect(foreign(tmp_path / "foreign"))
    base = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    base.add_type("model")
    base.add_token_list([f"w{i}" for i in range(1000)])
    base.add_tensor("token_embd.weight", numpy.zeros((1000, 4), dtype=numpy.float32))
    base.write_header_to_file()
    base.write_kv_data_to_file()
    base.write_tensors_to_file()
    base.close()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "magic").write_bytes(b"GGUF")
    (tmp_path / "other").write_bytes(b"PK\3\4" + bytes(100))
    for name in ("base.gguf", "empty", "magic", "other", "", "absent"):
        assert not detect(tmp_path / name)
    with pytest.raises(AdapterError, match="no adapter in a format that lorank reads"):
        lorank.load(models.llama(), tmp_path / "base.gguf")


def test_what_has_no_place_is_said_all_at_once(tmp_path: Path) -> None:
    def changes(writer: gguf.GGUFWriter) -> None:
        ones = torch.ones
        writer.add_tensor("blk.0.attn_norm.weight", numpy.ones(32, dtype=numpy.float32))
        writer.add_tensor("blk.0.attn_v.bias", numpy.ones(32, dtype=numpy.float32))
        writer.add_tensor("blk.0.attn_v.weight.lora_a", numpy.ones((2, 32), dtype=numpy.float32))
        add(writer, "blk.0.ffn_gate_inp.weight", ones(2, 32), ones(4, 2))
        add(writer, "blk.0.attn_output.weight", ones(3, 32), ones(32, 2))
        add(writer, "blk.0.attn_q.weight", ones(2, 32), ones(30, 2))
        add(writer, "blk.7.ffn_up.weight", ones(2, 32), ones(48, 2))
        add(writer, "blk.0.ffn_up.weight", ones(2, 30), ones(48, 2))
        writer.add_array("adapter.alora.invocation_tokens", [1, 2])

    assert_refused(
        foreign(tmp_path / "a.gguf", changes),
        "aLoRA",
        "blk.0.attn_norm.weight: a norm that was trained whole",
        "blk.0.attn_v.bias is no factor",
        "blk.0.attn_v.weight: the file lacks lora_b",
        "blk.0.ffn_gate_inp.weight: this architecture has no such tensor",
        "blk.0.attn_output.weight: lora_a (3, 32) and lora_b (32, 2) are no pair",
        "blk.0.attn_q.weight: it is (30, 2), which are no rows of 4 heads",
        "model.layers.7.mlp.up_proj, which this model has not",
        "A is (2, 30) in the file, the model needs (2, 32)",
    )


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"architecture": "qwen2"}, "is for the architecture qwen2, and this model's is llama"),
        ({"architecture": "gptneox"}, "'gptneox', and lorank knows"),
        ({"adapter": "control_vector"}, "adapter.type is 'control_vector'"),
        ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({"alpha": float("inf")}, "adapter.lora.alpha is inf"),
        ({"alpha": 1e35}, "alpha is 1.0"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(metadata: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert_refused(foreign(tmp_path / "a.gguf", **metadata), reason)


def test_a_prompt_that_the_file_asks_for_is_a_remark(tmp_path: Path) -> None:
    def changes(writer: gguf.GGUFWriter) -> None:
        writer.add_string("adapter.lora.prompt_prefix", "Query: ")
        add(writer, "blk.1.attn_v.weight", torch.ones(2, 32), torch.ones(16, 2))

    with pytest.warns(AdapterWarning, match="begin with 'Query: '"):
        lorank.load(models.llama(), foreign(tmp_path / "a.gguf", changes))


def test_a_model_of_an_unknown_class_is_refused(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model = models.bert()
    assert_refused(
        saved[2], "does not know how llama.cpp stores the weights of a BertForSequenceClassification", model=model
    )
    lorank.adapt(model, LoRA(rank=2), "query")
    with pytest.raises(AdapterError, match=r"cannot save: lorank does not know .* BertForSequenceClassification"):
        lorank.save(model, tmp_path / "bert.gguf", format="gguf")
    assert not (tmp_path / "bert.gguf").exists()


def refusals(model: Any, tmp_path: Path) -> str:
    models.disturb(model)
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(AdapterError) as error:
        lorank.save(model, tmp_path / "old.gguf", format="gguf")
    assert (tmp_path / "old.gguf").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    return str(error.value)


def test_what_llama_cpp_has_no_place_for_is_refused_all_at_once(tmp_path: Path) -> None:
    model = models.llama(attention_bias=True)
    lorank.adapt(
        model,
        LoRA(rank=2),
        ["q_proj", "lm_head"],
        train_also=["model.norm"],
        bias="adapted",
        train_tokens={"embed_tokens": [3, 4]},
    )
    said = refusals(model, tmp_path)
    assert "model.norm is trained whole" in said
    assert "the bias of model.layers.1.self_attn.q_proj is trained" in said
    assert "rows of 2 tokens of model.embed_tokens are trained" in said


def test_dora_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, DoRA(rank=2), "v_proj")
    assert "model.layers.0.self_attn.v_proj: " in refusals(model, tmp_path)


@pytest.mark.parametrize("options", [{"targets": "embed_tokens", "tie": True}, {"targets": "embed_tokens"}])
def test_an_embedding_that_is_the_head_too_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    if "tie" not in options:
        model.lm_head.weight = torch.nn.Parameter(
            model.lm_head.weight.detach().clone()
        )  # the configuration still says so
    lorank.adapt(model, LoRA(rank=2), **options)
    assert "model.embed_tokens: the embedding and the head have one weight" in refusals(model, tmp_path)


def test_experts_are_refused_and_attention_beside_them_is_not(tmp_path: Path) -> None:
    config = MixtralConfig(**models.SMALL_DECODER, num_local_experts=4, num_experts_per_tok=2)
    model: Any = MixtralForCausalLM(config).eval()
    lorank.adapt(model, LoRA(rank=2), ["q_proj", "experts"])
    said = refusals(model, tmp_path)
    assert "model.layers.0.mlp.experts" in said and "q_proj" not in said.replace("takes updates of q_proj", "")
    lorank.remove(model)
    lorank.adapt(model, LoRA(rank=2), ["q_proj"])
    lorank.save(model, tmp_path / "new.gguf", format="gguf")
    assert len(formats.read(tmp_path / "new.gguf", model).updates) == 2


def test_layers_that_llama_cpp_only_looks_up_are_refused(tmp_path: Path) -> None:
    model = models.gpt2()
    lorank.adapt(model, LoRA(rank=2), ["wpe", "c_attn"])
    said = refusals(model, tmp_path)
    assert "transformer.wpe: of this architecture llama.cpp takes updates of c_attn, c_proj, c_fc" in said


def test_without_a_model_or_for_another_nothing_is_written(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    write = formats.FORMATS["gguf"].write
    content = formats.read(saved[2])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="so the model has to be given; it may be on the meta device"):
        write(content, tmp_path / "new.gguf", None)
    with pytest.raises(AdapterError, match=r"q_proj: the update is \(32, 32\), and the model's matrix \(64, 64\)"):
        write(content, tmp_path / "new.gguf", models.llama(hidden_size=64))
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj: this model has no such layer"):
        write(content, tmp_path / "new.gguf", models.llama(num_hidden_layers=1))
    with pytest.raises(AdapterError, match="the adapter has no updates"):
        write(Content(LoRA()), tmp_path / "new.gguf", models.llama())
    with pytest.raises(AdapterError, match="is a directory"):
        write(content, tmp_path, models.llama())
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    spec = LoRA(rank=1, alpha=1e20)
    factors = {"A": torch.ones(1, 48), "B": torch.full((32, 1), 1e30)}
    content = Content(spec, {DOWN: LayerUpdate(spec, {"weight": factors})})
    for name in ("gate", "up"):
        plain = LoRA(rank=1, alpha=1.0)
        content.updates[f"model.layers.0.mlp.{name}_proj"] = LayerUpdate(
            plain, {"weight": {"A": torch.ones(1, 32), "B": torch.ones(48, 1)}}
        )
    with pytest.raises(AdapterError, match=r"down_proj: with its scale in B it holds numbers that are too large"):
        formats.FORMATS["gguf"].write(content, tmp_path / "a.gguf", models.llama())


scales = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_write_and_read_are_the_identity(data: st.DataObject, tmp_path: Path) -> None:
    heads, keys, size = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([2, 4, 6])))
    hidden = heads * keys * size
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=data.draw(st.integers(4, 20)),
                hidden_size=hidden,
                intermediate_size=data.draw(st.integers(1, 40)),
                num_hidden_layers=2,
                num_attention_heads=heads * keys,
                num_key_value_heads=keys,
                pad_token_id=0,
            )
        )
    layers = dict(model.named_modules())
    endings = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    candidates = [name for name in layers if name.rpartition(".")[2] in endings]
    content = Content(LoRA())
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    for name in data.draw(st.lists(st.sampled_from(candidates), min_size=1, unique=True)):
        weight: Any = layers[name].weight
        lookup = name == EMBEDDING
        out, in_ = reversed(weight.shape) if lookup else weight.shape
        rank = data.draw(st.integers(1, 6))
        spec = LoRA(rank, data.draw(scales), rank_stabilised=data.draw(st.booleans()))
        factors = {"A": torch.randn(rank, in_), "B": torch.randn(out, rank)}
        content.updates[name] = LayerUpdate(spec, {"weight": factors}, lookup=lookup)
    path = tmp_path / "a.gguf"
    formats.FORMATS["gguf"].write(content, path, model)
    for read in (formats.read(path, model), formats.read(path)):
        assert not read.problems and read.updates.keys() == content.updates.keys()
        for name, update in content.updates.items():
            assert read.updates[name].lookup == update.lookup
            expected = delta(update)
            torch.testing.assert_close(
                delta(read.updates[name]), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
            )


HEADER = 700  # bytes, about, of the file below


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a small adapter."""
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    model = models.llama()
    lorank.adapt(model, LoRA(rank=1), ["q_proj", "embed_tokens"])
    models.disturb(model)
    lorank.save(model, path, format="gguf", about={"a": 1})
    return path.read_bytes()


@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_is_refused(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 32))])
    with pytest.raises(AdapterError):
        formats.read(path)
    with pytest.raises(AdapterError):
        formats.FORMATS["gguf"].read(path, None, formats.Given())


@settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_as_what_it_says(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """No other exception, and nothing larger than the file in memory."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, HEADER - 1))
        value = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8) | st.just(bytes(8)))
        changed[position : position + len(value)] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(changed)
    formats.FORMATS["gguf"].detect(path)
    try:
        content = formats.FORMATS["gguf"].read(path, None, formats.Given())
    except AdapterError:
        return
    read = sum(tensor.nbytes for update in content.updates.values() for tensor in update.tensors["weight"].values())
    assert read <= 4 * len(changed)


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63)
STRING = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), "it ends at byte"),
        (HEAD, "it ends at byte"),
        (HEAD + struct.pack("<Q", 2**63), "it ends at byte"),
        (HEAD + STRING + struct.pack("<IIQ", 9, 8, 2**62), "it ends at byte"),
        (HEAD + STRING + struct.pack("<IIQ", 9, 4, 2**62), "it ends at byte"),
        (HEAD + STRING + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (HEAD + STRING + struct.pack("<I", 77), "unknown type 77"),
        (HEAD + struct.pack("<Q", 1) + b"\xff", "is no text"),
        (HEAD + 2 * (STRING + struct.pack("<II", 4, 1)), "k is there twice"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "with the lowest byte first"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    ],
)
def test_absurd_counts_and_lengths_are_refused_at_once(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(AdapterError, match="is no whole GGUF file") as error:
        gguf_file.read(tmp_path / "a.gguf")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "kind", "offset", "reason"),
    [
        ([2**62, 2**62], 0, 0, "it ends at byte"),
        ([2**40], 0, 0, "it ends at byte"),
        ([0, 4], 0, 0, "has the sizes 0, 4"),
        ([1] * 5, 0, 0, "5 dimensions"),
        ([], 0, 0, "0 dimensions"),
        ([33], 8, 0, "has the sizes 33 in Q8_0"),
        ([32], 12, 0, "ggml's type 12"),
        ([4], 0, 32, "begins at 32, where 0 is"),
    ],
)
def test_absurd_tensors_are_refused_at_once(
    sizes: list[int], kind: int, offset: int, reason: str, tmp_path: Path
) -> None:
    entry = STRING + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(100))
    with pytest.raises(AdapterError, match="is no whole GGUF file") as error:
        gguf_file.read(tmp_path / "a.gguf")
    assert reason in str(error.value)


def test_a_fused_projection_of_gpt2_is_written_as_a_whole(tmp_path: Path) -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)).eval()
    base = copy.deepcopy(model)
    lorank.adapt(model, LoRA(rank=2, alpha=4), "c_attn[q,v]")
    models.disturb(model)
    lorank.save(model, tmp_path / "a.gguf", format="gguf")
    lorank.load(base, tmp_path / "a.gguf")
    x = torch.arange(6)[None]
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)
