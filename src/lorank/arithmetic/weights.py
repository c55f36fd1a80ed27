"""Two sets of weights of one architecture, a base and what it was tuned to: in folders, or in models."""

from abc import ABC, abstractmethod
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint, names_in_model
from ..errors import AdapterError, dtype_name
from ..hosts import Host
from ..names import Names, base_tensors
from ..ties import Ties
from ..tree import adapter_names


class Weights(ABC):
    """The tensors of a model by their names in it, one at a time."""

    model: nn.Module  # whose layers the names are of; on the meta device where the tensors are in files
    names: set[str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""

    @abstractmethod
    def matrix(self, layer: str, host: Host, part: str) -> tuple[Tensor, str]:
        """Return W (out, in) of a part of a layer, or a stack of them, and what it is stored as."""

    def known_as(self, name: str) -> str | None:
        """Return the name under which a tensor is here: its own, or that of one that it is tied to."""
        if name in self.names:
            return name
        module, _, key = name.rpartition(".")
        layer = Names(self.model).modules.get(module)
        own = layer._parameters.get(key) if layer is not None else None
        if layer is None or own is None:
            return None
        return next((other for other in Ties(self.model).others(layer, own) if other in self.names), None)


class LoadedWeights(Weights):
    """The weights of a model in memory."""

    def __init__(self, model: nn.Module):
        if adapter_names(model):
            raise AdapterError(
                f"cannot extract: a model has the adapters {', '.join(adapter_names(model))}; merge them"
            )
        self.model = model
        names = Names(model)
        self._modules = names.modules
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in base_tensors(model).items():
            owner, _, key = name.rpartition(".")
            # Each once, and no buffers that are computed anew.
            if names.canonical[owner] == owner and key not in self._modules[owner]._non_persistent_buffers_set:
                self._tensors[name] = tensor
        self.names = set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def matrix(self, layer: str, host: Host, part: str) -> tuple[Tensor, str]:
        found = self._modules.get(layer)
        if found is None:
            raise AdapterError(f"cannot extract: one of the two models has no {layer}")
        return host.matrix(found, part).detach(), host.dtype_name(found, part)


class StoredWeights(Weights):
    """The weights in a checkpoint's folder, for a model on the meta device."""

    def __init__(self, folder: Path, model: nn.Module):
        checkpoint = Checkpoint.of(folder)
        names = names_in_model(checkpoint.names, base_tensors(model), getattr(model, "base_model_prefix", ""))
        self.model, self._folder = model, folder
        self._places: dict[str, tuple[str, str, tuple[int, ...]]] = {}  # file, key and shape by name
        for file, slots in checkpoint.shards.items():
            self._places |= {names[slot.name]: (file, slot.name, slot.shape) for slot in slots}
        self.names = set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][2]

    def tensor(self, name: str) -> Tensor:
        file, key, _ = self._places[name]
        with safetensors.safe_open(self._folder / file, framework="pt") as opened:  # anew, or its pages stay in memory
            return opened.get_tensor(key)

    def matrix(self, layer: str, host: Host, part: str) -> tuple[Tensor, str]:
        found = self.model.get_submodule(layer)
        attribute = host.attribute(found, part)
        name = self.known_as(f"{layer}.{attribute}".removeprefix("."))
        placeholder = found._parameters[attribute]
        assert name is not None and placeholder is not None, "checked before"
        tensor = self.tensor(name)
        try:
            found._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
            return host.matrix(found, part).detach(), dtype_name(tensor.dtype)
        finally:
            found._parameters[attribute] = placeholder


def same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, up to the rounding of the coarser dtype."""
    if first.shape != second.shape:
        return False
    if first.dtype != second.dtype and first.is_floating_point() and second.is_floating_point():
        coarse = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        first, second = first.to(coarse), second.to(coarse)
    return torch.equal(first.cpu(), second.cpu())
