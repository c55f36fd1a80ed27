"""torchtune's own adapter file: `adapter_model.pt` or `adapter_0.pt`, a pickled state dict. It can be read alone.

Names are torchtune's (layers.0.attn.q_proj.lora_a.weight), A and B lie as here, and the numerator of the scale is not
among them: it is in the `adapter_config.json` beside the file, which torchtune writes for PEFT, or is given.

torchtune has queries and keys of Llama, Mistral and Gemma in Meta's order, with the halves of each head interleaved.
Rows of B and magnitudes of these layers are put in transformers' order; which that is, the model tells.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError, enumerate_names
from ..names import Names, label_of
from ..variants import LoRA, LowRank
from ..variants.dora import DoRA
from .content import Content, Given, LayerUpdate, nothing_to_tell, refuse_given
from .peft.config import read_config
from .pickles import head, read_pickle
from .rotation import heads_of, unrotated

CONFIG, TENSORS = "adapter_config.json", "adapter_model.pt"
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")

_KEY = re.compile(r"(?:layers\.(\d+)\.(attn|mlp)\.)?(\w+)\.(lora_a\.weight|lora_b\.weight|magnitude)")
_KINDS = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "magnitude"}
_PLAIN = {
    "attn.q_proj": ("self_attn.q_proj", "weight"),
    "attn.k_proj": ("self_attn.k_proj", "weight"),
    "attn.v_proj": ("self_attn.v_proj", "weight"),
    "attn.output_proj": ("self_attn.o_proj", "weight"),
    "mlp.w1": ("mlp.gate_proj", "weight"),
    "mlp.w2": ("mlp.down_proj", "weight"),
    "mlp.w3": ("mlp.up_proj", "weight"),
}
_FUSED = _PLAIN | {
    "attn.q_proj": ("self_attn.qkv_proj", "q"),
    "attn.k_proj": ("self_attn.qkv_proj", "k"),
    "attn.v_proj": ("self_attn.qkv_proj", "v"),
    "mlp.w1": ("mlp.gate_up_proj", "gate"),
    "mlp.w3": ("mlp.gate_up_proj", "up"),
}


@dataclass(frozen=True)
class _Family:
    """Where layers of torchtune's are in transformers' models: (name within a block, part)."""

    layers: dict[str, tuple[str, str]]
    interleaved: bool = False  # torchtune has rows of queries and keys in another order


# By transformers' model type. Phi-4 is a phi3; torchtune's export for PEFT permutes rows of Qwen's too, and should not.
_FAMILIES = {
    "llama": _Family(_PLAIN, interleaved=True),
    "mistral": _Family(_PLAIN, interleaved=True),
    "gemma": _Family(_PLAIN, interleaved=True),
    "gemma2": _Family(_PLAIN, interleaved=True),
    "qwen2": _Family(_PLAIN),
    "qwen3": _Family(_PLAIN),
    "phi3": _Family(_FUSED),
}

NATIVE, WRITES, to_be_told = (), False, nothing_to_tell  # see `write`


def detect(path: Path) -> bool:
    """Tell whether the path is such a file, or a directory with one and without its export for PEFT."""
    if path.is_dir():
        return not any((path / name).is_file() for name in _PEFT) and any(map(_is_ours, _candidates(path)))
    return _is_ours(path)


def _is_ours(path: Path) -> bool:
    start = head(path)
    return start is not None and b".lora_a.weight" in start and b".lora_b.weight" in start


def _candidates(folder: Path) -> list[Path]:
    """Return the files of a directory that have a name of torchtune's."""
    return [path for path in (folder / TENSORS, *sorted(folder.glob("adapter_[0-9]*.pt"))) if path.is_file()]


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Raise AdapterError: nothing but torchtune reads its files, and it reads them to go on with its own training."""
    raise AdapterError(
        "lorank does not write torchtune's files, which torchtune alone reads, to go on with its own training. What it "
        'writes for others is PEFT\'s layout: format="peft"'
    )


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model of transformers, or for none; raises AdapterError for damaged files.

    given: `alpha` where no `adapter_config.json` beside the file has it, and `allow_pickle`.

    Without a model, layers keep torchtune's names and order of rows, and the content needs the model.
    """
    file = _file(path)
    config = read_config(file.parent / CONFIG) if (file.parent / CONFIG).is_file() else {}
    alpha = _alpha(config, given)
    content = Content(LoRA())
    model = None if names is None else _Model.of(names)
    if model is None:
        content.needs_model = "torchtune has other names and another order of rows than the model: give the model"
    places: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in read_pickle(file, given.allow_pickle).items():
        match = _KEY.fullmatch(key)
        place = None
        if match is not None:
            place = (key.removesuffix(f".{match[4]}"), "weight") if model is None else model.place(match)
        if match is None or place is None or not isinstance(tensor, Tensor):
            content.problems.append(f"{key} is no tensor of an adapter in a model of this kind")
            continue
        kind = _KINDS[match[4]]
        heads = 0 if model is None or kind == "A" else model.heads(match)
        try:
            tensor = unrotated(tensor, heads) if heads else tensor
        except AdapterError as error:
            content.problems.append(f"{key}: {error}")
        places.setdefault(place, {})[kind] = tensor
    for (layer, part), tensors in places.items():
        bias = None if names is None else getattr(names.modules.get(layer), "bias", None)
        wrong = _problem(tensors, config, bias is not None)
        if wrong:
            content.problems.append(f"{label_of(layer, part)}: {wrong}")
            continue
        spec = _spec(tensors, alpha)
        update = content.updates.setdefault(layer, LayerUpdate(spec, {}, by_parts=part != "weight"))
        update.tensors[part] = tensors
        if spec != update.spec:
            update.specs[part] = spec
    if content.updates:
        content.spec = next(iter(content.updates.values())).spec
    content.base_model = config.get("base_model_name_or_path") or None
    return content


