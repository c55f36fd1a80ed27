"""How the factors of one layer lie in PEFT's tensors: by the kind of the layer, there and back.

matrix      A (rank, in) and B (out, rank), as they are
embedding   the same, under names of their own
blocks      parts of a fused projection as one pair: A stacked, B zero outside of each part's rows and columns
kernel      a convolution: A (rank, in / groups, *kernel) and B (out, rank, 1, ...). PEFT's A sees the channels of all
            groups, so that of a grouped one each group gets a rank of its own and zeros for the others' channels
parameters  stacks of matrices: A (experts · rank, in), row by row of each expert, and B (out, rank · experts), the
            experts side by side for each column
parts       what PEFT has no layer for: the factors of every part under the part's name
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...hosts import PARAMETER, ConvHost, ConvTransposeHost, FusedHost
from ...lowrank import stack_blocks
from ..content import LayerUpdate

MATRIX, EMBEDDING, BLOCKS, KERNEL, PARAMETERS, PARTS = (
    "matrix",
    "embedding",
    "blocks",
    "kernel",
    "parameters",
    "parts",
)

Pair = tuple[Tensor, Tensor]
_MOST_PARTS = 64  # that a fused layer may have in a file: each takes memory
_LARGEST_KERNEL = 2**20  # numbers, zeros included, that A of a grouped convolution may have in PEFT's layout


@dataclass(frozen=True)
class Layout:
    """Which of these, and how many times the rank of the update the rank of PEFT's pair is."""

    kind: str
    blocks: int = 1


def layout_of(update: LayerUpdate) -> Layout:
    """Return the layout in which an update that was taken from a model is written."""
    host = update.host
    if isinstance(host, FusedHost):
        return Layout(BLOCKS, len(update.tensors))
    if isinstance(host, ConvHost) or (host is None and len(update.shapes.get("weight", ())) > 2):
        return Layout(KERNEL, update.groups) if _fits_peft(update) else Layout(PARTS)
    stacks = [A for A, _ in map(update.factors, update.tensors) if A.dim() == 3]
    if any(A.shape[0] == 1 for A in stacks):
        return Layout(PARTS)  # PEFT would add B A of a stack of one to its parameter as it stands, transposed or not
    if host is None and stacks:
        return Layout(PARAMETERS)
    if isinstance(host, type(PARAMETER)) and all(len(shape) < 4 for shape in update.shapes.values()):
        return Layout(PARAMETERS)
    if host is not None and (not host.additive or isinstance(host, ConvTransposeHost)):
        return Layout(PARTS)
    return Layout(EMBEDDING if update.lookup else MATRIX)


def _fits_peft(update: LayerUpdate) -> bool:
    """Tell whether a convolution's zero blocks are worth writing: of a depthwise one they would be almost everything.

    What is not written so, PEFT refuses: its rank would have to be a multiple of the groups.
    """
    rank, groups = update.factors()[0].shape[0], update.groups
    inner, *kernel = update.shapes["weight"][1:]
    return groups <= rank or rank * groups * inner * groups * prod(kernel) <= _LARGEST_KERNEL


def written_pair(update: LayerUpdate) -> Pair:
    """Return the one pair of tensors of a layer."""
    host, layout = update.host, layout_of(update)
    if isinstance(host, FusedHost):
        rows = host.layout
        return stack_blocks([(*update.factors(part), rows.index(part)) for part in update.tensors], rows.rows)
    A, B = update.factors()
    return _kernels(A, B, update.shapes["weight"], layout.blocks) if layout.kind == KERNEL else (A, B)


def _kernels(A: Tensor, B: Tensor, weight: tuple[int, ...], groups: int) -> Pair:
    inner, kernel = weight[1], weight[2:]
    rank = A.shape[0]
    of_group = A.view(rank, inner, *kernel)
    wide = A.new_zeros(groups * rank, groups * inner, *kernel)
    for group in range(groups):
        wide[group * rank : (group + 1) * rank, group * inner : (group + 1) * inner] = of_group
    return wide, B.view(*B.shape, *[1] * len(kernel))


def read_kernels(A: Tensor, B: Tensor, channels: int = 0) -> Pair | str:
    """Return the factors of a convolution from its kernels A and B, or why they are none that its weight can hold.

    channels: of a convolution in groups, those of all of them together.
    """
    rank = B.shape[1] if B.dim() == A.dim() else 0
    groups, rest = divmod(A.shape[0], max(rank, 1))
    inner, uneven = divmod(A.shape[1], max(groups, 1))
    if not rank or not groups or rest or uneven or prod(B.shape[2:]) != 1:
        return f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of kernels"
    blocks = A.unflatten(0, (groups, rank)).unflatten(2, (groups, inner))  # (groups, rank, groups, inner, *kernel)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # of each group for itself: (groups, rank, inner, *kernel)
    # Before 0.16 PEFT had one kernel for all channels whatever the groups.
    mixed = groups == 1 and A.shape[1] == channels
    if mixed or not (own == own[0]).all() or A.count_nonzero() != own.count_nonzero():
        return (
            f"its lora_A mixes the channels of all {'its' if mixed else groups} groups, or has another kernel for "
            "each, which no change of a grouped convolution's weight can do: it could not be merged"
        )
    return own[0].flatten(1), B.flatten(1)


def written_stack(A: Tensor, B: Tensor) -> Pair:
    """Return PEFT's pair of a stack, A (experts, rank, in) and B (experts, out, rank), or of one matrix."""
    if A.dim() == 2:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def read_stack(A: Tensor, B: Tensor, experts: int, swapped: bool = False) -> Pair | str:
    """Return the factors of a stack of so many matrices from PEFT's pair; of one matrix when that is 0.

    swapped: the file has factors of the transposed matrices, in which A and B take the place of each other.
    """
    if not experts:
        return A, B
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % experts or A.shape[0] != B.shape[1]:
        return f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors for {experts} experts"
    A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
    return (B.mT.contiguous(), A.mT.contiguous()) if swapped else (A, B)


def read_third(A: Tensor, B: Tensor, third: int) -> Pair | str:
    """Return the factors of one of q, k and v from those of all three, which have A in common."""
    if B.dim() != 2 or B.shape[0] % 3:
        return f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors of q, k and v"
    return A, B.unflatten(0, (3, -1))[third]


def read_merged(A: Tensor, B: Tensor, enabled: Sequence[bool]) -> Pair | str:
    """Return the factors of a whole layer from those of a `MergedLinear` of PEFT 0.1 and 0.2.

    enabled: which of the equal parts of the layer's rows have factors. A (parts · rank, in) is that of one after the
    other, B (parts · rows, columns, 1) a convolution in two groups however many parts there are: each sees half of A.
    """
    parts = sum(enabled)
    halves = A.shape[0] == 2 * B.shape[1] and B.shape[0] % 2 == 0 and B.shape[2] == 1
    if not halves or not parts or B.shape[0] % parts or len(enabled) > _MOST_PARTS:
        return f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no factors of {parts} of {len(enabled)} parts"
    rows = torch.block_diag(*B.flatten(1).chunk(2)).unflatten(0, (parts, -1))
    whole = rows.new_zeros(len(enabled), *rows.shape[1:])
    whole[[i for i, on in enumerate(enabled) if on]] = rows
    return A, whole.flatten(0, 1)
