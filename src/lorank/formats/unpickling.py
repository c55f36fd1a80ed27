"""The process that opens a pickle for `pickles`: a file in, tensors and a tree of names out.

It is run as a script and imports nothing of lorank, so that it starts wherever lorank itself was found.
"""

import ctypes
import json
import os
import pickle
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

DEEPEST = 16  # dictionaries in one another
MOST_VALUES = 1_000_000
_NESTED = f"it has dictionaries nested more than {DEEPEST} deep"


def main() -> None:
    """Read a request from the standard input; leave `result.json` and `tensors.safetensors` in the current folder."""
    request = json.load(sys.stdin)
    sys.path[:] = request["paths"]
    try:
        result = _opened(request)
    except Exception as error:  # whatever a damaged file brings about is the answer
        result = {"error": _reason(error)}
    Path("result.json").write_text(json.dumps(result), encoding="ascii")


def _opened(request: dict[str, Any]) -> dict[str, Any]:
    import torch  # found only now that the request has told where

    torch.set_num_threads(1)
    _limit(request)
    stored = torch.load(request["file"], map_location="cpu", weights_only=True)
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, not a dictionary")
    tree = Tree(request["dtypes"])
    described = tree.describe(stored, "", 0)
    tree.write(Path("tensors.safetensors"), request["most_written"])
    return {"tree": described, "dropped": tree.dropped}


def _limit(request: dict[str, Any]) -> None:
    """Take away what no honest file needs, as far as the platform can: memory, processor time, and disk."""
    with suppress(ImportError):  # not on Windows
        import resource

        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_CPU: int(request["seconds"]) + 1,
            resource.RLIMIT_FSIZE: request["most_written"],
        }
        with suppress(OSError):  # only Linux tells what is mapped so far: Python and PyTorch
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits[resource.RLIMIT_AS] = pages * os.sysconf("SC_PAGE_SIZE") + request["most_memory"]
        for limit, value in limits.items():
            lower = [held for held in resource.getrlimit(limit) if held != resource.RLIM_INFINITY and held < value]
            value = min([value, *lower])
            with suppress(ValueError, OSError):  # a platform may know a limit and not have it
                resource.setrlimit(limit, (value, value))


class Tree:
    """What a pickle holds, as JSON: a dictionary, the number of a tensor, or a plain value at each place."""

    def __init__(self, dtypes: dict[str, str]):
        self.dtypes = dtypes  # {"torch.float32": "F32"}
        self.tensors: list[Any] = []
        self.dropped: list[str] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self._values = 0

    def describe(self, value: Any, path: str, depth: int) -> dict[str, Any] | None:
        """Return the JSON of a value; None for one of another kind, whose path is kept in `dropped`."""
        import torch

        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        if isinstance(value, dict):
            if depth == DEEPEST:
                raise ValueError(_NESTED)
            found = {}
            for key, child in value.items():
                if not isinstance(key, str):
                    self.dropped.append(f"{path}[{key!r:.40}]")
                    continue
                described = self.describe(child, f"{path}.{key}" if path else key, depth + 1)
                if described is not None:
                    found[key] = described
            return {"items": found}
        if isinstance(value, torch.Tensor):
            number = self._number(value)
            if number is not None:
                return {"tensor": number}
        elif value is None or isinstance(value, float | str) or (isinstance(value, int) and value.bit_length() <= 64):
            return {"value": value}
        self.dropped.append(path)
        return None

    def _number(self, tensor: Any) -> int | None:
        """Return a tensor's number, the same for those that are one in memory; None for what is no plain tensor."""
        import torch

        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or str(tensor.dtype) not in self.dtypes or tensor.is_neg():
            return None
        where = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if where not in self._numbers:
            self._numbers[where] = len(self.tensors)
            self.tensors.append(tensor.detach())
        return self._numbers[where]

    def write(self, path: Path, most: int) -> None:
        """Write the tensors into a safetensors file, under their numbers."""
        # Wider numbers first, so that every tensor starts at a multiple of its own size.
        order = sorted(enumerate(self.tensors), key=lambda item: (-item[1].element_size(), item[0]))
        header, offset = {}, 0
        for number, tensor in order:
            end = offset + tensor.numel() * tensor.element_size()
            shape, dtype = list(tensor.shape), self.dtypes[str(tensor.dtype)]
            header[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        if offset > most:
            raise ValueError(f"its tensors claim {offset} bytes, which is many times the file")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, tensor in order:
                whole = tensor.contiguous()
                if whole.numel():
                    file.write(ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()))


def _reason(error: Exception) -> str:
    """Return one line on an error, without PyTorch's advice to open the file in an unsafe way."""
    if isinstance(error, pickle.UnpicklingError) and isinstance(error.__context__, pickle.UnpicklingError):
        error = error.__context__  # what it was, before the advice was put around it
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "it needs far more memory than its size explains"
    first = text.strip().partition(". ")[0] or type(error).__name__
    return first.splitlines()[0][:300]


if __name__ == "__main__":
    main()
