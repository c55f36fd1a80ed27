"""VeRA: two vectors a layer, trained, around one pair of frozen random matrices that all layers share.

ΔW = diag(b) B diag(d) A, with A (rank, in) and B (out, rank) drawn once, and each layer taking the first columns and
rows that it needs (Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", section 3.2, eq. 2). b starts
at zero and d at a small number. The pair is drawn from a seed, as PEFT draws it, and is no part of the adapter.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, raise_problems
from ..hosts import Host
from .base import Spec, dtype_problems, number_problems, on_device_of, register
from .lora import factor_dtype
from .paired import PairAdapter


@register("vera")
@dataclass(frozen=True)
class VeRA(Spec):
    """Vectors that scale the rows of a pair of random matrices shared by all layers.

    rank: of the pair. It costs no trained parameters beyond one number a layer; the paper takes 256 to 1024.
    dropout: probability with which an element of the update's input is zeroed in training.
    seed: that the pair is drawn from.
    initial: what every element of d starts at.
    dtype: of the vectors; see `LoRA`.
    projection: (out, in) of the pair, at least those of every layer; None to take the largest of the adapted ones.

    Raises AdapterError, naming every field that is wrong.
    """

    bounded = False

    rank: int = 256
    dropout: float = 0.0
    seed: int = 0
    initial: float = 0.1
    dtype: torch.dtype | None = None
    projection: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        problems = number_problems(self, rank="rank", dropout="probability", initial="factor")
        problems += dtype_problems(self.dtype)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed!r}; it must be a whole number of at least 0")
        if isinstance(self.projection, list):
            object.__setattr__(self, "projection", tuple(self.projection))
        if self.projection is not None and not (
            isinstance(self.projection, tuple)
            and len(self.projection) == 2
            and all(isinstance(size, int) and 0 < size < 2**31 for size in self.projection)
        ):
            problems.append(f"projection is {self.projection!r}; it must be two sizes, (out, in), or None")
        raise_problems("VeRA cannot be set up like this", problems)

    @property
    def scale(self) -> float:
        return 1.0

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        if host.lookup:
            return "VeRA's shared matrix would need a column for every token"
        out, in_ = host.shape(layer, part)[-2:]
        if self.projection is not None and (out > self.projection[0] or in_ > self.projection[1]):
            return f"it is {out} x {in_}, and the random pair of this adapter is for {self.projection}"
        return None

    def settled(self, shapes: Sequence[tuple[int, ...]]) -> "VeRA":
        if self.projection is not None or not shapes:
            return self
        largest = max(shape[-2] for shape in shapes), max(shape[-1] for shape in shapes)
        return dataclasses.replace(self, projection=largest)

    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> "VeRAAdapter":
        spec = self.settled([host.shape(layer, part)])
        return VeRAAdapter(spec, host, layer, part, device)

    def pair(self, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank) for a matrix of this shape, float32 on the CPU."""
        if self.projection is None:
            raise AdapterError("the shape of VeRA's random pair is not known before it is put on a model")
        A, B = drawn(self.seed, self.rank, *self.projection)
        return A[:, :in_], B[:out]

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        if shape is None:
            raise AdapterError("VeRA's tensors do not tell the shape of its matrix; give the model")
        d, b = tensors["d"], tensors["b"]
        A, B = self.pair(*shape[-2:])
        return d[..., :, None] * A.to(d), b[..., :, None] * B.to(b)

    def __str__(self) -> str:
        return f"VeRA, rank {self.rank}"


@functools.lru_cache(maxsize=4)
def drawn(seed: int, rank: int, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank), uniform in ±√(6 / columns), from the CPU: the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.inference_mode(False):  # it is kept, and may be trained with later
        A, B = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((rank, in_), (out, rank)))
        for matrix in (A, B):
            bound = 3**0.5 * (2**0.5 / matrix.shape[1] ** 0.5)
            matrix.uniform_(-bound, bound, generator=generator)
    return A, B


@functools.lru_cache(maxsize=8)
def drawn_on(
    seed: int, rank: int, out: int, in_: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `drawn` on a device in a dtype; layers share it."""
    A, B = drawn(seed, rank, out, in_)
    with torch.inference_mode(False):
        return A.to(device, dtype), B.to(device, dtype)


def shared_pair(spec: VeRA, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the pair that layers share."""
    assert spec.projection is not None, "settled before anything is built"
    return drawn_on(spec.seed, spec.rank, *spec.projection, device, dtype)


# What torch.compiler.assume_constant_result does, which would import the compiler: it would trace the drawing.
vars(shared_pair)["_dynamo_marked_constant"] = True


class VeRAAdapter(PairAdapter):
    """d (rank,) and b (out,); of a stack of n matrices each with n in front."""

    partners = (("d", "b"),)
    outward = ("b",)

    def __init__(self, spec: VeRA, host: Host, layer: nn.Module, part: str, device: torch.device | None = None):
        super().__init__(spec, host, part)
        weight = host.weight(layer, part)
        *stack, self.out, self.in_ = host.shape(layer, part)
        like: dict[str, Any] = {"device": device or weight.device, "dtype": factor_dtype(spec, weight)}
        self.d = nn.Parameter(torch.empty(*stack, spec.rank, **like))
        self.b = nn.Parameter(torch.empty(*stack, self.out, **like))
        if self.d.device.type != "meta":
            self.reset_parameters(layer)

    def reset_parameters(self, layer: nn.Module) -> None:
        weight = self.host.weight(layer, self.part)
        self.d, self.b = on_device_of(self.d, weight), on_device_of(self.b, weight)
        nn.init.constant_(self.d, self.spec.initial)
        nn.init.zeros_(self.b)

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B = shared_pair(self.spec, self.d.device, self.d.dtype)
        return self.d[..., :, None] * A[:, : self.in_], self.b[..., :, None] * B[: self.out]

    def at_start(self, layer: nn.Module) -> bool:
        return self.d.is_meta or not (self.d.detach().any() and self.b.detach().any())
