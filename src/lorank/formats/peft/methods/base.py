"""A method of PEFT: which of ours it is, and in which settings and tensors PEFT keeps it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ....errors import AdapterError, enumerate_names
from ....hosts import ConvHost, LinearHost
from ....variants import DoRA, Spec
from ...content import Content, LayerUpdate
from ..layout import MATRIX, PARTS, Layout

# Settings of every method that say for what and whom an adapter is, and nothing about its tensors.
_COMMON = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("trainable_token_indices", "layers_pattern", "fan_in_fan_out", "init_weights"),
        *("rank_pattern", "alpha_pattern"),
    }
)


class Method(ABC):
    """How PEFT writes one of its methods, there and back."""

    peft_type: ClassVar[str]
    specs: ClassVar[tuple[type[Spec], ...]]  # of ours that are written as this one
    adapted_bias: ClassVar[str | None] = None  # what `bias` says when the biases of adapted layers are trained
    rank_setting: ClassVar[str] = "r"
    alpha_setting: ClassVar[str | None] = "alpha"
    pairs: ClassVar[bool] = False  # each update is one pair of factors in the file, whatever the method
    rank_patterns: ClassVar[bool] = True  # layers may differ in rank and alpha
    suffixes: ClassVar[dict[str, str]]  # {name of a tensor of ours: end of PEFT's key}
    harmless: ClassVar[frozenset[str]] = frozenset()  # settings that say how it was trained, beside those of every one
    meaningful: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # settings, with the values that lorank can honour

    @property
    def known(self) -> frozenset[str]:
        """The settings that need no remark."""
        bias = {"bias"} if self.adapted_bias else set()
        return _COMMON | self.harmless | self.meaningful.keys() | {self.rank_setting, str(self.alpha_setting)} | bias

    @abstractmethod
    def layout(self, update: LayerUpdate) -> Layout:
        """Return how the tensors of an update lie in the file."""

    def rank_alpha(self, update: LayerUpdate, part: str) -> tuple[int, float | None]:
        """Return rank and alpha that make PEFT compute what a part of an update does.

        Its scale is alpha / rank, for all methods but LoRA whatever use_rslora says.
        """
        spec = update.spec_of(part)
        return spec.rank, spec.scale * spec.rank

    @abstractmethod
    def settings(self, content: Content) -> dict[str, Any]:
        """Return the settings that only this method has; rank, alpha and targets are not among them."""

    @abstractmethod
    def spec(self, config: Mapping[str, Any]) -> Spec:
        """Return the spec that the settings describe, of a layer without exceptions.

        Raises AdapterError for values that make none.
        """

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return what else about the settings cannot be honoured."""
        return []

    def match(self, path: str) -> tuple[str, str] | None:
        """Return (layer, name of our tensor) for the path of a tensor of this method; None for another tensor."""
        for name, suffix in self.suffixes.items():
            if path == suffix or path.endswith(f".{suffix}"):
                return path.removesuffix(suffix).removesuffix("."), name
        return None

    def written(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors of a part shaped as PEFT has them; `shape` is that of the layer's parameter."""
        return dict(tensors)

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of a file shaped as ours are."""
        return dict(tensors)

    def read(self, tensors: Mapping[str, Tensor], spec: Spec) -> Spec:
        """Return the spec of a layer with these tensors, where they can say more of it than the settings."""
        return spec

    def beside_pair(self, update: LayerUpdate, part: str) -> dict[str, Tensor]:
        """Return what a layer has beside its pair of factors, shaped as PEFT has it."""
        return {}

    def shared(self, content: Content) -> dict[str, Tensor]:
        """Return tensors that all layers have together, by PEFT's key."""
        return {}

    def take_shared(self, rest: dict[str, Tensor], spec: Spec) -> Spec:
        """Take such tensors out of a file's others; return the spec with what they say.

        Raises AdapterError for what cannot be kept.
        """
        return spec


def lycoris_layout(update: LayerUpdate) -> Layout:
    """Return how the methods that PEFT has from LyCORIS lie in its file: it has them of these layers alone."""
    host = update.host
    linear = type(host) is LinearHost
    conv = isinstance(host, ConvHost) and len(update.shapes["weight"]) in (3, 4)
    return Layout(MATRIX if host is None or linear or conv else PARTS)


METHODS: dict[str, Method] = {}  # by PEFT's name


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name in PEFT's configuration."""
    METHODS[method.peft_type] = method()
    return method


def method_of(content: Content) -> Method:
    """Return the method that PEFT writes an adapter's updates as; raises AdapterError when it has none for all.

    DoRA is a setting of LORA, and like the method one for all layers.
    """
    layers: dict[tuple[str, bool], list[str]] = {}
    for name, spec in [(n, u.spec_of(part)) for n, u in content.updates.items() for part in u.tensors]:
        layers.setdefault((_written_as(spec), isinstance(spec, DoRA)), []).append(name)
    if len(layers) > 1:
        groups = [
            f"{'DORA' if dora else called} ({enumerate_names(dict.fromkeys(of), 3)})"
            for (called, dora), of in layers.items()
        ]
        raise AdapterError(f"PEFT has one method for all layers of an adapter, and this one has {' and '.join(groups)}")
    return METHODS[next(iter(layers))[0] if layers else _written_as(content.spec)]


def _written_as(spec: Spec) -> str:
    """Return PEFT's name of a spec's method; raises AdapterError where it has none."""
    found = next((name for name, method in METHODS.items() if type(spec) in method.specs), None)
    if found is None:
        raise AdapterError(f"PEFT's layout has no method for {type(spec).__name__}")
    return found
