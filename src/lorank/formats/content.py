"""What an adapter file says, apart from how its format says it; taken from a model, and put on one."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import Baseline, Inserted
from ..companions import BiasOffset
from ..errors import AdapterError, enumerate_names, raise_problems
from ..fingerprint import Fingerprint, fingerprint
from ..hosts import ConvHost, Host, NoHost, registered_host
from ..names import label_of, lies_in
from ..planned import Bias
from ..tied import Mirror, Tie
from ..tokens import TokenRows
from ..tree import base_modules, entries
from ..variants import Adapter, LoRA, Spec, Update

_LANDMARKS = 8


@dataclass(frozen=True)
class Given:
    """What the user says of a file that the file does not say itself.

    allow_pickle: open it even if it is a pickle.
    alpha: of files that store no scale, the numerator in alpha / rank.
    parts: of files that do not say which parts of a fused projection they adapt, their names in order: ("q", "v").
    """

    allow_pickle: bool = False
    alpha: float | None = None
    parts: tuple[str, ...] = ()


def refuse_given(given: Given, *, alpha: bool = True, parts: bool = True) -> None:
    """Raise AdapterError for an alpha or parts that were given for a file which says them itself.

    alpha, parts: whether it does.
    """
    needless = ["alpha"] if alpha and given.alpha is not None else []
    needless += ["parts"] if parts and given.parts else []
    if needless:
        raise AdapterError(f"{' and '.join(needless)} is for files that do not say it, and this one does")


def nothing_to_tell(content: "Content") -> Given:
    """Return what a reader has to be told of a file that says everything itself."""
    return Given()


@dataclass
class LayerUpdate:
    """The update of one layer: {part: its tensors by name}; the only part of a plain layer is "weight"."""

    spec: Spec
    tensors: dict[str, dict[str, Tensor]]  # as `Update.tensors` names them: A (rank, in) and B (out, rank) of LoRA
    specs: dict[str, Spec] = field(default_factory=dict)  # of parts that differ from `spec`
    host: Host | None = None  # known when it was taken from a model
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the parameters, by part; known then too
    matrices: dict[str, tuple[int, ...]] = field(default_factory=dict)  # (out, in) by part, where that is known
    lookup: bool = False  # of an embedding: A is looked up, and has a column for every token
    transposed: bool = False  # the layer's weight is stored as (in, out), which the update's own tensors are not
    groups: int = 1  # of a convolution
    by_parts: bool = False  # the file says which parts these are; else they are the whole layer
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)

    def spec_of(self, part: str) -> Spec:
        """Return the spec of a part."""
        return self.specs.get(part, self.spec)

    def pair(self, part: str = "weight") -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of a part, with ΔW = `spec_of(part).scale` · B A exactly.

        r is the spec's rank for LoRA, and more for some methods. Raises AdapterError where there is no such form.
        """
        return self.spec_of(part).low_rank(self.tensors[part], self.matrices.get(part))

    def factors(self, part: str = "weight") -> tuple[Tensor, Tensor]:
        """Return A and B of a part, beside which a file also has what else the method trains."""
        return self.spec_of(part).factors(self.tensors[part], self.matrices.get(part))


@dataclass
class Content:
    """One adapter."""

    spec: Spec  # of most updates; without any it says nothing
    updates: dict[str, LayerUpdate] = field(default_factory=dict)  # by layer
    biases: dict[str, Tensor] = field(default_factory=dict)  # by layer, (out,)
    tied: dict[str, Tie] = field(default_factory=dict)  # layers that mirror the update of another
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)  # by layer: token numbers, their rows
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by module, its state dict
    baselines: tuple[Baseline, ...] = ()  # those that run something with modules of the model
    inserted: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)  # by module: of which, and tensors
    landmarks: dict[str, Fingerprint] = field(default_factory=dict)  # weights of the base, when no update tells it
    base: dict[str, Tensor] = field(default_factory=dict)  # tensors of the base that came along
    bias: Bias = "none"
    about: dict[str, Any] = field(default_factory=dict)  # what its maker wrote of it: the task, the names of labels
    task: str | None = None  # what the model is for, when the file says so: causal-lm or classification
    base_model: str | None = None  # where the base is, when the file says so: a hub id
    needs_model: str | None = None  # read without the model that it depends on: what cannot be known without it
    problems: list[str] = field(default_factory=list)  # what a reader found; `fit` adds what it finds, and raises
    remarks: list[str] = field(default_factory=list)  # what a reader should warn of once the adapter is loaded

    def obstacles(self) -> list[str]:
        """Return why this cannot be put on a model, written or computed with."""
        return self.problems + ([self.needs_model] if self.needs_model else [])


def as_json(about: Mapping[str, Any]) -> str:
    """Return what an adapter says of itself as JSON, in one way; raises AdapterError for values that JSON has not."""
    try:
        return json.dumps(about, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"no file can hold what `about` says: {error}") from None


