"""EVA: LoRA with A from the directions in which a layer's inputs vary most, and ranks where they explain most.

A = the first r right singular vectors of the layer's inputs, of a few batches; B = 0 (Paischer et al. 2024, "One
Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", section 3). The vectors are found batch
by batch (incremental PCA, Ross et al. 2008). The ranks of all layers are then dealt out anew: each gets as many as it
has vectors among those that explain the largest shares of variance, at most `rho` times its own, and at least one.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hosts import AdditiveHost, Host
from .base import number_problems, register
from .calibrated import CalibratedAdapter
from .lora import LowRank


@register("eva")
@dataclass(frozen=True)
class EVA(LowRank):
    """LoRA from the principal directions of each layer's inputs; `lorank.calibrate` has to be called after `adapt`.

    rank, alpha, dropout, rank_stabilised, dtype: see `LowRank`. The rank is the mean one; a layer's scale stays what
    it is, whatever rank it gets.
    rho: at most so many times its rank a layer can get; 1 leaves every layer the same.
    """

    rho: float = 2.0

    def problems(self) -> list[str]:
        return super().problems() + number_problems(self, rho="at least 1")

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        if not isinstance(host, AdditiveHost) or not host.multiplies_rows:
            return "EVA looks at the inputs of linear layers; of this one it cannot see what its weight multiplies"
        if self.rank > host.shape(layer, part)[-1]:
            return f"EVA finds at most as many directions as the layer has inputs, {host.shape(layer, part)[-1]}"
        return None

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "EVAAdapter":
        return EVAAdapter(self, host, layer, part, device)

    def with_rank(self, rank: int) -> "EVA":
        """Return the spec with another rank and the same scale."""
        times = rank / self.rank
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * (times**0.5 if self.rank_stabilised else times))

    def __str__(self) -> str:
        return f"EVA, {super().__str__()}"


class EVAAdapter(CalibratedAdapter):
    """A (rank, in) and B (out, rank)."""

    def __init__(self, spec: EVA, host: Host, layer: nn.Module, part: str, device: torch.device | None = None):
        super().__init__(spec, host, layer, part, device)
        self.asked = spec  # before ranks are dealt out: to calibrate again deals them out from here

    def begin(self, layer: nn.Module) -> None:
        self.watching = True
        inputs = self.A.shape[-1]
        vars(self)["seen"] = PrincipalDirections(min(round(self.asked.rank * self.asked.rho), inputs))

    @torch.no_grad()
    def watch(self, layer: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        rows = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
        self.seen.add(rows)
        return y

    def problem(self) -> str | None:
        if not self.seen.finite:
            return "its inputs hold NaN or Inf"
        if self.seen.count <= self.asked.rank:
            return f"{self.seen.count} inputs were seen, which have no {self.asked.rank} directions; give more batches"
        return None

    @torch.no_grad()
    def start(self, layer: nn.Module) -> None:
        directions = self.seen.directions[: self.spec.rank].contiguous()
        like = {"device": self.A.device, "dtype": self.A.dtype}
        self.A = nn.Parameter(directions.to(**like, copy=True))
        self.B = nn.Parameter(torch.zeros(self.B.shape[0], self.spec.rank, **like))
        self.scale = self.spec.scale
        self.calibrated = True

    @property
    def seen(self) -> "PrincipalDirections":
        """What was seen of the inputs."""
        return vars(self)["seen"]

    def end(self) -> None:
        super().end()
        vars(self).pop("seen", None)


def deal_ranks(adapters: Sequence[EVAAdapter]) -> None:
    """Give each adapter as many ranks as it has among the directions that explain most, and keep their sum."""
    budget = sum(adapter.asked.rank for adapter in adapters)
    shares = [(float(share), i) for i, a in enumerate(adapters) for share in a.seen.shares[1:]]  # the first is certain
    chosen = sorted(shares, reverse=True)[: budget - len(adapters)]
    for i, adapter in enumerate(adapters):
        rank = 1 + sum(1 for _, owner in chosen if owner == i)
        adapter.spec = adapter.asked.with_rank(rank)


class PrincipalDirections:
    """The directions in which rows vary most around their mean, found from batches of them."""

    def __init__(self, number: int):
        self.number = number
        self.count = 0
        self.finite = True  # all rows so far
        self.mean: Tensor = torch.zeros(())
        self.directions: Tensor = torch.zeros(0)  # orthonormal rows, (number, in), the one that explains most first
        self.lengths: Tensor = torch.zeros(0)  # the singular values, (number,)
        self.variance = 0.0  # of all rows together, times their count

    def add(self, rows: Tensor) -> None:
        """Take note of rows (n, in)."""
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        self.finite &= bool(torch.isfinite(rows).all())
        if not len(rows) or not self.finite:
            return
        mean = rows.mean(dim=0)
        centred = rows - mean
        self.variance += float(centred.square().sum())
        if self.count:
            total = self.count + len(rows)
            between = (self.count * len(rows) / total) ** 0.5 * (self.mean - mean)
            self.variance += float(between.square().sum())
            centred = torch.cat([self.lengths[:, None] * self.directions, centred, between[None]])
            mean = self.mean + (mean - self.mean) * (len(rows) / total)
        _, S, V = torch.linalg.svd(centred, full_matrices=False)
        self.lengths, self.directions = S[: self.number], V[: self.number]
        self.count, self.mean = self.count + len(rows), mean

    @property
    def shares(self) -> Tensor:
        """The share of the variance that each explains, (number,)."""
        return self.lengths.square() / max(self.variance, 1e-30)
