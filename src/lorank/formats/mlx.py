"""mlx-lm's adapter directory: `adapters.safetensors` and `adapter_config.json`.

The factors lie transposed, lora_a (in, rank) and lora_b (rank, out), and y = W x + scale · x a b: `scale` is all of the
factor, and there is one rank and one scale for all layers. A magnitude `m` (out,) beside them makes it DoRA.

mlx-lm builds adapters where `lora_parameters.keys` tells it to, and refuses tensors that then have no place. A key is
the name of a layer within a block, which adapts it in the last `num_layers` blocks, or the full name of a layer.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import AdapterError, raise_problems
from ..hosts import NoHost
from ..names import Names
from ..tied import Tie, sharing
from ..ties import Ties
from ..variants import LoRA, LowRank
from ..variants.dora import DoRA
from . import safetensors_file
from .content import Content, Given, LayerUpdate, as_json, nothing_to_tell, refuse_given, take_about
from .pairs import Pair, beyond_pairs, pairs_of, uniform
from .peft.config import read_config

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"

_SETTINGS = {"lora_parameters", "fine_tune_type"}  # which PEFT has not
_KINDS = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
_NO_DORA_EMBEDDING = "DoRA of an embedding has a magnitude for every token in mlx-lm, and one a column here"
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "tok_embeddings"}

# Beginnings of names that mlx-lm has changed, by transformers' model type: (there, in mlx-lm).
_RENAMED: dict[str, list[tuple[str, str]]] = {
    "gpt2": [("transformer.", "model.")],
    "gptj": [("transformer.", "model.")],
    "gpt_neox": [("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model."), ("lm_head", "model.embed_out")],
}
_MULTIMODAL = [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")]

NATIVE, WRITES, to_be_told = ("lora", "dora"), True, nothing_to_tell


def detect(path: Path) -> bool:
    """Tell whether the path is such a directory, or its safetensors file; PEFT's has the same `adapter_config.json`."""
    folder, file = _files(path)
    try:
        config = read_config(folder / CONFIG)
    except (AdapterError, OSError):
        config = {}
    if "peft_type" in config or file.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            return any(key.endswith(".lora_a") for key in tensors.keys()) or _is_named_so(path, config)  # noqa: SIM118
    except (SafetensorError, OSError):
        return _is_named_so(path, config)


