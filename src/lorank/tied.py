"""Layers that share one weight, adapted as one: the update sits on the first, and the others mirror it.

So an embedding and a head with one weight compute with the same W + ΔW, and merging writes it once, tie unbroken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import AdapterError
from .hosts import Host, NoHost
from .names import Names
from .ties import Ties
from .variants import Adapter, Update


@dataclass(frozen=True)
class Tie:
    """How a layer mirrors the update of another."""

    source: str  # the layer that has the update
    transposed: bool  # its matrix is the other's, transposed: an embedding and a head


class Mirror(Adapter):
    """The update of another layer, for a layer that has the same weight."""

    source: Update

    def __init__(self, source: Update, host: Host, tie: Tie):
        super().__init__()
        vars(self)["source"] = source  # no part of this one: what both layers share, the other has
        self.host, self.tie, self.additive = host, tie, source.additive

    def leaves(self) -> Iterator[Adapter]:
        yield self

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.tie.transposed:
            return self.source.run_mirrored(self.host, layer, "weight", x, y)
        return self.source(layer, x, y)

    def adds(self, layer: nn.Module) -> bool:
        return self.source.host.additive and self.host.additive

    def attribute(self, layer: nn.Module) -> str:
        return self.host.attribute(layer, "weight")

    def change(self, layer: nn.Module) -> Tensor:
        delta = self.source.delta_weight(layer)
        return self.host.stored(layer, "weight", delta.mT if self.tie.transposed else delta)

    def reset_parameters(self, layer: nn.Module) -> None:
        """Leave the source as it is: it is reset by itself."""

    def extra_repr(self) -> str:
        return f"of {self.tie.source}"


WEIGHT, TOKENS = "weight", "tokens"  # names among a layer's parts: the update of its matrix, and its trained rows


def mirrors(
    tied: Mapping[str, tuple[Host, Tie]], parts: Mapping[str, Mapping[str, Adapter]], whole: bool
) -> dict[str, dict[str, Adapter]]:
    """Return the mirrors of the updates in `parts`, {layer: {part: adapter}}, for the layers that are tied.

    whole: of all updates; otherwise of rows of tokens alone.

    Raises AdapterError for a method that cannot be mirrored.
    """
    found: dict[str, dict[str, Adapter]] = {}
    for name, (host, tie) in tied.items():
        for part in (WEIGHT, TOKENS) if whole else (TOKENS,):
            source = parts.get(tie.source, {}).get(part)
            if isinstance(source, Update):
                if tie.transposed and type(source).run_mirrored is Update.run_mirrored:
                    raise AdapterError(
                        f"cannot adapt: {name} has the weight of {tie.source} transposed, and "
                        f"{type(source).__name__} has no form for that (run_mirrored); leave out tie=True"
                    )
                found.setdefault(name, {})[part] = Mirror(source, host, tie)
    return found


def sharing(name: str, part: str, host: Host, names: Names, ties: Ties) -> list[str]:
    """Return the other layers that have the weight of a layer as theirs, by their first names."""
    layer = names.modules[name]
    try:
        weight = host.weight(layer, part)
    except NoHost:
        return []
    found = (other.rpartition(".") for other in ties.others(layer, weight))
    return list(dict.fromkeys(names.canonical[owner] for owner, _, key in found if key == "weight"))


def tie_of(name: str, source: str, source_host: Host, names: Names) -> tuple[Host, Tie]:
    """Return how a layer mirrors the update of the whole weight of `source`; raises NoHost where it cannot."""
    host = names.host(name)
    if host.parts(names.modules[name]) != ("weight",):
        raise NoHost("only layers of one matrix can be tied")
    own, other = host.matrix(names.modules[name], "weight"), source_host.matrix(names.modules[source], "weight")
    if host.quantised or own.data_ptr() == other.data_ptr():  # no copies of the weight, in an order of their own
        if own.shape == other.shape and own.stride() == other.stride() and _run_alike(host, source_host):
            return host, Tie(source, transposed=False)
        if own.shape == other.mT.shape and own.stride() == other.mT.stride():
            return host, Tie(source, transposed=True)
    raise NoHost(f"{name} has only a part of the weight of {source}, or has it in another order")


def _run_alike(host: Host, source_host: Host) -> bool:
    """Tell whether a layer can run the update of another as that does; one that reads W + ΔW always can."""
    return type(host) is type(source_host) or not (host.additive and source_host.additive)
