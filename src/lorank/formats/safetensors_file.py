"""One safetensors file as bytes: reproducible to the byte, and written so that a crash leaves the old file."""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AdapterError


def digest(packed: bytes) -> str:
    """Return the sha256 of a packed file's tensors: names, dtypes, shapes and data, without the metadata."""
    entries, data = _split(packed)
    entries.pop("__metadata__", None)
    return hashlib.sha256(_canonical(entries) + data).hexdigest()


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file with sorted tensors and sorted metadata: equal content, equal bytes.

    The safetensors library writes metadata in the order of a hash map, which differs from process to process.
    """
    packed = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    )
    entries, data = _split(packed)
    header = _canonical({"__metadata__": dict(metadata), **entries} if metadata else entries)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def read(path: Path) -> tuple[bytes, dict[str, Tensor], dict[str, str]]:
    """Return a file's bytes, tensors and metadata; raises AdapterError for a file that is not safetensors."""
    packed = path.read_bytes()
    try:
        tensors = safetensors.torch.load(packed)
        metadata = _split(packed)[0].get("__metadata__", {})
    except (SafetensorError, ValueError, struct.error) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}") from None
    return packed, tensors, metadata


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write files so that each is either the old or the new one whatever happens, and no part is left behind.

    All are written in full and flushed to disk before the first takes the place of an older one.
    """
    partial: dict[Path, str] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(partial[path]).chmod(_mode_for_new_files())
        for path in files:
            Path(partial[path]).replace(path)
            del partial[path]
    except OSError as error:
        raise AdapterError(f"cannot write {error.filename or ', '.join(map(str, files))}: {error.strerror}") from error
    finally:
        for leftover in partial.values():
            Path(leftover).unlink(missing_ok=True)


def _mode_for_new_files() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _canonical(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _split(packed: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", packed[:8])
    return json.loads(packed[8 : 8 + length]), packed[8 + length :]
