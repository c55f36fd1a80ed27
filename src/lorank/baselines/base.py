"""Baseline: a method that the paper compares LoRA with, as a spec like a variant's."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..names import Names
from ..tree import base_modules
from ..variants import Adapter, on_device_of

Build = Callable[[torch.device | None], "Inserted"]


@dataclass(frozen=True)
class Arrangement:
    """What a baseline asks of a model: some of the arguments of `adapt`, and modules that it runs with the model's."""

    bias: str = "none"
    train_also: tuple[str, ...] = ()  # modules to train whole, as a copy
    inserted: dict[str, Build] = field(default_factory=dict)  # by module: what is to run with it


@dataclass(frozen=True)
class Baseline(ABC):
    """What a user asks for: frozen, checked when it is made, and stored in the file."""

    variant: ClassVar[str]  # the name in files and on the command line
    merges: ClassVar[bool]  # `merge` leaves the base's own modules and operations, and so no added latency
    pace: ClassVar[float] = 1.0  # how fast it learns beside LoRA at a scale of 2: a rule of thumb for learning rates

    @abstractmethod
    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        """Return what the method needs on a model; raises AdapterError where it makes no sense."""

    @abstractmethod
    def inference(self) -> str:
        """Return what the method costs at inference, as a sentence without its full stop."""

    def around(self) -> int:
        """Return how many special tokens it puts around every prompt."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, with the method's name."""
        return {"variant": self.variant, **json.loads(json.dumps(asdict(self)))}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> "Baseline":
        """Return the baseline that `to_json` described; raises AdapterError for an unknown one or field."""
        values = dict(stored)
        name = values.pop("variant", None)
        if name not in BASELINES:
            raise AdapterError(f"unknown baseline {name!r}; this lorank knows {', '.join(sorted(BASELINES))}")
        try:
            return BASELINES[name](**values)
        except TypeError as error:
            raise AdapterError(f"the {name} in the file does not fit this lorank: {error}") from None

    def __str__(self) -> str:
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        values = ", ".join(f"{name} {value}" for name, value in named.items() if value not in ((), ""))
        return f"{self.variant} ({values})" if values else self.variant


class Inserted(Adapter):
    """What a baseline runs before or behind a module. It changes no weight, so that nothing of it can be merged."""

    spec: Any  # the `Baseline` that built it; each method declares its own
    additive = False
    behind = True

    def attribute(self, layer: nn.Module) -> str:
        return ""  # none

    def change(self, layer: nn.Module) -> Tensor:
        raise NotImplementedError("it changes no parameter of the layer")

    def tensors(self) -> dict[str, Tensor]:
        """Return its parameters by name."""
        return dict(self.named_parameters())

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take copies of tensors in the place of its parameters, in their dtypes."""
        for name, own in self.tensors().items():
            self._parameters[name] = nn.Parameter(tensors[name].to(device, own.dtype, copy=True))

    def reset_parameters(self, layer: nn.Module) -> None:
        for name, own in self.named_parameters():
            self._parameters[name] = on_device_of(own, _own_tensor(layer, like=own))
        with torch.no_grad():
            self.start()

    @abstractmethod
    def start(self) -> None:
        """Initialise the parameters in place."""


def _own_tensor(layer: nn.Module, like: Tensor) -> Tensor:
    """Return a tensor of the base in a module; `like` for one that has none, as dropout."""
    return next((p for _, m in base_modules(layer) for p in m._parameters.values() if p is not None), like)


def whole_number_problems(spec: object, **least: int) -> list[str]:
    """Return what is wrong with fields that hold whole numbers of at least so much."""
    return [
        f"{name} is {getattr(spec, name)!r}; it must be a whole number of at least {lowest}"
        for name, lowest in least.items()
        if not isinstance(getattr(spec, name), int)
        or isinstance(getattr(spec, name), bool)
        or not lowest <= getattr(spec, name) < 2**31
    ]


B = TypeVar("B", bound=type[Baseline])

BASELINES: dict[str, type[Baseline]] = {}


def register(name: str) -> Callable[[B], B]:
    """Make a baseline known by its name in files and on the command line."""

    def add(spec: B) -> B:
        spec.variant = name
        BASELINES[name] = spec
        return spec

    return add
