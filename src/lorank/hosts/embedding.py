"""nn.Embedding: y = Wᵀ[ids] with W (dimension, vocabulary), stored as (vocabulary, dimension).

A subclass may multiply its output by `embed_scale` (Gemma, BART, M2M100); the update is multiplied likewise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdditiveHost, NoHost, overrides_forward, register


@register(nn.Embedding)
class EmbeddingHost(AdditiveHost):
    lookup = True

    def matrix(self, layer: nn.Embedding, part: str) -> Tensor:
        weight = self.weight(layer, part)
        if weight.shape != (layer.num_embeddings, layer.embedding_dim):
            raise NoHost(
                f"its weight has shape {tuple(weight.shape)} for {layer.num_embeddings} tokens of dimension "
                f"{layer.embedding_dim}: packed, it needs a host of its own"
            )
        if layer.max_norm is not None:
            raise NoHost("max_norm rescales its rows during the forward, which no low-rank update can follow")
        return weight.T

    def stored(self, layer: nn.Embedding, part: str, W: Tensor) -> Tensor:
        return W.T

    def down(self, layer: nn.Embedding, part: str, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T, layer.padding_idx).to(self.own(layer, part).dtype)  # (..., rank)

    def up(self, layer: nn.Embedding, part: str, z: Tensor, B: Tensor) -> Tensor:
        return self.scaled(layer, F.linear(z, B.to(z.dtype)))  # (..., dimension)

    def whole(self, layer: nn.Embedding, part: str, x: Tensor, W: Tensor) -> Tensor:
        return self.scaled(layer, self.down(layer, part, x, W))

    def channel(self, layer: nn.Embedding, part: str, v: Tensor) -> Tensor:
        return v  # outputs are the last dimension

    def apply(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        weight = self.own(layer)
        found = F.embedding(
            x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse
        )
        return self.scaled(layer, found)

    def example(self, layer: nn.Embedding) -> Tensor:
        return torch.arange(min(8, layer.num_embeddings), device=self.own(layer).device)[None]

    def scaled(self, layer: nn.Embedding, found: Tensor) -> Tensor:
        """Return what was looked up, multiplied by `embed_scale` where the layer's class does that."""
        if not overrides_forward(layer, nn.Embedding):
            return found
        scale = getattr(layer, "embed_scale", None)
        if scale is None:
            return found
        return found * (scale.to(self.own(layer).dtype) if isinstance(scale, Tensor) else scale)
