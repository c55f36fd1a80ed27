"""PiSSA: LoRA that starts from the principal singular vectors of the weight.

W = U S Vᵀ; B₀ = U[:, :r] S[:r]^½, A₀ = S[:r]^½ V[:r]ᵀ, so that training begins where W is largest (Meng et al. 2024,
"PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", section 3, eq. 2-4). With a
scale other than 1 the two are divided by its root, as PEFT does it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import number_problems, register
from .shifted import Shifted, balanced


@register("pissa")
@dataclass(frozen=True)
class PiSSA(Shifted):
    """LoRA from the `rank` largest singular vectors of W; the base stays untouched (see `Shifted`).

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`.
    iterations: None for an exact decomposition, which takes seconds for a matrix of thousands; or the number of
        iterations of a randomised one (Halko et al. 2011; the paper's section 4 finds 4 to be enough).
    """

    iterations: int | None = None

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.iterations is None else number_problems(self, iterations="rank"))

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self.iterations is None:
            U, S, V = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, min(self.rank + 8, *W.shape[-2:]), niter=self.iterations)
            V = V.mT
        first = slice(self.rank)
        return balanced(U[..., first], S[..., first], V[..., first, :], self.scale)