def _is_named_so(path: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether all but the tensors speaks for mlx-lm: what they are, the reader will say."""
    return bool(_SETTINGS & config.keys()) if path.is_dir() else path.name == TENSORS


def _files(path: Path) -> tuple[Path, Path]:
    return (path, path / TENSORS) if path.is_dir() else (path.parent, path)


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter for a model with these module names, or for none; raises AdapterError for damaged files.

    given: `alpha` is used where the configuration has no scale, or two that contradict each other.
    """
    folder, file = _files(path)
    config = read_config(folder / CONFIG)
    if not file.is_file():
        raise AdapterError(f"{folder} has no {file.name}")
    _, tensors, _ = safetensors_file.read(file)
    spec = _read_spec(config, given)
    content = Content(spec)
    renamed = [(there, here) for here, there in _renamed(names.modules[""] if names is not None else None)]
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        layer, _, leaf = key.rpartition(".")
        if layer and leaf in _KINDS:
            found = layers.setdefault(_rename(layer, renamed), {})
            if leaf in found:
                content.problems.append(f"{key} is in the file twice, under two names of its layer")
            found[leaf] = tensors[key]
        else:
            content.problems.append(f"{key} is no tensor of an adapter of mlx-lm")
    for layer, found in layers.items():
        lookup = _is_lookup(layer, names)
        wrong = _problem(found, spec) or (_NO_DORA_EMBEDDING if lookup and "m" in found else None)
        if wrong:
            content.problems.append(f"{layer}: {wrong}")
        else:
            named = {
                _KINDS[leaf]: tensor.mT.contiguous() if tensor.dim() > 1 else tensor for leaf, tensor in found.items()
            }
            content.updates[layer] = LayerUpdate(spec, {"weight": named}, lookup=lookup)
    if names is not None:
        content.tied = _tied_heads(content, names)
    take_about(content, config.get("about", {}))
    return content


def _read_spec(config: Mapping[str, Any], given: Given) -> LowRank:
    """Return the one spec of all layers; raises AdapterError for what is no low-rank adapter."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise AdapterError("all weights were trained (fine_tune_type is full): this is a model, and no adapter")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{CONFIG}: fine_tune_type is {kind!r}; lora and dora can be read")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"{CONFIG}: lora_parameters is {parameters!r}, and has to say rank and scale")
    values: list[Any] = [parameters.get(name) for name in ("rank", "scale", "alpha", "dropout")]
    rank, scale, alpha, dropout = values
    wrong = [] if isinstance(rank, int) and not isinstance(rank, bool) else [f"rank is {rank!r}"]
    wrong += [
        f"{name} is {value!r}"
        for name, value in (("scale", scale), ("alpha", alpha), ("dropout", dropout))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    raise_problems(f"{CONFIG}: lora_parameters cannot be read", wrong)
    said = scale is not None and alpha in (None, rank)
    refuse_given(given, alpha=said)
    if scale is None or not said:
        if given.alpha is None and scale is None:
            raise AdapterError(f"{CONFIG}: lora_parameters has no scale, the factor of the update: pass alpha")
        if given.alpha is None:
            raise AdapterError(
                f"{CONFIG}: lora_parameters has alpha {alpha!r} beside scale {scale!r}. mlx-lm multiplied scale with "
                "alpha / rank once, and ignores alpha now: pass the alpha that was meant, scale · rank"
            )
        scale = given.alpha / max(rank, 1)
    variant = DoRA if kind == "dora" or config.get("use_dora") is True else LoRA
    try:
        return variant(rank, alpha=float(scale) * rank, dropout=float(dropout or 0))
    except OverflowError:
        raise AdapterError(f"{CONFIG}: lora_parameters has numbers that are too large") from None


def _problem(found: Mapping[str, Tensor], spec: LowRank) -> str | None:
    """Return what is wrong with the tensors of one layer."""
    wanted = ["lora_a", "lora_b", "m"] if isinstance(spec, DoRA) else ["lora_a", "lora_b"]
    missing = [leaf for leaf in wanted if leaf not in found]
    if missing:
        return f"the file lacks {' and '.join(missing)}"
    if len(found) > len(wanted):
        return "the file has a magnitude m, which is DoRA's, and fine_tune_type is not dora"
    a, b = found["lora_a"], found["lora_b"]
    if a.dim() == b.dim() == 3:
        return "factors of stacked experts (mlx-lm's switch layers) cannot be read: transformers stacks them otherwise"
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        return f"lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} are no pair of factors"
    if a.shape[1] != spec.rank:
        return f"its factors have rank {a.shape[1]}, {CONFIG} says {spec.rank}"
    if "m" in found and found["m"].shape != b.shape[1:]:
        return f"m is {tuple(found['m'].shape)}, and lora_b has {b.shape[1]} columns"
    return None


def _is_lookup(layer: str, names: Names | None) -> bool:
    """Tell whether a layer is an embedding: of a model by its host, otherwise by its name."""
    if names is None or layer not in names.modules:
        return layer.rpartition(".")[2] in _EMBEDDINGS
    try:
        return names.host(layer).lookup
    except NoHost:
        return False


def _tied_heads(content: Content, names: Names) -> dict[str, Tie]:
    """Return the heads that have the weight of an adapted embedding: mlx-lm runs those with the same update."""
    ties = Ties(names.modules[""])
    embeddings = [name for name, update in content.updates.items() if update.lookup and name in names.modules]
    return {
        head: Tie(name, transposed=True)
        for name in embeddings
        for head in sharing(name, "weight", names.host(name), names, ties)
        if head not in content.updates and not _is_lookup(head, names)
    }


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter into a directory. Other files there stay as they are; returns what was folded or padded."""
    if path.exists() and not path.is_dir():
        raise AdapterError(f"cannot save: {path} is a file; an adapter is a directory")
    names = Names(model) if model is not None else None
    problems = beyond_pairs(content) + _clashes(path)
    pairs, magnitudes = _gathered(content, problems)
    if names is not None:
        problems += _untied(pairs, content, names)
    if "" in pairs or not (pairs or problems):
        problems.append("mlx-lm adapts layers of a model, and this is " + ("one layer" if pairs else "none"))
    raise_problems("mlx-lm's format cannot hold this adapter", problems)
    rank, scale, pairs, notes = uniform(pairs)
    renamed = _renamed(model)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        there = _rename(name, renamed)
        tensors[f"{there}.lora_a"], tensors[f"{there}.lora_b"] = pair.A.T, pair.B.T
        if name in magnitudes:
            tensors[f"{there}.m"] = magnitudes[name]
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        notes.append("written in float32: Apple's graphics processors have no float64")
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
    num_layers, keys = _keys(list(pairs), names, renamed)
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": getattr(content.spec, "dropout", 0.0),
            "keys": keys,
        },
    }
    if content.about:
        config["about"] = json.loads(as_json(content.about))
    text = json.dumps(config, indent=4, sort_keys=True) + "\n"
    safetensors_file.write_atomically({path / TENSORS: safetensors_file.pack(tensors), path / CONFIG: text.encode()})
    return notes


