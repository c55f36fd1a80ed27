"""An adapter as one pair of factors a layer: what most formats can hold, and how the others are brought to it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError, enumerate_names
from ..hosts import FusedHost
from ..lowrank import stack_blocks
from .content import Content, LayerUpdate


@dataclass(frozen=True)
class Pair:
    """ΔW = scale · B A of the whole matrix of one layer."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    lookup: bool = False  # of an embedding

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def at(self, rank: int, scale: float) -> "Pair":
        """Return the same update with another scale, folded into B, and zeros up to a higher rank."""
        A, B = self.A, folded(self.B, self.scale / scale) if self.scale != scale else self.B
        missing = rank - self.rank
        if missing:
            A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
        return Pair(A, B, scale, self.lookup)


def folded(factor: Tensor, scale: float) -> Tensor:
    """Return scale · factor, in float32 at least: rounded to bfloat16 again it would be another update."""
    return (factor.double() * scale).to(torch.promote_types(factor.dtype, torch.float32))


def pair_of(name: str, update: LayerUpdate) -> Pair:
    """Return the one pair of a layer; parts of a fused projection become one of the sum of their ranks.

    Raises AdapterError for what is no pair of matrices: convolutions, stacks, layers with several matrices, methods
    whose update depends on the base.
    """
    try:
        if isinstance(update.host, FusedHost):
            rows = update.host.layout
            # Where the parts' scales differ, the first one's is folded into the others.
            scale = update.spec_of(next(iter(update.tensors))).scale
            blocks = []
            for part in update.tensors:
                pair = Pair(*update.pair(part), update.spec_of(part).scale)
                pair = pair.at(pair.rank, scale)
                blocks.append((pair.A, pair.B, rows.index(part)))
            return Pair(*stack_blocks(blocks, rows.rows), scale)
        if list(update.tensors) != ["weight"]:
            raise AdapterError(f"its parts {enumerate_names(update.tensors)} are matrices of their own")
        if any(len(shape) > 2 for shape in update.shapes.values()):
            raise AdapterError("its weight is no plain matrix (a convolution, a stack, a bilinear form)")
        A, B = update.pair()
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    if A.dim() != 2:
        raise AdapterError(f"{name}: it is a stack of matrices")
    return Pair(A, B, update.spec.scale, update.lookup)


def pairs_of(content: Content, problems: list[str]) -> dict[str, Pair]:
    """Return the pair of every layer, tied ones included; those that have none go into `problems`."""
    found: dict[str, Pair] = {}
    for name, update in content.updates.items():
        try:
            found[name] = pair_of(name, update)
        except AdapterError as error:
            problems.append(str(error))
    for name, tie in content.tied.items():
        source = found.get(tie.source)
        if source is not None:
            A, B = (source.B.T, source.A.T) if tie.transposed else (source.A, source.B)
            found[name] = Pair(A, B, source.scale, source.lookup != tie.transposed)
    return found


def beyond_pairs(content: Content) -> list[str]:
    """Return what an adapter holds beside its updates, for formats that hold nothing else."""
    problems = [f"{name} is trained whole (train_also)" for name in content.copies]
    problems += [f"the bias of {name} is trained" for name in content.biases]
    return problems + [f"rows of {len(ids)} tokens of {name} are trained" for name, (ids, _) in content.tokens.items()]


def uniform(pairs: Mapping[str, Pair]) -> tuple[int, float, dict[str, Pair], list[str]]:
    """Return one rank, one scale, the same updates with these, and what had to be changed for it.

    For consumers that read one of each for all layers. The rank is the largest; the scale is the most frequent, and
    others are folded into B.
    """
    if not pairs:
        return 1, 1.0, {}, []
    rank = max(pair.rank for pair in pairs.values())
    scale = Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0]
    padded = [name for name, pair in pairs.items() if pair.rank != rank]
    folded = [name for name, pair in pairs.items() if pair.scale != scale]
    notes = [f"padded with zeros to rank {rank}: {enumerate_names(padded, 3)}"] if padded else []
    notes += [f"scale folded into B, where it is not {scale:g}: {enumerate_names(folded, 3)}"] if folded else []
    return rank, scale, {name: pair.at(rank, scale) for name, pair in pairs.items()}, notes
