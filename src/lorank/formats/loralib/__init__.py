"""loralib's files: a pickle (`.pt`, `.bin`) of a dictionary with `<layer>.lora_A` and `<layer>.lora_B`.

This is what `torch.save(loralib.lora_state_dict(model))` leaves, and how the adapters of the paper were published. Rank
is known by the tensors' shapes; alpha, and which parts of a fused projection are adapted, its reader has to know. What
the layers make of their factors stands in `factors`, and what else such files hold in `rest`.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError, enumerate_names, raise_problems
from ...names import Names
from ...variants import LoRA
from ..content import Content, Given, refuse_given
from ..pickles import head, read_pickle, refusal
from ..safetensors_file import write_atomically
from .factors import decode_layer
from .rest import decode_rest
from .writing import encode, to_be_told

__all__ = ["decode", "detect", "read", "to_be_told", "write"]

_NAMES = re.compile(rb"lora_[AB](?![._])")  # PEFT's names go on after these
_FACTORS = {"lora_A": "A", "lora_B": "B"}

NATIVE, WRITES = ("lora",), True


def detect(path: Path) -> bool:
    """Tell whether the path is a pickle with loralib's names in it. It is not opened for that."""
    start = head(path)
    return start is not None and _NAMES.search(start) is not None and b".parametrizations." not in start


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter as a file that `load_state_dict(..., strict=False)` of a model with loralib's layers takes.

    What that model needs to be made with stands in the notes: alpha, ranks, and the parts of fused projections.
    """
    if path.is_dir():
        raise AdapterError(f"cannot save: {path} is a directory; loralib's adapters are files")
    tensors, notes = encode(content, model)
    buffer = io.BytesIO()  # named after no file, so that the bytes are the same everywhere
    torch.save(tensors, buffer)
    write_atomically({path: buffer.getvalue()})
    return notes


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model with these module names, or for none; raises AdapterError for damaged files.

    given: `alpha` is that of loralib's layers; `parts` are those that their `enable_lora` names, by the model's names
        of them ("q", "v") or their numbers ("0", "2"), of projections that are not adapted as a whole.

    Without a model all layers are taken for linear ones.
    """
    wrong = [] if given.allow_pickle else [refusal(path)]
    if given.alpha is None:
        wrong.append("alpha is not stored in loralib's files: pass alpha= (--alpha), the lora_alpha of its layers")
    raise_problems("a file of loralib", wrong)
    assert given.alpha is not None, "without it this was refused"
    LoRA(rank=1, alpha=given.alpha)  # raises for what is no alpha
    remarks: list[str] = []
    stored = _state_dict(read_pickle(path, given.allow_pickle), remarks)
    content = decode(stored, names, given)
    content.remarks = remarks + content.remarks
    return content


def decode(stored: Mapping[str, Any], names: Names | None, given: Given) -> Content:
    """Return what a state dict says; what is wrong with it goes into the content's `problems`."""
    tensors, problems = _plain_names(stored, names)
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in _FACTORS:
            factors.setdefault(layer, {})[_FACTORS[leaf]] = tensor
        else:
            rest[key] = tensor
    content = Content(LoRA(), problems=problems)
    in_parts = names is None  # which layers have some, the model tells
    for layer, pair in factors.items():
        try:
            content.updates[layer] = update = decode_layer(layer, pair, names, given)
            in_parts |= update.by_parts or update.tensors["weight"]["B"] is not pair["B"]
        except AdapterError as error:
            problems.append(f"{layer}: {error}")
    refuse_given(given, alpha=False, parts=not (in_parts or problems))
    decode_rest(rest, set(factors), names, content)
    if content.updates:
        content.spec = Counter(update.spec for update in content.updates.values()).most_common(1)[0][0]
    if content.biases:
        content.bias = "adapted" if content.biases.keys() <= content.updates.keys() else "all"
    return content


def _state_dict(stored: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    """Return the dictionary with the factors: the file's own, or one in it such as `model_state_dict`."""
    found: dict[str, dict[str, Any]] = {}

    def search(name: str, inside: dict[str, Any]) -> None:
        if any(key.rpartition(".")[2] in _FACTORS and isinstance(value, Tensor) for key, value in inside.items()):
            found[name] = inside
        for key, value in inside.items():
            if isinstance(value, dict):
                search(f"{name}.{key}" if name else key, value)

    search("", stored)
    if not found:
        raise AdapterError("no tensor in it is called lora_A or lora_B")
    if len(found) > 1:
        names = [name or "the outermost one" for name in found]
        raise AdapterError(f"several dictionaries in it hold factors: {enumerate_names(names)}")
    name, chosen = next(iter(found.items()))
    beside = [key for key in stored if key != name.partition(".")[0]] if name else []
    beside += [key for key, value in chosen.items() if not isinstance(value, Tensor)]
    if beside:
        remarks.append(f"the file holds {enumerate_names(beside)} beside the adapter; that was ignored")
    return chosen


def _plain_names(stored: Mapping[str, Any], names: Names | None) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without what wrappers put in front of their names, and problems."""
    tensors = {key: value for key, value in stored.items() if isinstance(value, Tensor)}
    known = names.modules if names is not None else {}
    wrapped = all(key.startswith("module.") for key in tensors) and "module" not in known  # DataParallel
    plain: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        name = (key.removeprefix("module.") if wrapped else key).replace("_orig_mod.", "")  # torch.compile
        if name in plain:
            problems.append(f"{key} is in the file twice, with and without the name of a wrapper")
        plain[name] = tensor
    return plain, problems
