"""nn.Embedding: y = Wᵀ[ids] with W (dimension, vocabulary), stored as (vocabulary, dimension).

A subclass may multiply its output by `embed_scale` (Gemma, BART, M2M100); the update is multiplied likewise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Host, NoHost, overrides_forward, register
from .linear import agrees


@register(nn.Embedding)
class EmbeddingHost(Host):
    lookup = True

    def matrix(self, layer: nn.Embedding, part: str) -> Tensor:
        weight = self.weight(layer)
        if weight.shape != (layer.num_embeddings, layer.embedding_dim):
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.num_embeddings} tokens of dimension "
                f"{layer.embedding_dim}: packed, it needs a host of its own"
            )
        if layer.max_norm is not None:
            raise NoHost("max_norm rescales its rows during the forward, which no low-rank update can follow")
        return weight.T

    def write(self, layer: nn.Embedding, part: str, W: Tensor) -> None:
        self.weight(layer).data.copy_(W.T)

    def down(self, layer: nn.Embedding, part: str, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T, layer.padding_idx).to(layer.weight.dtype)  # (..., rank)

    def up(self, layer: nn.Embedding, part: str, z: Tensor, B: Tensor) -> Tensor:
        update = F.linear(z, B.to(z.dtype))  # (..., dimension)
        scale = self._embed_scale(layer)
        return update if scale is None else update * scale

    def channel(self, layer: nn.Embedding, part: str, v: Tensor) -> Tensor:
        return v  # outputs are the last dimension

    @torch.no_grad()
    def behaves(self, layer: nn.Embedding) -> bool:
        weight = self.weight(layer)
        ids = torch.arange(min(8, layer.num_embeddings), device=weight.device)[None]
        scale = self._embed_scale(layer)
        expected = F.embedding(ids, weight)
        return agrees(layer, ids, expected if scale is None else expected * scale)

    def _embed_scale(self, layer: nn.Embedding) -> Tensor | float | None:
        if not overrides_forward(layer, nn.Embedding):
            return None
        scale = getattr(layer, "embed_scale", None)
        return scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale
