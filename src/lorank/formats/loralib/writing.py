"""An adapter as the tensors that `loralib.lora_state_dict` of a model would hold, and how to make that model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import AdapterError, enumerate_names, raise_problems
from ...hosts import AdditiveHost, ConvHost, ConvTransposeHost, FusedHost
from ...names import Names
from ...ties import Ties
from ..content import Content, Given, LayerUpdate
from ..pairs import Pair, folded, pair_of
from .factors import equal_parts
from .reshaping import blocks, reshaped


@dataclass
class Written:
    """The factors of one of loralib's layers, which adds scale times what it makes of them."""

    A: Tensor
    B: Tensor
    rank: int  # its argument r
    scale: float
    kind: str = ""  # what else it has to be made with
    note: str = ""  # what had to be changed

    @property
    def alpha(self) -> float:
        """The layer's argument lora_alpha, of which it makes lora_alpha / r."""
        return float(f"{self.scale * self.rank:.12g}")  # 16 / 3 · 3 is 16


def encode(content: Content, model: nn.Module | None) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors, sorted by name, and notes; raises AdapterError, which lists all that loralib cannot hold."""
    problems = [f"rows of {len(ids)} tokens of {name} are trained" for name, (ids, _) in content.tokens.items()]
    problems += [
        f"{name} mirrors the update of {tie.source}, and loralib would merge both into the weight that they share"
        for name, tie in content.tied.items()
    ]
    layers: dict[str, Written] = {}
    for name, update in content.updates.items():
        try:
            layers[name] = _written(name, update)
        except AdapterError as error:
            problems.append(str(error))
    tensors: dict[str, Tensor] = {}
    for name, value in content.biases.items():
        update = content.updates.get(name)
        tensors[_key(name, "conv.bias" if update is not None and _is_convolution(update) else "bias")] = value
    for name, copy in content.copies.items():
        for key, tensor in copy.items():
            tensors[_key(name, key)] = tensor
            if key.rpartition(".")[2] in ("lora_A", "lora_B"):
                problems.append(f"{name} is trained whole, and its {key} would be taken for a factor")
    raise_problems("loralib's layers cannot hold this adapter", problems)
    alpha = _common(layers)
    for name, layer in layers.items():
        tensors[_key(name, "lora_A")] = layer.A
        tensors[_key(name, "lora_B")] = layer.B if layer.alpha == alpha else folded(layer.B, layer.alpha / alpha)
    # Clones: torch.save would write all of the memory that a tensor is a part of.
    stored = {key: tensors[key].detach().cpu().clone(memory_format=torch.contiguous_format) for key in sorted(tensors)}
    return stored, _notes(content, layers, alpha, model)


def _common(layers: Mapping[str, Written]) -> float:
    """Return the alpha of most layers, which all are given."""
    return Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0] if layers else 1.0


def to_be_told(content: Content) -> Given:
    """Return what a reader has to be told of the file that is written of an adapter."""
    layers = {name: _written(name, update) for name, update in content.updates.items()}
    hosts = [(update, update.host) for update in content.updates.values()]
    parts = [tuple(u.tensors) for u, host in hosts if isinstance(host, FusedHost) and equal_parts(host.layout)]
    return Given(allow_pickle=True, alpha=_common(layers), parts=parts[0] if parts else ())


def _key(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if name else suffix


def _is_convolution(update: LayerUpdate) -> bool:
    """Tell whether the layer is a convolution, by its host or, in what was read from a file, by its weight."""
    return (update.host is None or isinstance(update.host, ConvHost)) and len(update.shapes.get("weight", ())) > 2


def _written(name: str, update: LayerUpdate) -> Written:
    """Return the factors of a layer; raises AdapterError for what loralib has no layer for."""
    if _is_convolution(update):
        return _convolution(name, update)
    if isinstance(update.host, FusedHost) and equal_parts(update.host.layout):
        return _merged(name, update, update.host)
    if update.host is not None and (not isinstance(update.host, AdditiveHost) or _is_transposed(update)):
        raise AdapterError(f"{name}: loralib has no layer of its kind; it has Linear, Embedding and Conv2d")
    pair = pair_of(name, update)
    note = f"{name}: its parts are the update of the whole layer" if isinstance(update.host, FusedHost) else ""
    return Written(pair.A, pair.B, pair.rank, pair.scale, note=note)


def _is_transposed(update: LayerUpdate) -> bool:
    return isinstance(update.host, ConvTransposeHost)


def _merged(name: str, update: LayerUpdate, host: FusedHost) -> Written:
    """Return the factors of a `MergedLinear`: those of equal parts, of one rank, one after the other."""
    parts = [part for part in host.layout.parts if part in update.tensors]
    try:
        pairs = {part: Pair(*update.pair(part), update.spec_of(part).scale) for part in parts}
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    rank, scale = max(pair.rank for pair in pairs.values()), next(iter(pairs.values())).scale
    changed = [part for part, pair in pairs.items() if (pair.rank, pair.scale) != (rank, scale)]
    alike = [pair.at(rank, scale) for pair in pairs.values()]
    enabled = [part in parts for part in host.layout.parts]
    return Written(
        torch.cat([pair.A for pair in alike]),
        torch.cat([pair.B for pair in alike]),
        rank,
        scale,
        kind=f"MergedLinear with enable_lora={enabled}",
        note=f"{name}: parts brought to one rank and scale: {', '.join(changed)}" if changed else "",
    )


def _convolution(name: str, update: LayerUpdate) -> Written:
    """Return factors of which loralib's convolution makes the same kernel."""
    shape: tuple[int, ...] = update.shapes["weight"]  # (out, in / groups, *kernel)
    kernel = shape[-1]
    if len(set(shape[2:])) > 1 or (len(shape) != 4 and kernel > 1):
        raise AdapterError(
            f"{name}: loralib's convolutions work in two dimensions with a square kernel, and this kernel is {shape}"
        )
    try:
        A, B = update.pair()
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    columns = shape[1] * update.groups * kernel
    pair = Pair(A, B, update.spec.scale)
    times = blocks(A.shape[1], columns)
    while pair.rank * times % kernel:  # it has r times the kernel's side in rows
        pair = pair.at(pair.rank + 1, pair.scale)
    A, B = reshaped(pair.A, pair.B, columns)
    padding = -A.shape[0] % kernel
    if padding:
        A, B = torch.cat([A, A.new_zeros(padding, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], padding)], 1)
    return Written(
        A, B, A.shape[0] // kernel, pair.scale, kind="Conv2d" if len(shape) == 4 else f"Conv{len(shape) - 2}d"
    )


