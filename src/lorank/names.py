"""The modules of a model by name: which a pattern selects, which host each has, and who reads its weight."""

import re
from collections.abc import Callable, Collection, Iterable

from torch import Tensor, nn

from .errors import did_you_mean, enumerate_names
from .hosts import PARAMETER, AdditiveHost, FusedHost, Host, NoHost, host_of, layout_of
from .reading import read_without_call
from .tree import base_modules


class Names:
    """All modules of a model by every name they go by; the first name of each is the one that counts."""

    def __init__(self, model: nn.Module):
        self.modules: dict[str, nn.Module] = {}
        self.canonical: dict[str, str] = {}
        self.aliases: dict[str, list[str]] = {}  # by the first name, itself among them
        first: dict[int, str] = {}
        for name, module in base_modules(model):
            self.modules[name] = module
            self.canonical[name] = first.setdefault(id(module), name)
            self.aliases.setdefault(self.canonical[name], []).append(name)

    def parent(self, name: str) -> tuple[nn.Module | None, str]:
        """Return the module that holds `name`, and the name it has there."""
        path, _, child = name.rpartition(".")
        return (self.modules[path] if name else None), child

    def matching(self, pattern: str) -> list[str]:
        """Return the first names of the modules that a name or pattern selects, in the model's order."""
        matches = matcher(pattern)
        return list(dict.fromkeys(self.canonical[name] for name in self.modules if name and matches(name)))

    def host(self, name: str, parts: Collection[str] | None = None) -> Host:
        """Return the host of a layer, or the one that knows these parts of it; raises NoHost with the reason."""
        layer = self.modules[name]
        if parts is not None and PARAMETER.parts(layer) and set(parts) <= set(PARAMETER.parts(layer)):
            try:
                host = host_of(layer)
                return host if set(parts) <= set(host.parts(layer)) else PARAMETER
            except NoHost:
                return PARAMETER
        host = host_of(layer)
        if parts is None or set(parts) <= {*host.parts(layer), *host.children(layer)}:
            return host
        if not isinstance(host, AdditiveHost) or host.parts(layer) != ("weight",):
            known = [*host.parts(layer), *host.children(layer)]
            unknown = [part for part in parts if part not in known]
            raise NoHost(f"it has no part {enumerate_names(unknown)}; its parts are {', '.join(known)}")
        owner, child = self.parent(name)
        if owner is None:
            raise NoHost("it stands alone, and the layout of its parts is known by the module that holds it")
        fused = FusedHost(host, layout_of(owner, child, layer, host.shape(layer, "weight")[0]))
        unknown = [part for part in parts if part not in fused.parts(layer)]
        if unknown:
            known = ", ".join(fused.parts(layer))
            raise NoHost(f"it has no part {enumerate_names(unknown)}; its parts are {known}")
        return fused

    def parameters_matching(self, pattern: str) -> list[tuple[str, str]]:
        """Return (module, parameter) for each parameter that a name or pattern selects, but not its whole module.

        Only matrices and stacks of them count, and each by the first name of its module.
        """
        matches = matcher(pattern)
        found = (
            (self.canonical[name], key)
            for name, module in self.modules.items()
            if not matches(name)
            for key in PARAMETER.parts(module)
            if matches(f"{name}.{key}".removeprefix("."))
        )
        return list(dict.fromkeys(found))

    def endings(self, kind: Callable[[nn.Module], bool] = lambda module: True) -> list[str]:
        """Return the last components of the names of all modules of a kind, most frequent first."""
        counts: dict[str, int] = {}
        for name, module in self.modules.items():
            ending = name.rpartition(".")[2]
            if ending and not ending.isdigit() and kind(module):
                counts[ending] = counts.get(ending, 0) + 1
        return sorted(counts, key=lambda ending: -counts[ending])

    def read_without_call(self, name: str, above: str | None = None) -> frozenset[str]:
        """Return which of "weight" and "bias" of a layer are read by modules above it, under any of its names.

        above: a module around the layer, of which only those further up count.
        """
        return frozenset(
            attribute
            for other in self.aliases[self.canonical[name]]
            for attribute in read_without_call(other, self.modules.__getitem__, above)
        )

    def why_not(self, name: str, parts: Collection[str] | None = None) -> str | None:
        """Return why the layer of this name, or these parts of it, cannot be adapted; None when it can."""
        try:
            self.host(name, parts)
        except NoHost as error:
            return str(error)
        return None


def label_of(layer: str, part: str) -> str:
    """Return what a matrix is called in reports and errors: `h.0.attn.c_attn[q]`, or the layer's name if it is all."""
    if part == "weight":
        return layer
    return f"{layer}[{part}]" if layer else part  # a parameter of the model itself, or a layer that stands alone


def in_order(layers: Iterable[str]) -> list[str]:
    """Return names of layers with layers.9 before layers.10, each once; a file has its tensors in no order."""

    def by_number(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return sorted(set(layers), key=by_number)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by every name they go by, without adapters."""
    return {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in base_modules(model)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return the test for a name or pattern; raises `re.error` for a bad regular expression."""
    if pattern.startswith("re:"):
        expression = re.compile(pattern[3:])
    else:
        text = ".*".join(re.escape(piece) for piece in pattern.split("*"))
        expression = re.compile(rf"(?:.*\.)?{text}", re.DOTALL)
    return lambda name: expression.fullmatch(name) is not None


def find_modules(pattern: str, names: Names) -> tuple[list[str], str | None]:
    """Return the names of the modules of any kind that a pattern selects, or a problem."""
    try:
        found = names.matching(pattern)
    except re.error as error:
        return [], f"'{pattern}' is not a regular expression: {error}"
    if found:
        return found, None
    return [], f"'{pattern}' names no module; {did_you_mean(pattern, names.endings(), 'modules here end in')}"


def lies_in(name: str, tops: Iterable[str]) -> bool:
    """Tell whether a dotted name is one of `tops`, or of something in one of them."""
    return any(name == top or name.startswith(top + ".") for top in tops)
