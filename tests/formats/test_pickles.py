"""Pickles are opened in a process of their own: what is in them is read, and nothing that they ask for is done."""

import collections
import copy
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, AdapterWarning
from lorank.formats.pickles import read_pickle

from .. import models


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have temporary folders made in one of the test's own, and see that none is left in it."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def saved(path: Path, value: object, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def refused(path: Path, reason: str, seconds: float | None = None) -> None:
    with pytest.raises(AdapterError, match=reason) as error:
        read_pickle(path, True, seconds)
    assert str(path) in str(error.value) and "weights_only" not in str(error.value)


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


# --- what is read ---


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_dictionaries_tensors_numbers_and_texts_come_back(archive: bool, tmp_path: Path) -> None:
    wide = torch.randn(6, 8)
    tensors = {
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool)},
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3.5),
        "transposed": wide.T,
        "columns": wide[:, 2:5],
        "parameter": nn.Parameter(torch.ones(2)),
    }
    plain = {"epoch": 3, "loss": 0.5, "bad": float("inf"), "name": "ä\n\0", "best": True, "none": None, "big": -(2**60)}
    value = {"model_state_dict": collections.OrderedDict(tensors), "": {}, "a.b": {"items": {"tensor": 1}}, **plain}
    found = read_pickle(saved(tmp_path / "x.pt", value, _use_new_zipfile_serialization=archive), True)
    state = found.pop("model_state_dict")
    assert found == {"": {}, "a.b": {"items": {"tensor": 1}}, **plain}
    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
        assert type(state[name]) is Tensor and not state[name].requires_grad


def test_tensors_that_are_one_stay_one(tmp_path: Path) -> None:
    embedding = torch.randn(4, 3)
    tied = {"embed": embedding, "head": {"weight": embedding}, "row": embedding[1], "view": embedding.view(3, 4)}
    found = read_pickle(saved(tmp_path / "x.pt", tied), True)
    assert found["embed"] is found["head"]["weight"] and torch.equal(found["embed"], embedding)
    assert torch.equal(found["row"], embedding[1]) and torch.equal(found["view"], embedding.view(3, 4))


def test_other_values_are_left_out_and_named(tmp_path: Path) -> None:
    value = {
        "weight": torch.ones(2),
        "list": [torch.ones(1)],
        "optimizer": {"state": {0: torch.ones(1)}, "lr": 0.1},
        "sparse": torch.eye(2).to_sparse(),
        "complex": torch.ones(1, dtype=torch.complex64),
        "huge": 2**80,
    }
    with pytest.warns(AdapterWarning, match=r"list, optimizer\.state\[0\], sparse, complex, huge is neither tensor"):
        found = read_pickle(saved(tmp_path / "x.pt", value), True)
    assert found.keys() == {"weight", "optimizer"} and found["optimizer"] == {"state": {}, "lr": 0.1}


