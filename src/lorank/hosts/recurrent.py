"""nn.LSTM, GRU, RNN: a part for every weight, of all layers and directions: `weight_ih_l0`, `weight_hh_l1_reverse`.

All gates are rows of one matrix. Time steps run in one kernel, which is given the weights: the layer runs under W + ΔW.
Their cells (LSTMCell, GRUCell, RNNCell) are adapted in the same way.
"""

from typing import Any

from torch import Tensor, nn

from .base import Host, register


@register(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class RecurrentHost(Host):
    def parts(self, layer: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in layer._parameters if name.startswith("weight"))

    def attribute(self, layer: nn.Module, part: str) -> str:
        return part

    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        return self.weight(layer, part)

    def stored(self, layer: nn.Module, part: str, W: Tensor) -> Tensor:
        return W

    def namespace(self, base: type[nn.Module]) -> dict[str, Any]:
        """Let an adapted layer find W + ΔW also in the list of all its weights, which its forward hands on."""
        return (
            {"_flat_weights": property(_read_flat_weights, _set_flat_weights)} if issubclass(base, nn.RNNBase) else {}
        )

    def released(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.RNNBase):
            _set_flat_weights(layer, [])


def _read_flat_weights(layer: Any) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


def _set_flat_weights(layer: Any, weights: object) -> None:
    """Keep the parameters themselves, whatever the layer read of them: they are what stays without adapters."""
    layer.__dict__["_flat_weights"] = [layer._parameters.get(name) for name in layer._flat_weights_names]