def _notes(content: Content, layers: dict[str, Written], alpha: float, model: nn.Module | None) -> list[str]:
    """Return what the file says in another way than the adapter, and what its reader has to know."""
    made: dict[str, list[str]] = {}
    for name, layer in layers.items():
        made.setdefault(f"r={layer.rank}{f' in {layer.kind}' if layer.kind else ''}", []).append(name)
    notes = []
    if layers:
        told = (
            next(iter(made))
            if len(made) == 1
            else "; ".join(f"{k} for {enumerate_names(v, 3)}" for k, v in made.items())
        )
        notes.append(f"loralib's files store no settings; make its layers with lora_alpha={alpha:g} and {told}")
    notes += [layer.note for layer in layers.values() if layer.note]
    folded = [name for name, layer in layers.items() if layer.alpha != alpha]
    if folded:
        notes.append(f"scale folded into B, where alpha is not {alpha:g}: {enumerate_names(folded, 3)}")
    if model is not None:
        notes += _shared(layers, model)
    if content.about:
        notes.append("what the adapter says about itself has no place in it, such as the names of labels")
    return notes


def _shared(layers: dict[str, Written], model: nn.Module) -> list[str]:
    """Return a note for layers whose weight others have too: loralib merges in eval mode, whoever else reads it."""
    names, ties = Names(model), Ties(model)
    found = []
    for name in layers:
        layer = names.modules.get(name)
        weight = layer._parameters.get("weight") if layer is not None else None
        if layer is not None and weight is not None and ties.others(layer, weight):
            found.append(name)
    if not found:
        return []
    return [
        f"others have the weight of {enumerate_names(found, 3)} too: make these with merge_weights=False, or eval() "
        "adds the update for all of them"
    ]
