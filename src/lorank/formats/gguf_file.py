"""A GGUF file as bytes: metadata and tensors, as ggml's documentation of version 3 has them; version 2 is read too.

Written here because the `gguf` package trusts the counts and lengths in a file, so that a damaged one can keep it busy
for ever, and because it writes to paths alone.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, enumerate_names
from .safetensors_file import encoded

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, of a file that does not say another
_VERSION = 3
_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # for struct
_LONGEST_NAME = 63  # bytes of a tensor's name that ggml has room for
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Array:
    """A list in the metadata; its values are not read, for those of a model's vocabulary are many."""

    count: int


@dataclass(frozen=True)
class _Kind:
    """How numbers are stored: `block` of them in `size` bytes."""

    name: str
    block: int
    size: int
    dtype: torch.dtype | None = None  # None where they are packed


_Q8_0 = _Kind("Q8_0", 32, 34)  # a float16 scale and 32 int8 a block
_KINDS = {
    0: _Kind("F32", 1, 4, torch.float32),
    1: _Kind("F16", 1, 2, torch.float16),
    8: _Q8_0,
    30: _Kind("BF16", 1, 2, torch.bfloat16),
}


def pack(metadata: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]) -> bytes:
    """Return a file with these tensors in float32 and sorted, so that equal content makes equal bytes.

    Whole numbers are written as uint32, fractions as float32.
    """
    head = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    # Readers have to know the architecture first: it begins the names of other keys.
    for key, value in sorted(metadata.items(), key=lambda item: (item[0] != "general.architecture", item[0])):
        head.append(_string(key))
        if isinstance(value, str):
            head.append(struct.pack("<I", _STRING) + _string(value))
        else:
            kind = _UINT32 if isinstance(value, int) else _FLOAT32
            head.append(struct.pack(f"<I{_NUMBERS[kind]}", kind, value))
    data: list[bytes] = []
    offset = 0
    for name, tensor in sorted(tensors.items()):
        sizes = tuple(reversed(tensor.shape))  # GGUF has the fastest dimension first
        head.append(_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, offset))
        packed = encoded(tensor.float())
        data.append(packed + bytes(-len(packed) % ALIGNMENT))
        offset += len(data[-1])
    written = b"".join(head)
    return written + bytes(-len(written) % ALIGNMENT) + b"".join(data)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return metadata and tensors, packed ones unpacked to float32; raises AdapterError for a damaged file."""
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            tensors, pairs = reader.counts()
            metadata: dict[str, Any] = {}
            for key, value in reader.metadata(pairs):
                if key in metadata:
                    raise AdapterError(f"metadata {key} is there twice")
                metadata[key] = value
            return metadata, reader.tensors(tensors, metadata.get("general.alignment", ALIGNMENT))
    except (OSError, MemoryError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    except AdapterError as error:
        raise AdapterError(f"{path} is no whole GGUF file: {error}") from None


def value_of(path: Path, wanted: str) -> Any:
    """Return one value of the metadata of what may be a GGUF file of any size; None where there is none."""
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            _, pairs = reader.counts()
            return next((value for key, value in reader.metadata(pairs) if key == wanted), None)
    except (OSError, MemoryError, AdapterError):
        return None


class _Reader:
    """A file from its start on. Nothing is believed of it before that many bytes are there."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; raises AdapterError when there are fewer."""
        self._advance(count)
        data = self.file.read(count)
        if len(data) != count:
            raise AdapterError("it ends too early")
        return data

    def _advance(self, count: int) -> None:
        if count > self.size - self.position:
            raise AdapterError(f"it ends at byte {self.size}, and should go on to {self.position + count}")
        self.position += count

    def skip(self, count: int) -> None:
        """Pass over bytes; raises AdapterError when there are fewer."""
        self._advance(count)
        self.file.seek(self.position)

    def number(self, letter: str) -> Any:
        """Return the next number, of one of `struct`'s types."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise AdapterError(f"{data[:40]!r} is no text") from None

    def counts(self) -> tuple[int, int]:
        """Return the numbers of tensors and of pairs of metadata."""
        if self.take(4) != MAGIC:
            raise AdapterError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, _VERSION):
            raise AdapterError(f"it is of version {version}; 2 and 3 can be read, with the lowest byte first")
        return self.number("Q"), self.number("Q")

    def metadata(self, count: int) -> Iterator[tuple[str, Any]]:
        """Yield the keys and values."""
        for _ in range(count):  # each takes bytes, and these come to an end
            key, kind = self.string(), self.number("I")
            yield key, self._array() if kind == _ARRAY else self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        raise AdapterError(f"metadata is of the unknown type {kind}")

    def _array(self) -> Array:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _NUMBERS:
            self.skip(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        else:
            raise AdapterError(f"metadata is a list of the unknown type {kind}")
        return Array(count)

    def tensors(self, count: int, alignment: Any) -> dict[str, Tensor]:
        """Return the tensors, which lie one after the other, each at a multiple of the alignment."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise AdapterError(f"general.alignment is {alignment!r}")
        found: dict[str, tuple[_Kind, list[int]]] = {}
        end = 0
        for _ in range(count):
            name = self.string()
            if name in found or len(name.encode()) > _LONGEST_NAME:
                raise AdapterError(f"tensor {name[:80]} {'is there twice' if name in found else 'has too long a name'}")
            dimensions = self.number("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise AdapterError(f"tensor {name} has {dimensions} dimensions")
            sizes = [self.number("Q") for _ in range(dimensions)]
            kind, offset = self._kind(name), self.number("Q")
            if offset != end:  # an overlap would let a small file unpack to any size
                raise AdapterError(f"tensor {name} begins at {offset}, where {end} is the end of the one before")
            if 0 in sizes or sizes[0] % kind.block:
                raise AdapterError(f"tensor {name} has the sizes {enumerate_names(map(str, sizes))} in {kind.name}")
            found[name] = kind, sizes
            end += _aligned(math.prod(sizes) // kind.block * kind.size, alignment)
        if found:
            self.skip(_aligned(self.position, alignment) - self.position)
        values: dict[str, Tensor] = {}
        for name, (kind, sizes) in found.items():
            bytes_of = math.prod(sizes) // kind.block * kind.size
            try:
                values[name] = _decoded(bytearray(self.take(bytes_of)), kind).view(*reversed(sizes))
            except AdapterError as error:
                raise AdapterError(f"tensor {name}: {error}") from None
            self.skip(min(_aligned(bytes_of, alignment) - bytes_of, self.size - self.position))  # the last may lack it
        return values

    def _kind(self, name: str) -> _Kind:
        number = self.number("I")
        if number not in _KINDS:
            known = ", ".join(kind.name for kind in _KINDS.values())
            raise AdapterError(f"tensor {name} is stored as ggml's type {number}; adapters are {known}")
        return _KINDS[number]


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _decoded(data: bytearray, kind: _Kind) -> Tensor:
    """Return the numbers in some bytes, flat."""
    if kind.dtype is not None:
        return torch.frombuffer(data, dtype=kind.dtype)
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, kind.size)
    scales = blocks[:, :2].clone().view(torch.float16).float()  # (blocks, 1)
    return (scales * blocks[:, 2:].clone().view(torch.int8).float()).flatten()
