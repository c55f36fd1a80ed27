"""Model checkpoints on disk, as transformers writes them: safetensors files, perhaps in shards, beside a configuration.

Read and written one tensor at a time, so that memory does not grow with the model.
"""

import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .errors import AdapterError, enumerate_names
from .formats.safetensors_file import DTYPES, encoded, flush_folder, mode_for_new

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".index.json")


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is to be read."""

    folder: Path
    shards: dict[str, list[Slot]]  # by file, in the order of the file
    config: dict[str, Any]

    @staticmethod
    def of(folder: Path) -> "Checkpoint":
        """Return the checkpoint in a folder; raises AdapterError when it is none, or not of safetensors."""
        if not (folder / "config.json").is_file():
            raise AdapterError(f"{folder} is no model: it has no config.json")
        try:
            config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{folder / 'config.json'} cannot be read: {error}") from None
        if config.get("quantization_config"):
            raise AdapterError(
                f"{folder} is quantised, and its tensors are not the weights; merge into the base that it was made from"
            )
        if (folder / _INDEX).is_file():
            try:
                files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise AdapterError(f"{folder / _INDEX} cannot be read: {error}") from None
        elif (folder / _SINGLE).is_file():
            files = [_SINGLE]
        else:
            others = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHTS)
            raise AdapterError(
                f"{folder} has no {_SINGLE}"
                + (f", only {enumerate_names(others, 3)}" if others else "")
                + "; only safetensors can be merged shard by shard (--in-memory loads the model instead)"
            )
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise AdapterError(f"{folder} lacks {enumerate_names(missing, 3)}, which its index names")
        return Checkpoint(folder, {name: _slots(folder / name) for name in files}, config)

    @property
    def names(self) -> list[str]:
        return [slot.name for slots in self.shards.values() for slot in slots]


def _slots(path: Path) -> list[Slot]:
    by_name = {text: dtype for dtype, text in DTYPES.items()}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = []
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                piece = file.get_slice(name)
                if piece.get_dtype() not in by_name:
                    raise AdapterError(f"{path}: {name} is {piece.get_dtype()}, which cannot be copied")
                found.append(Slot(name, by_name[piece.get_dtype()], tuple(piece.get_shape())))
            return found
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}") from None


def names_in_model(keys: Sequence[str], own: Collection[str], prefix: str) -> dict[str, str]:
    """Return the model's own name for each key of a checkpoint, given the model's names and its base's prefix.

    A checkpoint of a bare encoder lacks the prefix that its tensors have under a head, and the other way round. What
    the model does not know keeps its name. Raises AdapterError where two keys are one name.
    """
    found = {}
    for key in keys:
        candidates = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        found[key] = next((name for name in candidates if name in own), key)
    doubled = sorted(name for name, times in Counter(found.values()).items() if times > 1)
    if doubled:
        raise AdapterError(f"the checkpoint has {enumerate_names(doubled, 3)} under two names")
    return found


def write_shard(path: Path, slots: Sequence[Slot], tensor_of: Callable[[Slot], Tensor]) -> None:
    """Write a safetensors file whose tensors are asked for one by one, and flush it to disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        span = [offset, offset + slot.bytes]
        header[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": list(slot.shape), "data_offsets": span}
        offset += slot.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            tensor = tensor_of(slot)
            assert tensor.dtype == slot.dtype and tuple(tensor.shape) == slot.shape, slot.name
            file.write(encoded(tensor))
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: Mapping[str, Sequence[Slot]]) -> None:
    """Write the index of a checkpoint of several files."""
    if len(shards) == 1:
        return
    total = sum(slot.bytes for slots in shards.values() for slot in slots)
    where = {slot.name: file for file, slots in shards.items() for slot in slots}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: configuration, tokenizer, templates, licence."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its place when the block ends well, and goes away when it does not.

    Whoever is killed in between leaves the other folder, `.<name>.partial-...`, and never a half-written target.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty; choose another folder, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    except OSError as error:
        raise AdapterError(f"cannot write {target}: {error.strerror}") from None
    try:
        yield made
        made.chmod(mode_for_new(0o777))
        for path in made.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        flush_folder(made)
        if target.exists():
            target.rmdir()  # it is empty
        made.rename(target)
        flush_folder(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
