"""MiLoRA: LoRA that starts from the minor singular vectors of the weight.

W = U S Vᵀ; B₀ = U[:, −r:] S[−r:]^½, A₀ = S[−r:]^½ V[−r:]ᵀ: what is learnt begins where W says least, and disturbs what
it knows as little as possible (Wang et al. 2024, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient
LLM Finetuning", section 3). With a scale other than 1 the two are divided by its root.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import register
from .shifted import Shifted, balanced


@register("milora")
@dataclass(frozen=True)
class MiLoRA(Shifted):
    """LoRA from the `rank` smallest singular vectors of W; the base stays untouched (see `Shifted`).

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    """

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        last = slice(S.shape[-1] - self.rank, None)
        return balanced(U[..., last], S[..., last], V[..., last, :], self.scale)