def _clashes(path: Path) -> list[str]:
    """Return why the directory cannot be written into: PEFT has the same name for its configuration."""
    try:
        peft = (path / CONFIG).is_file() and "peft_type" in read_config(path / CONFIG)
    except (AdapterError, OSError):
        return []
    return [f"{path} holds an adapter of PEFT, whose {CONFIG} has the same name"] if peft else []


def _gathered(content: Content, problems: list[str]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return the factors and the magnitudes of DoRA, by layer; what mlx-lm has no layer for goes into `problems`."""
    specs = [update.spec_of(part) for update in content.updates.values() for part in update.tensors]
    if any(isinstance(spec, DoRA) for spec in specs):
        return _directions(content, problems)
    pairs = pairs_of(content, problems)
    for name, tie in content.tied.items():
        if tie.transposed and tie.source in pairs:  # the head has no layer of its own there
            pairs.pop(name if pairs[tie.source].lookup else tie.source)
    return pairs, {}


def _directions(content: Content, problems: list[str]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return the factors and magnitudes of DoRA, which has no form without its base."""
    pairs: dict[str, Pair] = {}
    magnitudes: dict[str, Tensor] = {}
    layers = content.updates | {name: content.updates[tie.source] for name, tie in content.tied.items()}
    for name, update in layers.items():
        tensors, spec = update.tensors.get("weight"), update.spec_of(next(iter(update.tensors)))
        if not isinstance(spec, DoRA):
            problems.append(f"{name} is {spec.variant}, others are DoRA: mlx-lm reads one method for all layers")
        elif tensors is None or tensors["A"].dim() != 2 or any(len(shape) != 2 for shape in update.shapes.values()):
            problems.append(f"{name}: mlx-lm has DoRA of whole linear layers alone")
        elif update.lookup:
            problems.append(f"{name}: {_NO_DORA_EMBEDDING}")
        else:
            pairs[name] = Pair(tensors["A"], tensors["B"], update.spec.scale)
            magnitudes[name] = tensors["magnitude"]
    return pairs, magnitudes


def _untied(pairs: Mapping[str, Pair], content: Content, names: Names) -> list[str]:
    """Return the layers whose weight another one shares that is not adapted with them: mlx-lm has them as one."""
    ties = Ties(names.modules[""])
    mirrored = content.tied.keys() | {tie.source for tie in content.tied.values()}
    problems = []
    for name in pairs.keys() - mirrored:
        try:
            others = sharing(name, "weight", names.host(name), names, ties)
        except NoHost:
            continue
        if others:
            problems.append(f"{name} shares its weight with {others[0]}, and mlx-lm adapts both or none (tie=True)")
    return sorted(problems)


def _keys(layers: list[str], names: Names | None, renamed: list[tuple[str, str]]) -> tuple[int, list[str]]:
    """Return `num_layers` and `keys` for which mlx-lm adapts these layers and no others.

    Names within a block, as mlx-lm itself writes them, where the last blocks are adapted alike; full names otherwise.
    """
    in_blocks: dict[str, dict[int, set[str]]] = {}  # by the list of blocks and the number in it
    outside = []
    for layer in layers:
        found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", layer)
        if found:
            in_blocks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
        else:
            outside.append(_rename(layer, renamed))
    if len(in_blocks) == 1 and names is not None:
        ((stack, blocks),) = in_blocks.items()
        total = sum(name.rpartition(".")[0] == stack for name in names.modules)
        last = set(range(total - len(blocks), total))
        within = next(iter(blocks.values()))
        if blocks.keys() == last and all(adapted == within for adapted in blocks.values()):
            return len(blocks), sorted(within) + sorted(outside)
    # A number of blocks has no meaning for full names, none of which is one within a block.
    return 0, sorted(_rename(layer, renamed) for layer in layers)


def _renamed(model: nn.Module | None) -> list[tuple[str, str]]:
    """Return how beginnings of names are changed for mlx-lm: (of the model, there); the longest counts."""
    config = getattr(model, "config", None)
    if model is None or config is None:
        return []
    kind = str(getattr(config, "model_type", ""))
    multimodal = hasattr(config, "text_config") and any(
        name.startswith("model.language_model.") for name, _ in model.named_modules()
    )
    return _RENAMED.get(kind, _MULTIMODAL if multimodal and kind != "gemma3n" else [])


def _rename(name: str, renamed: list[tuple[str, str]]) -> str:
    for before, after in sorted(renamed, key=lambda pair: -len(pair[0])):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
