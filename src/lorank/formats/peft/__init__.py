"""PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

The tensors say where an adapter sits; the configuration says with which scale. PEFT reads these files with the same
outputs (`tests/interop`); a tool that knows one rank and scale per file needs an adapter without exceptions. Beside
that the safetensors header carries lorank's own account of the adapter; see `header.py`.
"""

import json
from pathlib import Path

from torch import Tensor, nn

from ...errors import AdapterError
from ...names import Names
from .. import safetensors_file
from ..content import Content, Given, nothing_to_tell, outputs_of_head, refuse_given
from ..pickles import read_pickle
from .config import check_config, encode_config, read_config
from .header import apply_account, encode_header, read_header
from .methods import METHODS
from .tensors import decode, encode_tensors

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

WRITES, to_be_told = True, nothing_to_tell
# All that it is written as: lorank reads PiSSA and others that are LoRA once trained as what they were.
NATIVE = tuple(spec.variant for method in METHODS.values() for spec in method.specs)

_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "classification"}


def detect(path: Path) -> bool:
    """Tell whether the path is an adapter in PEFT's layout: a directory, or its safetensors file."""
    if path.is_dir():
        return (path / CONFIG).is_file() and (_has_tensors(path) or _says_peft(path / CONFIG))
    return path.suffix == ".safetensors" and (path.name == TENSORS or _says_peft(path.parent / CONFIG))


def _has_tensors(folder: Path) -> bool:
    return (folder / TENSORS).is_file() or (folder / PICKLE).is_file()


def _says_peft(config: Path) -> bool:
    """Tell whether a configuration is PEFT's: other tools have files of this name too."""
    if not config.is_file():
        return False
    try:
        return "peft_type" in read_config(config)
    except AdapterError:
        return True  # damaged, which reading it will say


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter into a directory. Other files there stay as they are."""
    if path.exists() and not path.is_dir():
        raise AdapterError(f"cannot save: {path} is a file; an adapter is a directory")
    packed = safetensors_file.pack(encode_tensors(content))
    packed = safetensors_file.with_metadata(packed, encode_header(content, packed))
    text = json.dumps(encode_config(content, model), indent=2, sort_keys=True) + "\n"
    # The tensors go first: their header alone says what they are, should the second file never arrive.
    files = {path / TENSORS: packed, path / CONFIG: text.encode()}
    safetensors_file.write_atomically(files)
    return []


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model with these module names, or for none; raises AdapterError for damaged files.

    Without a model, parts of fused projections stay one pair of factors.
    """
    refuse_given(given)
    folder, file = (path, path / TENSORS) if path.is_dir() else (path.parent, path)
    config = read_config(folder / CONFIG)
    if file.is_file():
        packed, tensors, metadata = safetensors_file.read(file)
        account = read_header(metadata, packed, file)
    else:
        tensors, account = _read_pickle(folder, given.allow_pickle), None
    method, problems, remarks = check_config(config)
    content = decode(config, method, tensors, account, names or Names(nn.Module()))
    if account is not None:
        apply_account(account, content, method, names)
    content.base_model = config.get("base_model_name_or_path") or None
    if content.task is None:
        content.task = _TASKS.get(config.get("task_type") or "")
        if content.task == "classification" and outputs_of_head(content) == 1:
            content.task = "regression"  # PEFT has one name for both
    content.problems[:0] = problems
    content.remarks += remarks
    return content


def _read_pickle(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of an `adapter_model.bin`, which PEFT wrote before it wrote safetensors."""
    file = folder / PICKLE
    if not file.is_file():
        raise AdapterError(f"{folder} has no {TENSORS}")
    tensors = read_pickle(file, allow_pickle)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{file} holds no dictionary of tensors")
    return tensors