def test_it_works_from_any_main_program(tmp_path: Path) -> None:
    """From a text on the standard input, as notebooks run, in a folder with modules that nobody should import."""
    saved(tmp_path / "x.pt", {"a": torch.ones(2)})
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("torch", "json", "safetensors", "sitecustomize", "lorank"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    code = """
        import os, sys
        from pathlib import Path
        from lorank.formats.pickles import read_pickle
        os.chdir(sys.argv[1])
        sys.path.insert(0, "")
        os.environ["PYTHONPATH"] = sys.argv[1]
        sys.modules["__main__"].__file__ = "/nowhere.py"
        print(read_pickle(Path("../x.pt"), True))
    """
    command = [sys.executable, "-", str(folder)]
    done = subprocess.run(command, input=textwrap.dedent(code), text=True, capture_output=True, cwd=tmp_path)
    assert done.stdout == "{'a': tensor([1., 1.])}\n", done.stderr
    assert not (tmp_path / "imported").exists()


# --- what is refused ---


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(AdapterError, match=r"is a pickle: pass allow_pickle=True .* --allow-pickle"):
        read_pickle(path, False)
    with pytest.raises(AdapterError, match="is not a file"):
        read_pickle(tmp_path, True)
    with pytest.raises(AdapterError, match="is not a file"):
        read_pickle(tmp_path / "nowhere", True)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": Runs(marker)}, protocol=protocol))
    refused(tmp_path / "x.pt", "cannot be read")
    assert not marker.exists()
    os.system(f"touch '{marker}'")  # the command itself would have left it
    assert marker.exists()


def test_code_is_not_run_where_this_process_would_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, path = tmp_path / "ran", tmp_path / "x.pt"
    saved(path, {"a": Runs(marker)})
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with torch.serialization.safe_globals([os.system]):
        refused(path, "system")
    assert not marker.exists()


def test_a_hostile_file_of_peft_is_refused_too(tmp_path: Path) -> None:
    model, marker = models.llama(), tmp_path / "ran"
    lorank.adapt(copy.deepcopy(model), lorank.LoRA(), "q_proj")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    saved(tmp_path / "adapter_model.bin", {"base_model.model.x.lora_A.weight": Runs(marker)})
    with pytest.raises(AdapterError, match="cannot be read"):
        lorank.load(model, tmp_path, allow_pickle=True)
    assert not marker.exists() and lorank.adapter_names(model) == []


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), 3, nn.Linear(1, 1)], ids=lambda v: type(v).__name__)
def test_what_is_no_dictionary_is_refused(value: object, tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", value), "cannot be read")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.randn(100)})
    legacy = saved(tmp_path / "y.pt", {"a": torch.randn(100)}, _use_new_zipfile_serialization=False).read_bytes()
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = [b"", b"PK\x03\x04", b"\x80\x02", b"nonsense", whole[:middle], whole[:-1], legacy[: len(legacy) // 2]]
    damaged.append(whole[:70] + bytes(40) + whole[110:])  # in the names
    for content in damaged:
        path.write_bytes(content)
        refused(path, "cannot be read")


def rewritten(path: Path, pickled: bytes | None, **records: bytes) -> None:
    """Write an archive of torch.save again, compressed, with another pickle or other records."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for entry, content in entries.items():
            name = entry.partition("/")[2]
            content = pickled if pickled is not None and name == "data.pkl" else records.get(name, content)
            archive.writestr(entry, content)


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    buffer = saved(tmp_path / "x.pt", {"a": torch.zeros(1)}).read_bytes()
    numbers = 400_000_000  # 1.6 GB, from 7 MB
    with zipfile.ZipFile(io.BytesIO(buffer)) as archive:
        pickled = archive.read("x/data.pkl").replace(b"K\x01tq", b"J" + struct.pack("<i", numbers) + b"tq", 1)
    with zipfile.ZipFile(io.BytesIO(buffer)) as before:
        entries = {entry: before.read(entry) for entry in before.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for entry, content in entries.items():
            if entry != "x/data/0":
                archive.writestr(entry, pickled if entry == "x/data.pkl" else content)
        with archive.open("x/data/0", "w", force_zip64=True) as record:
            for _ in range(100):
                record.write(bytes(4 * numbers // 100))
    assert (tmp_path / "x.pt").stat().st_size < 10_000_000
    refused(tmp_path / "x.pt", "it needs far more memory than its size explains")


def test_claimed_sizes_are_not_believed(tmp_path: Path) -> None:
    path = saved(tmp_path / "wide.pt", {"a": torch.zeros(1).expand(10**6, 10**6)})  # four bytes as four terabytes
    refused(path, "claim 4000000000000 bytes")
    path = saved(tmp_path / "beyond.pt", {"a": torch.zeros(6)})
    rewritten(path, _pickle_of(path).replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85"))
    refused(path, "storage that is not resizable")
    path = saved(tmp_path / "legacy.pt", {"a": torch.zeros(6)}, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x06N", b"J\xff\xff\xff\x7fN"))
    refused(path, "it needs far more memory than its size explains")


def _pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl")


def test_nested_and_repeated_dictionaries_come_to_an_end(tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"a": nested}
    refused(saved(tmp_path / "deep.pt", nested), "nested more than 16 deep")
    endless: dict[str, Any] = {}
    endless["a"] = endless
    refused(saved(tmp_path / "endless.pt", endless), "nested more than 16 deep")
    many: dict[str, Any] = {}
    for _ in range(12):
        many = {str(i): many for i in range(10)}
    refused(saved(tmp_path / "many.pt", many), "more than 1000000 values")
    text = "x" * 100_000
    refused(saved(tmp_path / "texts.pt", {str(i): text for i in range(2000)}), "File too large")


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1)})
    rewritten(path, b"\x80\x02K\x01" + b"q\x00" * 30_000_000 + b".")  # the same thing remembered again and again
    assert path.stat().st_size < 1_000_000
    before = time.monotonic()
    refused(path, "after 4 s it was given up", seconds=4)
    assert time.monotonic() - before < 60


def test_an_adapter_in_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="is not a file"):
        read_pickle(tmp_path / "x.pt", True)
    with pytest.raises(AdapterError, match="it is no regular file"):
        lorank.load(models.llama(), tmp_path / "x.pt", allow_pickle=True)
