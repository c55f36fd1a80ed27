"""lorank's own file: whatever an adapter is made of comes back, and a file that is not whole is refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank import AdapterError, AdapterWarning, LoRA, arithmetic
from lorank.baselines import AdapterH, AdapterP, BitFit, PrefixEmbedding
from lorank.formats import detect, read
from lorank.formats.lorank import TENSORS

from .. import models

KEY = "lorank.adapter"


def everything(model: Any) -> Any:
    """Put an adapter on a model that has parts, a bias, a copy, rows of tokens, a bottleneck and a prefix at once."""
    spec = [LoRA(rank=2), AdapterH(size=2), PrefixEmbedding(2, 1), BitFit()]
    lorank.adapt(model, spec, ["c_attn[q,v]"], train_also="ln_f", train_tokens=[4, 9], ranks={"h.1.*": 3})
    models.disturb(model)
    return model


def saved(folder: Path) -> Any:
    model = everything(models.gpt2())
    lorank.save(model, folder)
    return model


def test_all_of_an_adapter_comes_back_by_the_same_bytes(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    assert detect(tmp_path / "a") == detect(tmp_path / "a" / TENSORS) == "lorank"
    content = read(tmp_path / "a")
    assert content.problems == [] and len(content.baselines) == 2  # biases need no account of what trained them
    parameters = {key: p.detach() for key, p in lorank.adapter_parameters(model).items()}
    lorank.load(model, tmp_path / "a", "b")
    for key, parameter in lorank.adapter_parameters(model, "b").items():
        torch.testing.assert_close(parameter.detach(), parameters[key.replace(".adapters.b", ".adapters.default")])
    lorank.save(model, tmp_path / "b", "b")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


def test_what_the_layout_of_peft_can_hold_is_written_in_it(tmp_path: Path) -> None:
    model = models.gpt2()
    lorank.adapt(model, [LoRA(rank=2), BitFit()], "c_attn")
    lorank.save(model, tmp_path)
    assert detect(tmp_path) == "peft"
    with pytest.raises(AdapterError, match="has an adapter in another format already"):
        lorank.save(model, tmp_path, format="lorank")


@pytest.mark.parametrize("to", ["peft", "vllm", "mlx", "gguf", "kohya", "loralib"])
def test_other_formats_refuse_what_runs_beside_the_layers(to: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"adapter-h .* runs beside the layers"):
        lorank.convert(tmp_path / "a", tmp_path / f"to.{to}", to, models.gpt2())
    assert not (tmp_path / f"to.{to}").exists()


def test_a_folder_never_has_two_adapters(tmp_path: Path) -> None:
    saved(tmp_path)
    model = models.gpt2()
    lorank.adapt(model, LoRA(rank=2), "c_attn")
    with pytest.raises(AdapterError, match="has an adapter in lorank's own format"):
        lorank.save(model, tmp_path)


def test_arithmetic_refuses_what_is_no_update(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(AdapterError, match="is no update that could be computed with"):
        arithmetic.resize(read(tmp_path / "a"), 1)


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the account in a file's header, and leave the tensors as they are."""
    packed = file.read_bytes()
    (length,) = struct.unpack("<Q", packed[:8])
    header = json.loads(packed[8 : 8 + length])
    account = json.loads(header["__metadata__"][KEY])
    change(account)
    header["__metadata__"][KEY] = json.dumps(account)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + packed[8 + length :])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda account: account.update(version=9), "written by another lorank"),
        (lambda account: account.update(sha256="0"), "the tensors are not those that were saved"),
        (lambda account: account.pop("updates"), "its header is damaged"),
        (lambda account: account["updates"].pop("transformer.h.0.attn.c_attn"), "it does not name updates/"),
        (lambda account: account["inserted"].pop("transformer.h.0.attn.resid_dropout"), "it does not name inserted/"),
        (lambda account: account["copies"].append("nothing"), "its header is damaged"),
        (lambda account: account["tokens"].clear(), "it does not name tokens/"),
        (lambda account: account.update(bias="some"), "bias is 'some'"),
        (lambda account: account["baselines"].append({"variant": "adapter-x"}), "unknown baseline 'adapter-x'"),
        (lambda account: account["baselines"].append({"variant": "top-k", "k": 2}), "does not fit this lorank"),
        (lambda account: account["baselines"].clear(), "the file does not say what its adapter-h is"),
        (
            lambda account: account["baselines"][1].update(size=3),
            r"is \(2, 32\) in the file, the model needs \(3, 32\)",
        ),
        (lambda account: account["baselines"][1].update(places=["ln_1"]), "the file lacks what adapter-h"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    rewritten(tmp_path / TENSORS, change)
    with pytest.raises(AdapterError, match=reason):
        lorank.load(model, tmp_path, "again")
    assert lorank.adapter_names(model) == ["default"]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_off_is_refused(part: float, tmp_path: Path) -> None:
    model = saved(tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        lorank.load(model, tmp_path, "again")


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = everything(models.gpt2())
    with torch.no_grad():
        next(iter(lorank.adapter_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(AdapterError, match="holds NaN or Inf"):
        lorank.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_dtype_of_the_base_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.gpt2()
    lorank.adapt(model, BitFit())
    models.disturb(model)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    with pytest.warns(AdapterWarning, match="in another dtype"):
        lorank.load(model.bfloat16(), tmp_path)


def test_names_with_slashes_come_back(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a/b": torch.nn.Linear(4, 4), "a": torch.nn.LayerNorm(4)})
    lorank.adapt(model, [LoRA(rank=1), AdapterP(2, places=("a",)), BitFit()], ["a/b"])
    models.disturb(model)
    lorank.save(model, tmp_path)
    own = [parameter.detach().clone() for parameter in lorank.adapter_parameters(model).values()]
    lorank.load(model, tmp_path, "again")
    there = list(lorank.adapter_parameters(model, "again").values())
    for parameter, other in zip(own, there, strict=True):
        torch.testing.assert_close(parameter, other.detach())


def test_peft_s_layout_is_refused_for_what_has_no_update(tmp_path: Path) -> None:
    model = models.gpt2()
    lorank.adapt(model, BitFit())
    with pytest.raises(AdapterError, match="knows no base"):
        lorank.save(model, tmp_path / "a", format="peft")
    lorank.save(model, tmp_path / "b")
    with torch.device("meta"):
        empty = models.gpt2()
    with pytest.raises(AdapterError, match="the model is on the meta device; load its weights first"):
        lorank.load(empty, tmp_path / "b")