def take_about(content: Content, found: object) -> None:
    """Take what a file has as `about`: a text with JSON, or the object itself. Anything else is a problem of it."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        content.problems.append("its `about` is no JSON object")
        return
    content.about = found
    if isinstance(found.get("task"), str):
        content.task = found["task"]


def tensors_of_updates(content: Content) -> dict[str, Tensor]:
    """Return the tensors of all updates, by what messages call them."""
    return {
        f"{label_of(layer, part)}: {key}": tensor
        for layer, update in content.updates.items()
        for part, named in update.tensors.items()
        for key, tensor in named.items()
    }


def other_tensors(content: Content) -> dict[str, Tensor]:
    """Return what else of an adapter is trained, by what messages call it."""
    found = {f"{layer}.bias": bias for layer, bias in content.biases.items()}
    found |= {f"{copy}.{key}": tensor for copy, tensors in content.copies.items() for key, tensor in tensors.items()}
    found |= {f"{n} {what}: {key}": t for n, (what, own) in content.inserted.items() for key, t in own.items()}
    return found | {f"{layer}: rows of tokens": rows for layer, (_, rows) in content.tokens.items()}


def not_finite(*tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a problem that names the tensors with NaN or Inf in them, [] where there are none."""
    wrong = [name for named in tensors for name, tensor in named.items() if not is_finite(tensor)]
    return [f"NaN or Inf in {enumerate_names(wrong, 4)}"] if wrong else []


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no number of a tensor is NaN or Inf; PyTorch itself cannot for those of 8 bits."""
    exact = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return bool(torch.isfinite(tensor if exact else tensor.float()).all())


def outputs_of_head(content: Content) -> int:
    """Return how many outputs a trained head has, 0 without one; of its layers the last is the narrowest."""
    matrices = [tensor for copy in content.copies.values() for tensor in copy.values() if tensor.dim() == 2]
    return min((matrix.shape[0] for matrix in matrices), default=0)


def gather(model: nn.Module, name: str) -> Content:
    """Return what there is to save of an adapter. Raises AdapterError for values that are not finite."""
    found = entries(model, name)
    content = Content(LoRA())
    problems = []
    for layer_name, (layer, entry) in found.items():
        for key, parameter in entry.named_parameters():
            if parameter.is_meta:
                problems.append(f"{layer_name}: {key} is on the meta device and has no values")
            elif not is_finite(_collected(parameter)):
                problems.append(f"{layer_name}: {key} holds NaN or Inf")
        if not isinstance(entry, Adapter):
            content.copies[layer_name] = _tensors(entry)
            continue
        for leaf in entry.leaves():
            if isinstance(leaf, BiasOffset):
                content.biases[layer_name] = _collected(leaf.value(layer))
            elif isinstance(leaf, TokenRows):
                content.tokens[layer_name] = (leaf.ids.tolist(), _collected(leaf.values(layer)))
            elif isinstance(leaf, Mirror):
                if not isinstance(leaf.source, TokenRows):
                    content.tied[layer_name] = leaf.tie
            elif isinstance(leaf, Inserted):
                own = {key: _collected(tensor) for key, tensor in leaf.tensors().items()}
                content.inserted[layer_name] = leaf.spec.variant, own
                if leaf.spec not in content.baselines:
                    content.baselines += (leaf.spec,)
            elif isinstance(leaf, Update):
                if reason := leaf.why_not_saved():
                    problems.append(f"{layer_name}: {reason}")
                update = content.updates.setdefault(layer_name, LayerUpdate(leaf.spec, {}, host=leaf.host))
                if leaf.spec != update.spec:
                    update.specs[leaf.part] = leaf.spec
                note_layer(update, layer, leaf.host, leaf.part)
                update.tensors[leaf.part] = {key: _collected(tensor) for key, tensor in leaf.tensors().items()}
                with suppress(NoHost):  # a weight that was sharded or parametrised since cannot be recognised later
                    W = leaf.host.matrix(layer, leaf.part)
                    if not W.is_meta:
                        update.fingerprints[leaf.part] = fingerprint(W, leaf.host.dtype_name(layer, leaf.part))
            else:
                problems.append(f"{layer_name}: no file format yet for {type(leaf).__name__}")
    raise_problems("cannot save", problems)
    if content.updates:
        specs = Counter(update.spec for update in content.updates.values())
        content.spec = specs.most_common(1)[0][0]
    else:
        content.landmarks = landmarks(model, content.copies)
    if content.biases:
        content.bias = "adapted" if content.biases.keys() <= content.updates.keys() else "all"
    return content


def landmarks(model: nn.Module, copies: Collection[str]) -> dict[str, Fingerprint]:
    """Return fingerprints of some weights of the base, by layer, evenly spread over it: enough to know it again.

    copies: modules of which the adapter has its own, and which may be anything in the base.
    """
    layers = {name: layer for name, layer in base_modules(model) if not lies_in(name, copies)}
    dense = {name: host for name, layer in layers.items() if (host := _dense_host(layer)) is not None}
    chosen = list(dense)[:: max(1, len(dense) // _LANDMARKS)]
    return {name: fingerprint(dense[name].matrix(layers[name], "weight")) for name in chosen}


def _dense_host(layer: nn.Module) -> Host | None:
    """Return the host of a layer whose weight is one plain matrix with values."""
    host = registered_host(layer)
    if host is None or host.quantised:
        return None
    try:
        plain = host.parts(layer) == ("weight",) and not host.matrix(layer, "weight").is_meta
    except NoHost:
        return None
    return host if plain else None


def note_layer(update: LayerUpdate, layer: nn.Module, host: Host, *parts: str) -> None:
    """Note in an update what its layer is, and the shapes of some parts; of all that it has, if none is named."""
    update.host, update.lookup, update.transposed = host, host.lookup, host.transposed
    update.groups = getattr(layer, "groups", 1) if isinstance(host, ConvHost) else 1
    for part in parts or [part for part in host.parts(layer) if part in update.tensors]:
        update.shapes[part] = tuple(host.own(layer, part).shape)
        with suppress(NoHost):  # it was sharded or parametrised since
            update.matrices[part] = host.shape(layer, part)


def _collected(tensor: Tensor) -> Tensor:
    """Return a tensor's values, collected from all processes when it is sharded over them."""
    return getattr(tensor.detach(), "full_tensor", lambda: tensor.detach())()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state dict; it may hold other things too."""
    return {key: _collected(value) for key, value in own_tensors(module).items()}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers themselves that `_tensors` holds the values of."""
    return {key: value for key, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
