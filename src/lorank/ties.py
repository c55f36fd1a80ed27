"""Which parameters of a model share memory: tied embeddings and heads, and whatever else uses one weight twice."""

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .tree import base_modules


class Ties:
    """All parameters of a model's base by the memory they use."""

    def __init__(self, model: nn.Module):
        self._by_storage: dict[tuple[object, int], list[tuple[str, int, nn.Parameter]]] = {}
        self._modules = list(base_modules(model))
        seen: set[int] = set()
        for module_name, module in self._modules:
            if id(module) in seen:  # one module under two names is not a tie
                continue
            seen.add(id(module))
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full_name = f"{module_name}.{name}" if module_name else name
                    self._by_storage.setdefault(_storage(parameter), []).append((full_name, id(module), parameter))

    def used_outside(self, name: str, layer: nn.Module) -> list[str]:
        """Return the names outside the layer `name` by which modules that lie in it are reached too."""
        inside = {id(module) for _, module in base_modules(layer)} - {id(layer)}
        return [other for other, module in self._modules if id(module) in inside and not other.startswith(f"{name}.")]

    def others(self, layer: nn.Module, parameter: nn.Parameter) -> list[str]:
        """Return the names under which modules outside `layer` use memory of this parameter of it."""
        sharing = self._by_storage.get(_storage(parameter), [])
        if len(sharing) < 2:
            return []
        inside = {id(module) for _, module in base_modules(layer)}
        return [
            name
            for name, owner, other in sharing
            if owner not in inside and (other is parameter or _overlap(parameter, other))
        ]


def _storage(tensor: Tensor) -> tuple[object, int]:
    if isinstance(tensor, UninitializedParameter) or tensor.device.type == "meta" or type(tensor.data) is not Tensor:
        return "parameter", id(tensor)  # no address of its own to compare
    return tensor.device, tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_stop), (b_start, b_stop) = _extent(a), _extent(b)
    return a_start < b_stop and b_start < a_stop


def _extent(tensor: Tensor) -> tuple[int, int]:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
