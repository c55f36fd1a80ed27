"""Pickles of PyTorch, opened where they can do no harm: a pickle is a program, and may be anybody's.

PyTorch's `weights_only` unpickler runs nothing but what makes tensors. It runs in a process of its own (`unpickling`)
with limits of memory, time and disk, and what comes back are a safetensors file and JSON, which are only data.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError, AdapterWarning, enumerate_names
from . import safetensors_file, unpickling

_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's archive, and bare pickles
_HEAD = 4 << 20  # bytes in which all names of an honest file stand
_MEBIBYTE = 1 << 20


def refusal(path: Path) -> str:
    """Return why a pickle is not opened unasked."""
    return f"{path} is a pickle: pass allow_pickle=True if you trust its origin (on the command line --allow-pickle)"


def head(path: Path) -> bytes | None:
    """Return the beginning of a pickle, where the names in it stand, unopened; None for what is no pickle."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with path.open("rb") as file:
            start = file.read(_HEAD)
    except OSError:
        return None
    return start if start.startswith(_MAGIC) else None


def read_pickle(path: Path, allow: bool, seconds: float | None = None) -> dict[str, Any]:
    """Return what a pickle of PyTorch holds: dictionaries with tensors, numbers, texts and None in them.

    allow: whether the user allows it.
    seconds: after which to give up; by default what a file of this size needs on a slow machine.

    Tensors that were one in memory are one here. Other values, and those under keys that are no text, are left out;
    an AdapterWarning names them. Raises AdapterError where it is not allowed, and for a file that is damaged, not a
    dictionary, or wants anything else than to be read.
    """
    if not allow:
        raise AdapterError(refusal(path))
    if not path.is_file():
        raise AdapterError(f"{path} is not a file")
    size = path.stat().st_size
    request = {
        "file": str(path.absolute()),
        "paths": [entry for entry in sys.path if Path(entry).is_absolute()],
        "dtypes": {str(dtype): name for dtype, name in safetensors_file.DTYPES.items()},
        "seconds": seconds if seconds is not None else 120 + size / (10 * _MEBIBYTE),
        "most_written": 2 * size + 64 * _MEBIBYTE,
        "most_memory": 4 * size + 1024 * _MEBIBYTE,
    }
    with tempfile.TemporaryDirectory(prefix="lorank-") as name:
        folder = Path(name)
        _run(path, folder, request)
        found, dropped = _result(path, folder, request["most_written"])
    if dropped:
        what = f"{path}: {enumerate_names(dropped)} is neither tensor nor number nor text, and was left out"
        warnings.warn(what, AdapterWarning, stacklevel=2)
    return found


def _run(path: Path, folder: Path, request: dict[str, Any]) -> None:
    """Run the process that opens the file, in a folder for what it writes."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise AdapterError(f"{path} is a pickle, and there is no Python here to open it apart from this program")
    # No device, no threads that take memory, and nothing that changes how PyTorch reads.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        with (folder / "errors").open("wb") as errors:
            finished = subprocess.run(
                [sys.executable, "-I", str(Path(unpickling.__file__).absolute())],
                input=json.dumps(request).encode(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=folder,
                env=environment,
                timeout=request["seconds"],
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise AdapterError(f"{path} cannot be read: after {request['seconds']:g} s it was given up") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: no process for it ({error})") from None
    if finished.returncode < 0:
        how = signal.strsignal(-finished.returncode)
        raise AdapterError(f"{path} cannot be read: the process that opened it was ended ({how})")
    if finished.returncode:
        with (folder / "errors").open("rb") as errors:
            said = errors.read(_MEBIBYTE).decode(errors="replace").splitlines() or ["it said nothing"]
        raise AdapterError(f"{path} cannot be read: the process that opened it failed ({said[-1][:300]})")


def _result(path: Path, folder: Path, most: int) -> tuple[dict[str, Any], list[str]]:
    """Return what the process has read, and what it left out; both are trusted no more than the file was."""
    result, tensors = folder / "result.json", folder / "tensors.safetensors"
    try:
        if max(result.stat().st_size, tensors.stat().st_size if tensors.exists() else 0) > most:
            raise ValueError("it wrote too much")
        found = json.loads(result.read_text(encoding="ascii"))
        if "error" in found:
            raise AdapterError(f"{path} cannot be read: {found['error']}")
        _, named, _ = safetensors_file.read(tensors)
        return _rebuilt(found["tree"], named), [str(name) for name in found["dropped"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: the process that opened it gave no result ({error})") from None


def _rebuilt(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "items" in node:
        return {key: _rebuilt(child, tensors) for key, child in node["items"].items()}
    return tensors[str(node["tensor"])] if "tensor" in node else node["value"]
