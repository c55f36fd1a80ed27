"""loralib's files, without loralib: what is written comes back, and what cannot be told is asked for or refused."""

import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import lorank
from lorank import AdapterError, AdapterWarning, DoRA, LoRA
from lorank.formats import FORMATS, Given, loralib
from lorank.formats.content import gather
from lorank.formats.fitting import fit
from lorank.formats.loralib.reshaping import blocks, reshaped
from lorank.formats.loralib.writing import encode
from lorank.names import Names

from .. import models


def stored(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def refused(model: nn.Module, path: Path, *reasons: str, **said: Any) -> None:
    before = [(name, type(module), list(module.__dict__)) for name, module in model.named_modules()]
    with pytest.raises(AdapterError) as error:
        lorank.load(model, path, **({"alpha": 8, "allow_pickle": True} | said))
    for reason in reasons:
        assert reason in str(error.value), str(error.value)
    assert [(name, type(module), list(module.__dict__)) for name, module in model.named_modules()] == before


def pair(out: int, in_: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, in_), torch.randn(out, rank)


def factors(**layers: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    named = {name.replace("__", "."): tensors for name, tensors in layers.items()}
    return {f"{name}.lora_{kind}": t for name, both in named.items() for kind, t in zip("AB", both, strict=True)}


def read(state: dict[str, Any], model: nn.Module | None = None, **said: Any) -> Any:
    """Return what a state dict says, as `read` finds it in a file."""
    settings: dict[str, Any] = {"alpha": 8.0} | said
    return loralib.decode(state, None if model is None else Names(model), Given(**settings))


# --- what is written comes back ---


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_adapter_comes_back(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    rank, alpha = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3, 16, 0.7]))
    stabilised = data.draw(st.booleans())
    parts = data.draw(st.lists(st.sampled_from("qkv"), unique=True, min_size=1))
    others = data.draw(st.lists(st.sampled_from(["c_fc", "wpe", "attn.c_proj"]), unique=True))
    bias: Any = data.draw(st.sampled_from(["none", "adapted", "all"]))
    also = data.draw(st.lists(st.sampled_from(["ln_f", "h.1.ln_1"]), unique=True)) if bias != "all" else []
    ranks = dict.fromkeys(others, data.draw(st.integers(1, 4)))
    base = models.gpt2()
    model = copy.deepcopy(base)
    targets = [f"c_attn[{','.join(parts)}]", *others]
    lorank.adapt(
        model, LoRA(rank, alpha=alpha, rank_stabilised=stabilised), targets, ranks=ranks, bias=bias, train_also=also
    )
    models.disturb(model)
    tensors, notes = encode(gather(model, "default"), model)
    assert list(tensors) == sorted(tensors)
    written = float(notes[0].partition("lora_alpha=")[2].split()[0])
    # What a note says of alpha is rounded for the eye.
    content = read(tensors, base, alpha=exact_alpha(model, written), parts=tuple(parts))
    fit(base, content, "again", activate=True, allow_other_base=False)
    x = models.ids()
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    again, _ = encode(gather(base, "again"), base)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


