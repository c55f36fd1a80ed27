"""A run without numbers: on the meta device it tells what a real one allocates and computes."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .repeats import Repeats


class Simulation(TorchDispatchMode):
    """Within it every operation is followed: which storages are alive, how many bytes they have, what is computed.

    What is counted are tensors. The workspace of kernels, the fragmentation of memory and the framework itself come on
    top. Operations are those of matrix products, convolutions and attention; a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes of all storages that are alive now
        self.peak = 0  # the most that they were
        self.flops = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._repeats = Repeats()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._repeats.run(func, args, kwargs or {})
        for value in (*args, *(result if isinstance(result, tuple | list) else (result,))):
            if isinstance(value, Tensor):  # of what was made before, such as the batch, it knows from its first use on
                self.add(value)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, *_of_all_heads(query, key, value))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, *_of_all_heads(query, key, value))


def _of_all_heads(query: Tensor, *others: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of keys and values as if each head of the queries had its own."""
    return [(other.shape[0], query.shape[1], *other.shape[2:]) for other in others]


_aten = torch.ops.aten
_FLOPS: dict[Any, Any] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
