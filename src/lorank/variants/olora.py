"""OLoRA: LoRA that starts from an orthonormal basis of the weight.

W = Q R; B₀ = Q[:, :r], A₀ = R[:r] (Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
algorithm 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import register
from .shifted import Shifted


@register("olora")
@dataclass(frozen=True)
class OLoRA(Shifted):
    """LoRA from the first `rank` columns of Q and rows of R of W = Q R; the base stays untouched (see `Shifted`).

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    """

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(W)
        return R[..., : self.rank, :], Q[..., : self.rank]
