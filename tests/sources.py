"""Modules of which only the source matters: what test_reading finds in it, and what not."""

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Source(nn.Module):
    """A module of which only the source matters: it has no attributes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Reads(Source):
    """All ways of reading that count."""

    def forward(self, x: Any) -> Any:
        x = self.a.weight * x + self.a.b.bias + self.items[0].weight + self.groups[1].inner["name"].bias
        x = x @ self.c.weight.T.contiguous() + self.d.weight.to(dtype=x.dtype) + self.e.weight[:, 0].sum()
        if self.f.weight.shape[0] > 1:
            x = x + self.f.weight
        return F.linear(x, self.g.weight, bias=self.g.bias)


class OnlyAsks(Source):
    """What is no reading: what a weight is like, whether there is one, setting up, and the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.made = self.a.weight.sum()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.a.weight)

    def tie_weights(self) -> None:
        self.b.weight = self.a.weight

    def initialise(self) -> None:
        self.a.weight.data.zero_()

    def _init_weights(self, module: Any) -> None:
        self.a.bias.data.zero_()

    def extra_repr(self) -> str:
        return f"{self.a.weight}"

    def forward(self, x: Any) -> Any:
        x = x.to(self.a.weight.dtype).to(self.a.weight.device) + self.a.weight.shape[0] + self.a.weight.size(0)
        if isinstance(self.a.weight, nn.Parameter) and self.a.bias is not None and hasattr(self.a.weight, "grad"):
            x = x + self.a.weight.dim() + self.a.weight.numel()
        self.c.weight = x
        return self.a(x) + self.weight + self.bias


class Inherits(Reads):
    """A class with a method of its own beside those that it inherits."""

    def more(self) -> Any:
        return self.own.weight


class HeadMixin:
    """A class that is no module, for modules to inherit from."""

    embed: Any

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.embed.weight.T


class Mixed(HeadMixin, nn.Module):
    """A module that reads in a method of a mixin."""


def told(method: Any) -> Any:
    """A decorator that says what it wraps."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


def untold(method: Any) -> Any:
    """A decorator that does not."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


class Decorated(Source):
    """Methods that are not plain functions."""

    @told
    def one(self) -> Any:
        return self.a.weight

    @untold
    def two(self) -> Any:
        return self.b.weight

    @torch.no_grad()
    @told
    def three(self) -> Any:
        return self.c.weight

    @property
    def four(self) -> Any:
        return self.d.weight

    @functools.cached_property
    def five(self) -> Any:
        return self.e.weight


class Renames(Source):
    """Layers that are read under names of the method's own."""

    def forward(this, x: Any) -> Any:  # pyright: ignore[reportSelfClsParameterName]
        first, second = this.a, this.b.c
        layers = this.layers
        for layer in layers:
            x = x @ layer.weight
        for i, block in enumerate(this.blocks):
            x = x * i + block.proj.weight
        for up, down in zip(this.ups, this.downs[1:], strict=True):
            x = x @ up.weight + down.bias
        for _, head in this.heads.items():
            x = x + head.weight
        x = x + sum(item.weight for item in reversed(this.items))
        if (last := this.last) is not None:
            x = x + last.weight
        return x @ first.weight + second.bias


class Head(Source):
    """A module that multiplies with a layer that it is given."""

    def forward(self, x: Any, embedding: Any, *, also: Any = None) -> Any:
        return x @ embedding.weight.T + multiply(x, also)


class HandsOn(Source):
    """Layers that are given to modules, to functions, and to methods, which read them or call them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()
        self.heads = nn.ModuleList([Head()])
        names = ["embed", "also", "scale", "own", "member", "called", "twice"]
        self.model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    def forward(self, x: Any) -> Any:
        x = self.head(x, self.model.embed, also=self.model.also)
        x = multiply(x, layer=self.model.scale) + self.biased(x, self.model.own) + passes_on(self.model.twice, x)
        return self.heads[0](x, self.model.member) + run(self.model.called, x) + checkpoint(self.model.called, x)

    def biased(self, x: Any, layer: Any) -> Any:
        return x + layer.bias


def multiply(x: Any, layer: Any) -> Any:
    return x @ layer.weight.T


def passes_on(given: Any, x: Any) -> Any:
    return multiply(x, given)


def run(layer: Any, x: Any) -> Any:
    return layer(x) if layer.weight.dtype == x.dtype else layer(x.to(layer.weight.device))