def _file(path: Path) -> Path:
    """Return the file that a path means; raises AdapterError for a directory with several."""
    if not path.is_dir():
        return path
    found = [file for file in _candidates(path) if _is_ours(file)]
    if len(found) != 1:
        raise AdapterError(f"{path} has the adapters {enumerate_names(file.name for file in found)}: name one of them")
    return found[0]


def _alpha(config: Mapping[str, Any], given: Given) -> float:
    """Return the numerator of the scale."""
    said = config.get("lora_alpha")
    refuse_given(given, alpha=said is not None)
    alpha = given.alpha if said is None else said
    if alpha is None:
        raise AdapterError(f"torchtune keeps alpha beside the file, in {CONFIG}, which is not there: pass alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterError(f"{CONFIG}: lora_alpha is {alpha!r}")
    try:
        return float(alpha)
    except OverflowError:
        raise AdapterError(f"{CONFIG}: lora_alpha is too large") from None


@dataclass(frozen=True)
class _Model:
    """A model of transformers, and where torchtune's layers are in it."""

    names: Names
    family: _Family
    prefix: str  # of the names of its blocks

    @classmethod
    def of(cls, names: Names) -> "_Model":
        """Return a model; raises AdapterError where it is not known where torchtune's layers are in it."""
        kind = getattr(getattr(names.modules[""], "config", None), "model_type", None)
        family = _FAMILIES.get(str(kind))
        if family is None:
            what = f"a model of type {kind}" if kind else "a model that is none of transformers'"
            known = ", ".join(_FAMILIES)
            raise AdapterError(f"where torchtune's layers are in {what} is not known; it is for {known}")
        for prefix in ("model.", ""):
            if f"{prefix}layers.0" in names.modules:
                return cls(names, family, prefix)
        raise AdapterError(f"this model is of type {kind}, and has no blocks where those have them (model.layers)")

    def place(self, key: re.Match[str]) -> tuple[str, str] | None:
        """Return the layer and part that a tensor belongs to; None where there is no such layer."""
        number, owner, name, _ = key.groups()
        if number is None:
            return ("score" if "score" in self.names.modules else "lm_head", "weight") if name == "output" else None
        layer, part = self.family.layers.get(f"{owner}.{name}", (None, ""))
        return None if layer is None else (f"{self.prefix}layers.{number}.{layer}", part)

    def heads(self, key: re.Match[str]) -> int:
        """Return of how many heads the rows of a tensor are rotated, 0 where none are."""
        if not self.family.interleaved or key[3] not in ("q_proj", "k_proj"):
            return 0
        heads = heads_of(self.names.modules[""])
        if heads is None:
            raise AdapterError("the model's configuration does not say how many heads it has, by which rows are sorted")
        return heads.queries if key[3] == "q_proj" else heads.keys


def _problem(tensors: Mapping[str, Tensor], config: Mapping[str, Any], has_bias: bool) -> str | None:
    """Return what is wrong with the tensors of one layer."""
    missing = {"A", "B"} - tensors.keys()
    if missing:
        return f"the file lacks lora_{min(missing).lower()}"
    A, B = tensors["A"], tensors["B"]
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not len(A):
        return f"lora_a {tuple(A.shape)} and lora_b {tuple(B.shape)} are no pair of factors"
    if config.get("r") not in (None, len(A)):
        return f"its factors have rank {len(A)}, {CONFIG} says {config['r']!r}"
    if "magnitude" in tensors and has_bias:
        return "torchtune's DoRA scales the bias with the rows of the weight, which DoRA does nowhere else"
    return None


def _spec(tensors: Mapping[str, Tensor], alpha: float) -> LowRank:
    variant = DoRA if "magnitude" in tensors else LoRA
    return variant(rank=len(tensors["A"]), alpha=alpha)
