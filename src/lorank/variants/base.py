"""Variant: a spec that a user writes and a file stores, and the adapter module it builds for one matrix."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError, dtype_name
from ..fingerprint import Fingerprint, fingerprint
from ..hosts import Host, NoHost


class Adapter(nn.Module, ABC):
    """One trainable change of one layer, used while it is active.

    It never owns the layer: the layer is an argument, as it is for a `Host`.
    """

    additive: bool = True  # y + f(x): any number of such adapters may be active together
    behind: bool = False  # f(y): it runs on what the layer gives with all others
    prepares: bool = False  # it changes the layer's input, in `prepare`
    # Groups of parameters of which some are zero at the start, so that the others have no gradient before these move.
    partners: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output from the layer's input x and its output so far y."""

    def prepare(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer and its adapters are to be given in the place of the input x."""
        return x

    def adds(self, layer: nn.Module) -> bool:
        """Tell whether `forward` can add this to the layer's output; if not, the layer has to read `change`."""
        return True

    @abstractmethod
    def attribute(self, layer: nn.Module) -> str:
        """Return the name of the layer's parameter that this changes; "" when it changes none."""

    @abstractmethod
    def change(self, layer: nn.Module) -> Tensor:
        """Return what this adds to that parameter, in its shape and with gradient: for what reads the parameter."""

    def leaves(self) -> Iterator["Adapter"]:
        """Yield the adapters that hold the parameters: itself, unless it is made of several."""
        yield self

    @abstractmethod
    def reset_parameters(self, layer: nn.Module) -> None:
        """Initialise the parameters in place, so that the adapted layer computes what the layer does."""


def materialised(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a parameter or what is made of it; raises AdapterError for the meta device in a computation with numbers.

    PyTorch would multiply with it without an error, and return whatever was in memory.
    """
    if tensor.is_meta and not like.is_meta:
        raise AdapterError("this adapter is still on the meta device: load it, or call lorank.reset to initialise it")
    return tensor


T = TypeVar("T", bound=Tensor)


def on_device_of(tensor: T, like: Tensor) -> T:
    """Return a parameter or buffer, or an empty one on the device of `like` when it is on the meta device alone."""
    if tensor.is_meta and not like.is_meta:
        made = torch.empty_like(tensor, device=like.device)
        return cast(T, nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)
    return tensor


class Update(Adapter):
    """An adapter that is an update ΔW of one of the layer's matrices."""

    spec: Any  # the `Spec` that built it; each method declares its own
    host: Host
    part: str
    # Parameters on the side of the output, as B is: those that learn faster in LoRA+.
    outward: ClassVar[tuple[str, ...]] = ()
    exhausted: bool = False  # a budget has taken all its ranks from it: it rightly gets no gradient
    base: Fingerprint | None = None  # of the matrix that it was trained on, as far as that is known
    other_base_allowed: bool = False  # it was loaded onto another, by the user's wish

    @abstractmethod
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """Return ΔW (out, in) in float32, such that the layer under W + ΔW computes what `forward` returns."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that make it, by the names that `Spec.low_rank` and the file formats know them by."""
        return dict(self.state_dict(keep_vars=True))

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take copies of tensors, in the dtypes of its own, in the place of those; all must be given."""
        for name, own in self.tensors().items():
            values = tensors[name].to(device, own.dtype, copy=True)
            if isinstance(own, nn.Parameter):
                self._parameters[name] = nn.Parameter(values, requires_grad=own.requires_grad)
            else:
                self._buffers[name] = values

    def rebase(self, layer: nn.Module) -> None:
        """Start from the base that is there now, which has replaced another before anything was trained."""

    def why_not_saved(self) -> str | None:
        """Return why there is nothing to save yet; None when there is."""
        return None

    def largest_change(self) -> float | None:
        """Return a bound of the numbers in ΔW that is cheap to compute; None where there is none."""
        return None

    def run_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output of another layer, which has the transpose of this one's matrix as its own.

        Raises NotImplementedError where the method has no such form; then tied weights cannot be adapted as one.
        """
        raise NotImplementedError

    def remember_base(self, layer: nn.Module) -> None:
        """Note what the matrix is that this is trained on: some of its values, for `merge` to know it again."""
        if self.host.quantised:
            return  # it would have to be unpacked for that, and nothing is loaded into it
        with suppress(NoHost):  # sharded since
            W = self.host.matrix(layer, self.part)
            self.base = None if W.is_meta else fingerprint(W, samples_alone=True)

    @torch.no_grad()
    def at_start(self, layer: nn.Module) -> bool:
        """Tell whether the update is zero still."""
        return not self.delta_weight(layer).any()

    def adds(self, layer: nn.Module) -> bool:
        return self.host.additive

    def attribute(self, layer: nn.Module) -> str:
        return self.host.attribute(layer, self.part)

    def change(self, layer: nn.Module) -> Tensor:
        return self.host.stored(layer, self.part, self.delta_weight(layer))


@dataclass(frozen=True)
class Spec(ABC):
    """What a user asks for: frozen, checked when it is made, and stored in the file."""

    rank: int = 8
    variant: ClassVar[str]  # the name in files and on the command line
    bounded: ClassVar[bool] = True  # a rank above the matrix's own is of no use

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor in front of the update."""

    @property
    def factor_rank(self) -> int:
        """How many rows A has in the form that `low_rank` returns, of a matrix of its own."""
        return self.rank

    @abstractmethod
    def build(self, host: Host, layer: nn.Module, part: str, device: torch.device | None = None) -> Update:
        """Return a new adapter for one part of a layer, on the layer's device unless another is given."""

    def why_not(self, host: Host, layer: nn.Module, part: str) -> str | None:
        """Return why the method makes no sense for a part of a layer, as the end of a sentence; None when it does."""
        return None

    def settled(self, shapes: Sequence[tuple[int, ...]]) -> "Spec":
        """Return the spec with what it has to know of all the matrices that get it together, given their shapes."""
        return self

    def overridden(self, **values: Any) -> "Spec":
        """Return the spec with other values for one layer; raises AdapterError for what the method does not have."""
        unknown = values.keys() - {field.name for field in fields(self)}
        if unknown:
            raise AdapterError(f"{type(self).__name__} has no {' and no '.join(sorted(unknown))}")
        return replace(self, **values)

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Return A (..., r, in) and B (..., out, r) with ΔW = scale · B A exactly, of an adapter's tensors.

        shape: of ΔW, for methods whose tensors do not tell it. Raises AdapterError where there is no such form.
        """
        raise AdapterError(f"{type(self).__name__} has no low-rank form apart from its base")

    def factors(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Return A and B as they stand in a file that has a place for what else the method has; else `low_rank`."""
        return self.low_rank(tensors, shape)

    def restored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return the tensors of which `factors` made A and B; raises AdapterError when it cannot have made these."""
        raise AdapterError(f"{type(self).__name__} cannot be told from factors alone")

    def __str__(self) -> str:
        return f"{self.variant} of rank {self.rank}, scale {self.scale:g}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, with the variant's name; equal specs give equal texts."""
        named = {k: dtype_name(v) if isinstance(v, torch.dtype) else v for k, v in asdict(self).items()}
        fractions = {field.name: float(named[field.name]) for field in fields(self) if field.type is float}
        return {"variant": self.variant, **named, **fractions}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Spec":
        """Return the spec that `to_json` described; raises AdapterError for an unknown variant or field."""
        values = dict(stored)
        name = values.pop("variant", None)
        if name not in METHODS:
            raise AdapterError(f"unknown variant {name!r}; this lorank knows {', '.join(sorted(METHODS))}")
        if isinstance(values.get("dtype"), str):
            values["dtype"] = getattr(torch, values["dtype"], values["dtype"])  # what is no dtype, the spec refuses
        try:
            return METHODS[name](**values)
        except TypeError as error:
            raise AdapterError(f"the {name} spec in the file does not fit this lorank: {error}") from None


# What a field of a spec may be, by the rule for it: which values, and how to say that.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda value: isinstance(value, int) and 1 <= value < 2**31, "a whole number of at least 1"),
    "factor": (lambda value: 0 < abs(value) < 1e30, "a finite number other than 0, or nothing would train"),
    "positive": (lambda value: 0 < value < 1e30, "a finite number above 0"),
    "not negative": (lambda value: 0 <= value < 1e30, "a finite number of at least 0"),
    "at least 1": (lambda value: 1 <= value < 1e30, "a finite number of at least 1"),
    "probability": (lambda value: 0 <= value < 1, "a probability in [0, 1)"),
    "share": (lambda value: 0 < value < 1, "a number in (0, 1)"),
}


def number_problems(spec: object, **rules: str) -> list[str]:
    """Return what is wrong with fields of a spec that hold numbers, {field: one of `_RULES`}, or booleans, "flag"."""
    problems = []
    for name, rule in rules.items():
        value = getattr(spec, name)
        if rule == "flag":
            allowed, text = isinstance(value, bool), "True or False"
        else:
            holds, text = _RULES[rule]
            allowed = isinstance(value, int | float) and not isinstance(value, bool) and holds(value)
        if not allowed:
            problems.append(f"{name} is {value!r}; it must be {text}")
    return problems


def dtype_problems(dtype: object) -> list[str]:
    """Return what is wrong with the dtype that a spec asks for."""
    if dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return []
    return [f"dtype is {dtype!r}; it must be torch.float32, bfloat16, float16 or float64, or None"]


S = TypeVar("S", bound=type[Spec])

METHODS: dict[str, type[Spec]] = {}


def register(name: str) -> Callable[[S], S]:
    """Make a spec class known by its name in files and on the command line."""

    def add(spec: S) -> S:
        spec.variant = name
        METHODS[name] = spec
        return spec

    return add