def exact_alpha(model: nn.Module, about: float) -> float:
    """Return the scale times rank of a layer that is nearest to a number."""
    updates = gather(model, "default").updates.values()
    found = [spec.scale * spec.rank for update in updates for spec in [update.spec, *update.specs.values()]]
    return min(found, key=lambda alpha: abs(alpha - about))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_a_matrix_in_rows_of_another_length(rank: int, times: int, before: int, after: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = times * after  # so that the numbers make whole rows of both lengths
    A, B = torch.randn(rank, before, dtype=torch.float64), torch.randn(rows, rank, dtype=torch.float64)
    wide, tall = reshaped(A, B, after)
    assert wide.shape == (blocks(before, after) * rank, after)
    torch.testing.assert_close(tall @ wide, (B @ A).view(-1, after))
    back = reshaped(wide, tall, before)
    assert torch.equal(back[0], A) and torch.equal(back[1], B)


def test_equal_adapters_make_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
        import sys, warnings, torch, lorank
        from tests import models
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = models.gpt2()
        lorank.adapt(model, lorank.LoRA(rank=2), ["c_attn[q,v]", "c_fc"], train_also=["ln_f"], bias="adapted")
        models.disturb(model)
        lorank.save(model, sys.argv[1], format="loralib")
    """
    digests = set()
    for hash_seed, name in (("0", "one.pt"), ("1", "another.bin")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_file_is_found_by_its_content_and_replaced_in_one_step(tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, LoRA(2, alpha=8), "q_proj")
    models.disturb(model)
    path = tmp_path / "adapter.of.any.name"
    for _ in range(2):
        with pytest.warns(AdapterWarning, match="store no settings; make its layers with lora_alpha=8 and r=2"):
            lorank.save(model, path, format="loralib")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert [name for name, module in FORMATS.items() if module.detect(path)] == ["loralib"]
    state = torch.load(path, weights_only=True)
    assert type(state) is dict and len(state) == 4
    small = sum(t.untyped_storage().nbytes() for t in state.values())
    assert small == sum(4 * t.numel() for t in state.values())  # no memory around the tensors was written
    with pytest.raises(AdapterError, match="is a directory; loralib's adapters are files"):
        lorank.save(model, tmp_path, format="loralib")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot write"):
        lorank.save(model, tmp_path / "file" / "below", format="loralib")


def test_other_pickles_are_not_taken_for_it(tmp_path: Path) -> None:
    A, B = pair(4, 4)
    names = ["x.lora_A.weight", "x.lora_A.default.weight", "x.parametrizations.weight.0.lora_A", "x.weight"]
    for name in names:
        path = stored(tmp_path / "x.pt", {name: A, name.replace("lora_A", "lora_B"): B})
        assert not loralib.detect(path), name
        refused(models.llama(), path, "it is no adapter in a format that lorank reads")
    (tmp_path / "x.pt").write_text("lora_A")
    assert not loralib.detect(tmp_path / "x.pt") and not loralib.detect(tmp_path)


# --- what the user has to say ---


def test_what_the_file_does_not_store_is_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    path = stored(tmp_path / "x.pt", factors(**{"0": pair(4, 4)}))
    wanted = "alpha is not stored in loralib's files: pass alpha="
    refused(model, path, wanted, "is a pickle: pass allow_pickle=True", alpha=None, allow_pickle=False)
    refused(model, path, wanted, alpha=None)
    refused(model, path, "is a pickle: pass allow_pickle=True", allow_pickle=False)
    for wrong in (0, float("nan"), "8", True):
        refused(model, path, f"alpha is {wrong!r}", alpha=wrong)
    assert lorank.load(model, path, alpha=3, allow_pickle=True).spec == LoRA(2, alpha=3)


def test_the_parts_of_a_projection_are_asked_for() -> None:
    gpt2, path = models.gpt2(), "transformer.h.0.attn.c_attn"
    state = {f"{path}.lora_A": torch.randn(8, 32), f"{path}.lora_B": torch.randn(64, 4)}
    for parts, reason in [
        ((), "2 parts of a fused projection, and does not say which of q, k, v: pass parts=, with 2 names"),
        (("q",), "with 2 names; q does not tell"),
        (("q", "k", "v"), "with 2 names; q, k, v does not tell"),
        (("query", "value"), "with 2 names; query, value does not tell"),
    ]:
        assert any(reason in problem for problem in read(state, gpt2, parts=parts).problems)
    for parts in (("q", "v"), ("v", "q"), ("0", "2"), ("up", "q", "v")):
        content = read(state, gpt2, parts=parts)
        assert not content.problems and content.spec == LoRA(4, alpha=8.0)
        update = content.updates[path]
        assert list(update.tensors) == ["q", "v"]
        assert torch.equal(update.tensors["v"]["A"], state[f"{path}.lora_A"][4:])
        assert torch.equal(update.tensors["v"]["B"], state[f"{path}.lora_B"][32:])
    assert "does not say which: pass parts=" in read(state).problems[0]
    assert list(read(state, parts=("q", "v")).updates[path].tensors) == ["q", "v"]


def test_parts_that_loralib_cut_otherwise_than_the_model() -> None:
    """GPT-NeoX has q, k and v of one head after those of another; loralib's groups are thirds of all rows."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(num_attention_heads=4, **sizes)).eval()
    path = "gpt_neox.layers.0.attention.query_key_value"
    A, B = torch.randn(4, 32), torch.randn(64, 2)
    state = {f"{path}.lora_A": A, f"{path}.lora_B": B}
    assert "which of 0, 1, 2" in read(state, model, parts=("q", "v")).problems[0]
    content = read(state, model, parts=("0", "2"))
    fit(model, content, "x", activate=True, allow_other_base=False)
    change = lorank.adapter_parameters(model)
    assert {tuple(p.shape) for p in change.values()} == {(4, 32), (96, 4)}
    whole = content.updates[path].tensors["weight"]
    delta = content.spec.scale * whole["B"] @ whole["A"]
    torch.testing.assert_close(delta[:32], 4 * B[:32] @ A[:2])
    torch.testing.assert_close(delta[64:], 4 * B[32:] @ A[2:])
    assert not delta[32:64].any()


# --- what else is in a file ---


def test_heads_are_copied_as_the_largest_module_that_is_whole() -> None:
    model, layer = models.roberta(), "roberta.encoder.layer.0.attention.self.query"
    state = {f"{layer}.lora_A": torch.randn(2, 32), f"{layer}.lora_B": torch.randn(32, 2)}
    head = {f"classifier.{key}": torch.randn_like(value) for key, value in model.classifier.state_dict().items()}
    norm = {f"roberta.embeddings.LayerNorm.{key}": torch.randn(32) for key in ("weight", "bias")}
    content = read(state | head | norm, model)
    assert {name: sorted(copy) for name, copy in content.copies.items()} == {
        "classifier": ["dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight"],
        "roberta.embeddings.LayerNorm": ["bias", "weight"],
    }
    del head["classifier.dense.bias"]
    content = read(state | head, model)
    assert {name: sorted(copy) for name, copy in content.copies.items()} == {
        "classifier.dense": ["weight"],
        "classifier.out_proj": ["bias", "weight"],
    }
    with pytest.raises(AdapterError, match=r"classifier\.dense: the file lacks bias"):
        fit(model, content, "x", activate=True, allow_other_base=False)
    assert read(state | head).copies.keys() == {"classifier"}


def test_biases_alone_are_biases() -> None:
    model, layer = models.roberta(), "roberta.encoder.layer.0.attention.self.query"
    state = {f"{layer}.lora_A": torch.randn(2, 32), f"{layer}.lora_B": torch.randn(32, 2)}
    biases = {key: value + 1 for key, value in model.state_dict().items() if key.endswith("bias")}
    for names in (model, None):
        content = read(state | {f"{layer}.bias": torch.randn(32)}, names)
        assert content.bias == "adapted" and list(content.biases) == [layer]
        content = read(state | biases, names)
        assert content.bias == "all" and len(content.biases) == len(biases) and not content.copies


def test_tensors_of_the_base_are_compared() -> None:
    model = models.gpt2()
    layer = "transformer.h.0.attn.c_attn"
    state = {f"{layer}.lora_A": torch.randn(6, 32), f"{layer}.lora_B": torch.randn(96, 2)}
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    content = read(state | mask, model)  # buffers of GPT-2 as it once was
    assert not content.base and not content.biases and not content.copies
    content = read(state | model.state_dict() | mask, model)
    assert content.base.keys() == model.state_dict().keys() and not content.problems
    fit(copy.deepcopy(model), content, "x", activate=True, allow_other_base=False)
    other = models.gpt2().state_dict()
    content = read(state | other, model)
    assert any(f"the base's {layer}.weight, and it differs" in problem for problem in content.problems)
    with pytest.raises(AdapterError, match=r"wte\.weight, and it differs from this model's: another base"):
        fit(model, content, "x", activate=True, allow_other_base=False)


def test_a_model_without_weights_is_enough_to_read_with() -> None:
    model = models.gpt2()
    layer = "transformer.h.0.attn.c_attn"
    state = {f"{layer}.lora_A": torch.randn(6, 32), f"{layer}.lora_B": torch.randn(96, 2)} | model.state_dict()
    with torch.device("meta"):
        empty = models.gpt2()
    content = read(state, empty)
    assert list(content.updates[layer].tensors) == ["q", "k", "v"] and not content.problems


# --- what is refused ---


def test_every_problem_of_a_file_is_in_one_error(tmp_path: Path) -> None:
    model = models.sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    state = factors(
        **{"0": pair(6, 5), "1": pair(4, 6), "2": pair(12, 11, 6), "3": (torch.randn(4, 4), torch.randn(4, 3))},
        **{"7": pair(4, 4), "2__conv": pair(4, 4)},
    )
    state["1.lora_B"][0, 0] = float("inf")
    state["4.lora_A"] = torch.randn(2, 4)
    state |= {"9.weight": torch.ones(2), "4.x.lora_A": torch.ones(1), "4.x.lora_B": torch.ones(1, 1)}
    path = stored(tmp_path / "x.pt", state)
    refused(
        model,
        path,
        "0: A is (2, 5) in the file, the model needs (2, 4)",
        "1: B holds NaN or Inf",
        "2: lora_A (6, 11) and lora_B (12, 6) make no kernel of (4, 4, 3, 3)",
        "3: lora_A (4, 4) and lora_B (4, 3) are no pair of factors",
        "4: the file lacks lora_B",
        "4.x: lora_A (1,) and lora_B (1, 1) are no pair of factors",
        "the file adapts 7, which this model has not",
        "the file has 9.weight, for which this model has no place",
    )


def test_dictionaries_without_an_adapter_or_with_two_are_refused(tmp_path: Path) -> None:
    model, state = models.sequential(nn.Linear(4, 4)), factors(**{"0": pair(4, 4)})
    refused(model, stored(tmp_path / "a.pt", {"x": state, "y": state}), "several dictionaries in it hold factors: x, y")
    refused(model, stored(tmp_path / "b.pt", {"lora_A": 3}), "no tensor in it is called lora_A or lora_B")
    refused(model, stored(tmp_path / "d.pt", ["lora_A"]), "it holds a list, not a dictionary")
    whole = stored(tmp_path / "e.pt", state).read_bytes()
    (tmp_path / "e.pt").write_bytes(whole[:-200])
    refused(model, tmp_path / "e.pt", "cannot be read")


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def test_a_hostile_file_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = stored(tmp_path / "x.pt", factors(**{"0": pair(4, 4)}) | {"epoch": Runs(tmp_path / "ran")})
    refused(models.sequential(nn.Linear(4, 4)), path, "cannot be read", "system")
    assert not (tmp_path / "ran").exists() and list(scratch.iterdir()) == []


def test_what_loralib_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = models.Plain(tied=True).eval()
    lorank.adapt(model, LoRA(2), ["embed"], tie=True)
    unwritable(model, tmp_path, "head mirrors the update of embed, and loralib would merge both")
    model = models.llama()
    lorank.adapt(model, LoRA(2), ["q_proj"], train_tokens=[3, 5])
    unwritable(model, tmp_path, "rows of 2 tokens of model.embed_tokens are trained")
    model = models.sequential(nn.Linear(4, 4))
    lorank.adapt(model, DoRA(2), ["0"])
    unwritable(model, tmp_path, "0: ")
    odd = [nn.Conv2d(4, 4, (1, 3)), nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Bilinear(4, 4, 4)]
    model = models.sequential(*odd, nn.GRU(4, 4), nn.MultiheadAttention(4, 2))
    lorank.adapt(model, LoRA(1), ["0", "1", "2", "3", "4[weight_ih_l0]", "5[q,v]"])
    square = "loralib's convolutions work in two dimensions with a square kernel"
    none = "loralib has no layer of its kind"
    unwritable(model, tmp_path, *(f"{i}: {square}" for i in (0, 1)), *(f"{i}: {none}" for i in (2, 3, 4, 5)))


def unwritable(model: nn.Module, folder: Path, *reasons: str) -> None:
    with pytest.raises(AdapterError) as error:
        lorank.save(model, folder / "x.pt", format="loralib")
    for reason in ("loralib's layers cannot hold this adapter", *reasons):
        assert reason in str(error.value), str(error.value)
    assert list(folder.iterdir()) == []


def test_parts_of_unequal_rows_become_one_update_of_the_layer(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    base: Any = Phi3ForCausalLM(Phi3Config(**models.SMALL_DECODER)).eval()
    model, x = copy.deepcopy(base), models.ids()
    lorank.adapt(model, LoRA(2, alpha=6), ["qkv_proj[q,v]"])
    models.disturb(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorank.save(model, tmp_path / "x.pt", format="loralib")
    texts = [str(warning.message) for warning in caught]
    assert "lora_alpha=12 and r=4" in texts[0] and "its parts are the update of the whole layer" in texts[1]
    plan = lorank.load(base, tmp_path / "x.pt", alpha=12, allow_pickle=True)
    assert plan.spec == LoRA(4, alpha=12)
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
