"""Adapters: small bottlenecks that run behind a block's sublayers (paper, section 5.1, Adapter H, L, P and D)."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapted import base_class
from ..blocks import Anatomy, anatomy_of, stacks_of, width_of
from ..errors import AdapterError, enumerate_names, raise_problems
from ..hosts import NoHost
from ..names import Names, find_modules
from ..variants import materialised
from .base import Arrangement, Baseline, Build, Inserted, register, whole_number_problems


@dataclass(frozen=True)
class Place:
    """Where an adapter goes: a module, the width of its output, and a layer of the base on whose device it belongs."""

    module: str
    width: int
    beside: str
    renormed: bool = False  # the module is a norm, which is run again


@dataclass(frozen=True)
class Bottleneck(Baseline):
    """h + up(σ(down(h))), with biases: 2·d·size + size + d parameters for a width d.

    size: rows of `down` (the paper's r).
    places: names or patterns of the modules behind which the adapters go, for models of whose blocks lorank does not
        know the parts: linear layers, or layer norms. Without them, the method's own places.

    `up` starts at zero, so that the model starts as its base. (Houlsby et al. draw both near zero.)
    """

    merges = False
    size: int = 64
    places: tuple[str, ...] = ()
    activation: ClassVar[str] = "relu"
    normed: ClassVar[bool] = False  # a layer norm of its own in front of `down`, which is trained

    def __post_init__(self) -> None:
        problems = whole_number_problems(self, size=1)
        listed = isinstance(self.places, list | tuple)
        places = tuple(self.places) if listed else (self.places,)
        object.__setattr__(self, "places", places)
        if not all(isinstance(place, str) and place for place in places):
            problems.append(f"places are {places!r}; they must be names of modules")
        raise_problems(f"{self.variant} cannot be used", problems)

    @abstractmethod
    def in_block(self, block: str, anatomy: Anatomy, width: int) -> Iterator[Place]:
        """Yield where in a block its adapters go."""

    def of_stack(self, blocks: Sequence[str]) -> Sequence[str]:
        """Return which blocks of a stack get adapters."""
        return blocks

    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        found = list(self._chosen(names) if self.places else self._everywhere(names))
        return Arrangement(inserted={place.module: self._builder(place, names) for place in found})

    def _everywhere(self, names: Names) -> Iterator[Place]:
        stacks = stacks_of(names)
        if not stacks:
            raise AdapterError(f"{self.variant} goes into the blocks of a transformer; this model has none")
        unknown = []
        for blocks in stacks.values():
            for block in self.of_stack(blocks):
                anatomy = anatomy_of(block, names)
                if anatomy is None:
                    unknown.append(block)
                else:
                    yield from self.in_block(block, anatomy, width_of(block, anatomy, names))
        if unknown:
            kind = type(names.modules[unknown[0]]).__name__
            raise AdapterError(
                f"{self.variant}: lorank does not know where the sublayers of {enumerate_names(unknown, 2)} end "
                f"({kind}); name the modules behind which the adapters go: places=[...]"
            )

    def _chosen(self, names: Names) -> Iterator[Place]:
        problems: list[str] = []
        for pattern in self.places:
            found, problem = find_modules(pattern, names)
            problems += [f"places: {problem}"] if problem else []
            for name in found:
                try:
                    yield Place(name, _width(name, names), name, self.renorms(names.modules[name]))
                except NoHost as error:
                    problems.append(f"places: {name}: {error}")
        raise_problems(f"{self.variant} cannot be used", problems)

    def _builder(self, place: Place, names: Names) -> Build:
        beside = names.modules[place.beside]
        kind = Renormed if place.renormed else BottleneckAdapter
        return lambda device: kind(self, place.width, next(beside.parameters()), device)

    def renorms(self, module: nn.Module) -> bool:
        """Tell whether the adapter at a module that a user names is added in front of it, and reads its output."""
        return False


def _width(name: str, names: Names) -> int:
    """Return the width of a module's output; raises NoHost for one behind which nothing can be put."""
    module: Any = names.modules[name]
    if names.read_without_call(name):
        raise NoHost("its weights are read without it being called, so that nothing can be put behind it")
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    host = names.host(name)
    if host.parts(module) != ("weight",) or not host.additive or host.lookup:
        raise NoHost("nothing can be put behind it; name a linear layer or a layer norm")
    return host.shape(module, "weight")[0]


@register("adapter-h")
@dataclass(frozen=True)
class AdapterH(Bottleneck):
    """Houlsby et al. (2019, arXiv 1902.00751): two in a block, behind attention and feed-forward, before the residual.

    With the swish of the paper's own code (microsoft/LoRA, examples/NLU).
    """

    activation = "silu"

    def in_block(self, block: str, anatomy: Anatomy, width: int) -> Iterator[Place]:
        for sublayer in (anatomy.attention, anatomy.feed_forward):
            yield Place(f"{block}.{sublayer.end}", width, f"{block}.{sublayer.projection}")

    def inference(self) -> str:
        return "two bottlenecks more in each block, one after the other; they cannot be merged"


@register("adapter-l")
@dataclass(frozen=True)
class AdapterL(Bottleneck):
    """Lin et al. (2020, arXiv 2004.03829): one behind each block, h + up(relu(down(N(h)))), with a trained norm N."""

    normed = True

    def in_block(self, block: str, anatomy: Anatomy, width: int) -> Iterator[Place]:
        yield Place(block, width, f"{block}.{anatomy.feed_forward.projection}")

    def inference(self) -> str:
        return "a norm and a bottleneck more in each block; they cannot be merged"


@register("adapter-p")
@dataclass(frozen=True)
class AdapterP(Bottleneck):
    """Pfeiffer et al. (2021, arXiv 2005.00247): one in each block, behind the feed-forward part.

    In a block that ends in a norm N of its residual sum u, as BERT's do, it is N(u + f(N(u))) with f the bottleneck
    (microsoft/LoRA, examples/NLU); in others h + f(h) with h the output of the block.
    """

    def in_block(self, block: str, anatomy: Anatomy, width: int) -> Iterator[Place]:
        projection = f"{block}.{anatomy.feed_forward.projection}"
        if anatomy.norm is not None:
            yield Place(f"{block}.{anatomy.norm}", width, projection, renormed=True)
        else:
            yield Place(block, width, projection)

    def renorms(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm)

    def inference(self) -> str:
        return "a bottleneck more in each block, and a second norm where blocks end in one; they cannot be merged"


@register("adapter-d")
@dataclass(frozen=True)
class AdapterD(AdapterP):
    """AdapterDrop (Rücklé et al., 2021, arXiv 2010.11918): as Pfeiffer's, without those of the first blocks.

    drop: how many blocks from the first on get no adapter, in training and after it.
    """

    drop: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = whole_number_problems(self, drop=0)
        if self.places and not problems and self.drop != type(self).drop:
            problems.append("drop counts blocks, and places says itself where the adapters go; give one of the two")
        raise_problems(f"{self.variant} cannot be used", problems)

    def of_stack(self, blocks: Sequence[str]) -> Sequence[str]:
        if self.drop >= len(blocks):
            raise AdapterError(f"adapter-d drops those of the first {self.drop} blocks, and there are {len(blocks)}")
        return blocks[self.drop :]

    def inference(self) -> str:
        return f"a bottleneck more in each block but the first {self.drop}; they cannot be merged"


class BottleneckAdapter(Inserted):
    """The module behind another: y + up(σ(down(y))) for its output y."""

    spec: Bottleneck
    # `up` starts at zero, and what lies in front of it has no gradient before it moves.
    partners = (("down", "down_bias", "norm", "norm_bias", "up", "up_bias"),)

    def __init__(self, spec: Bottleneck, width: int, like: Tensor, device: torch.device | None):
        super().__init__()
        self.spec = spec
        device = device or like.device
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        if spec.normed:
            self.norm, self.norm_bias = empty(width), empty(width)
        self.down, self.down_bias = empty(spec.size, width), empty(spec.size)
        self.up, self.up_bias = empty(width, spec.size), empty(width)
        if not self.down.is_meta:
            with torch.no_grad():
                self.start()

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)
        if self.spec.normed:
            nn.init.ones_(self.norm)
            nn.init.zeros_(self.norm_bias)

    def forward(self, layer: nn.Module, x: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # blocks may return more than their hidden states
            return (y[0] + self.bottleneck(y[0]), *y[1:])
        return y + self.bottleneck(y)

    def bottleneck(self, h: Tensor) -> Tensor:
        """Return what is added, shaped like h (..., width)."""
        materialised(self.down, h)
        own = {name: parameter.to(h.dtype) for name, parameter in self.named_parameters()}
        if self.spec.normed:
            h = F.layer_norm(h, h.shape[-1:], own["norm"], own["norm_bias"])
        inner = getattr(F, self.spec.activation)(F.linear(h, own["down"], own["down_bias"]))
        return F.linear(inner, own["up"], own["up_bias"])

    def extra_repr(self) -> str:
        return str(self.spec)


class Renormed(BottleneckAdapter):
    """The module at a norm N of a block's sum u: N(u + up(σ(down(N(u)))))."""

    behind = False  # the norm is run again, without what others add to its output

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return base_class(layer).forward(layer, x + self.bottleneck(y))
