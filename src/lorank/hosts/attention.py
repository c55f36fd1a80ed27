"""nn.MultiheadAttention: parts q, k and v of the input projection; "out" is the layer `out_proj` inside it.

Its forward hands all weights to one function (and in eval mode to one kernel), so the layer runs under W + ΔW.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Host, NoHost, register

_ROWS = {"q": 0, "k": 1, "v": 2}


@register(nn.MultiheadAttention)
class AttentionHost(Host):
    def parts(self, layer: nn.MultiheadAttention) -> tuple[str, ...]:
        return tuple(_ROWS)

    def children(self, layer: nn.MultiheadAttention) -> dict[str, str]:
        return {"out": "out_proj"}

    def attribute(self, layer: nn.MultiheadAttention, part: str) -> str:
        # One matrix for all three where keys and values have the queries' dimension.
        return "in_proj_weight" if layer._qkv_same_embed_dim else f"{part}_proj_weight"

    def matrix(self, layer: nn.MultiheadAttention, part: str) -> Tensor:
        weight = self.weight(layer, part)
        if weight.dim() != 2:
            raise NoHost(f"its {self.attribute(layer, part)} has shape {tuple(weight.shape)}")
        return weight.unflatten(0, (3, -1))[_ROWS[part]] if layer._qkv_same_embed_dim else weight

    def stored(self, layer: nn.MultiheadAttention, part: str, W: Tensor) -> Tensor:
        if not layer._qkv_same_embed_dim:
            return W
        before = _ROWS[part]
        return F.pad(W[None], (0, 0, 0, 0, before, 2 - before)).flatten(0, 1)

    def write(self, layer: nn.MultiheadAttention, part: str, W: Tensor) -> None:
        self.matrix(layer, part).data.copy_(W)
