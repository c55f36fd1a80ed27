"""LoKr's division of a layer in two: which of our specs a file's factors are of, and which LyCORIS finds again.

C is (out₁, in₁) and D (out₂, in₂ · kernel). A spec has one `factor` for the division of both sides; a file has none.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from ...errors import AdapterError
from ...variants import LoKr
from ...variants.lokr import divided

_FACTORS = range(1, 65)  # that are tried, beside the sizes of C themselves


def sides(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return rows and columns of C or D."""
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    return tensors[f"{name}B"].shape[0], tensors[f"{name}A"].shape[1]


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank of the factors of C and D; None where both are whole. Raises AdapterError where they differ."""
    ranks = {tensors[name].shape[0] for name in ("CA", "DA") if name in tensors}
    if len(ranks) > 1:
        raise AdapterError(f"the factors of its lokr_w1 and of its lokr_w2 have ranks {min(ranks)} and {max(ranks)}")
    return next(iter(ranks), None)


def spec_of(tensors: Mapping[str, Tensor], kernel: int, alpha: float | None, dropout: float) -> LoKr | None:
    """Return the spec of which these are the tensors, or None; `kernel` is its number of places.

    alpha: None where the scale is 1.
    """
    (out1, in1), (out2, columns) = sides(tensors, "C"), sides(tensors, "D")
    in2, rest = divmod(columns, kernel)
    rank = rank_of(tensors)
    largest = math.ceil(max(out2, in2) / 2)  # from which on a factor is whole
    if rank is None:  # any rank from there on; LyCORIS writes it as alpha
        told = alpha is not None and alpha.is_integer() and largest <= alpha < 2**31
        rank, alpha = (int(alpha) if told and alpha is not None else largest), None
    elif ("D" in tensors) != (rank >= max(out2, in2) / 2) or ("CA" in tensors and rank >= max(out1, in1) / 2):
        return None
    for factor in (-1, out1, in1, *_FACTORS):
        if not rest and divided(out1 * out2, factor) == (out1, out2) and divided(in1 * in2, factor) == (in1, in2):
            return LoKr(rank, rank if alpha is None else alpha, dropout, factor=factor, decompose_both="CA" in tensors)
    return None


def lycoris_rebuilds(tensors: Mapping[str, Tensor], kernel: int) -> bool:
    """Tell whether LyCORIS makes a module of these shapes when it reads them.

    It takes the factor from the tensors in a way of its own, and the smaller of two divisors for C. Where that gives
    other shapes it fails, or spreads the tensors over larger ones (LokrModule.make_module_from_state_dict, 4.1.3).
    """
    (out1, in1), (out2, columns) = sides(tensors, "C"), sides(tensors, "D")
    if "CA" in tensors and "D" in tensors:
        return False  # it decomposes C where it does D
    in2 = columns // kernel
    seen = in2 if "D" in tensors else columns  # it takes the kernel for channels where D has factors
    out, in_ = out1 * out2, in1 * seen
    factor = -1
    if (out1, in1) != (_sorted(out, -1)[0], _sorted(in_, -1)[0]):
        of_C, of_D = max(out1, in1), max(out2, seen)
        shared = (f for f in (of_C, of_D) if f in (out1, out2) and f in (in1, seen))
        factor = next(shared, min(of_C, of_D))
    return _sorted(out, factor) == (out1, out2) and _sorted(in1 * in2, factor) == (in1, in2)


def _sorted(size: int, factor: int) -> tuple[int, int]:
    small, large = sorted(divided(size, factor))
    return small, large
