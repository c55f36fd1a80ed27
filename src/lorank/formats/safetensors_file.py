"""One safetensors file as bytes: reproducible to the byte, and written so that a crash leaves the old file."""

import ctypes
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AdapterError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def digest(packed: bytes) -> str:
    """Return the sha256 of a packed file's tensors: names, dtypes, shapes and data, without the metadata."""
    entries, data = _split(packed)
    entries.pop("__metadata__", None)
    return hashlib.sha256(_canonical(entries) + data).hexdigest()


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file with sorted tensors and sorted metadata: equal content, equal bytes.

    Written here because the library writes metadata in the order of a hash map, which differs from process to
    process, and needs numpy to write at all. Reading is the library's.
    """
    header: dict[str, object] = {}
    pieces: list[bytes] = []
    offset = 0
    # Wider numbers first, so that every tensor starts at a multiple of its own size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        pieces.append(encoded(tensor))
        shape, span = list(tensor.shape), [offset, offset + len(pieces[-1])]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": span}
        offset = span[1]
    packed = _joined(header, b"".join(pieces))
    return with_metadata(packed, metadata) if metadata else packed


def encoded(tensor: Tensor) -> bytes:
    """Return a tensor's values as bytes, in the order of its rows."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def with_metadata(packed: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a packed file with other metadata."""
    header, data = _split(packed)
    return _joined(header | {"__metadata__": dict(metadata)}, data)


def _joined(header: Mapping[str, object], data: bytes) -> bytes:
    text = _canonical(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


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
    """Write files that belong together: after an error all are the old ones, and no part is left behind.

    All are written in full and flushed to disk before the first takes the place of an older one. A process that
    is killed between two of them leaves whole files, of which the first may be new.
    """
    partial: dict[Path, str] = {}
    replaced: dict[Path, bytes | None] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(partial[path]).chmod(mode_for_new())
        before = {path: path.read_bytes() if path.is_file() else None for path in files}
        for path in files:
            Path(partial[path]).replace(path)
            del partial[path]
            replaced[path] = before[path]
        for folder in {path.parent for path in files}:
            flush_folder(folder)
    except (OSError, ValueError) as error:
        for path, old in replaced.items():
            path.unlink() if old is None else path.write_bytes(old)
        where = getattr(error, "filename", None) or ", ".join(map(str, files))
        raise AdapterError(f"cannot write {where}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for leftover in partial.values():
            Path(leftover).unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder written to disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def mode_for_new(mode: int = 0o666) -> int:
    """Return the permissions of a new file, or of a folder (0o777), as the user wants them."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def _canonical(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _split(packed: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", packed[:8])
    return json.loads(packed[8 : 8 + length]), packed[8 + length :]
