"""New tokens: of an embedding and an output head only the rows of some tokens are trained, and saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import enumerate_names
from .hosts import AdditiveHost, Host, NoHost
from .names import Names, find_modules
from .tied import Tie, sharing, tie_of
from .ties import Ties
from .variants import Update, materialised, on_device_of


class TokenRows(Update):
    """A trained change of some rows of a weight (vocabulary, dimension): what new tokens are, and nothing else.

    An offset and not a value, so that several adapters add up, and that merging another base under it changes nothing.
    """

    def __init__(self, host: Host, layer: nn.Module, ids: Sequence[int], device: torch.device | None = None):
        super().__init__()
        self.host, self.part = host, "weight"
        weight = host.weight(layer, "weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = device or weight.device
        self.tokens = tuple(sorted(ids))
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(self.tokens, device=device), persistent=False)  # (tokens,)
        self.offset = nn.Parameter(torch.zeros(len(ids), row_size(layer), device=device, dtype=dtype))

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._add(self.host, layer, x, y)

    def run_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        return self._add(host, layer, x, y)

    def _add(self, host: Host, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(host, AdditiveHost), "embeddings and linear layers are"
        offset = materialised(self.offset, x).to(y.dtype)
        if not host.lookup:  # a head: logits of these tokens
            return y.index_add(-1, self.ids, F.linear(x.to(y.dtype), offset))
        position = torch.searchsorted(self.ids, x).clamp_max(len(self.ids) - 1)
        found = F.embedding(position, offset) * (self.ids[position] == x)[..., None]
        scaled: Any = getattr(host, "scaled", None)
        return y + (found if scaled is None else scaled(layer, found))

    def delta_weight(self, layer: nn.Module) -> Tensor:
        offset = materialised(self.offset, self.host.own(layer))
        rows = offset.new_zeros(row_count(layer), row_size(layer)).index_copy(0, self.ids, offset)
        return rows.T if self.host.lookup else rows

    def values(self, layer: nn.Module) -> Tensor:
        """Return the whole trained rows, (tokens, dimension), in the offset's dtype."""
        return self.rows_of_base(layer) + self.offset.detach()

    def rows_of_base(self, layer: nn.Module) -> Tensor:
        """Return the rows of the base's weight, (tokens, dimension)."""
        W = self.host.matrix(layer, "weight").detach()
        return (W.T if self.host.lookup else W)[self.ids].to(self.offset.dtype)

    def reset_parameters(self, layer: nn.Module) -> None:
        self.offset = on_device_of(self.offset, self.host.own(layer))
        self.ids = torch.tensor(self.tokens, device=self.offset.device)  # on the meta device they had no values
        nn.init.zeros_(self.offset)

    def at_start(self, layer: nn.Module) -> bool:
        return self.offset.is_meta or not self.offset.detach().any()

    def extra_repr(self) -> str:
        return f"tokens={len(self.ids)}"


@dataclass
class Tokens:
    """The layers of which rows are trained, and those that mirror them."""

    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ties: dict[str, tuple[Host, Tie]] = field(default_factory=dict)


def row_size(layer: Any) -> int:
    """Return the numbers in one token's row of an embedding or a head."""
    return layer.embedding_dim if hasattr(layer, "embedding_dim") else layer.in_features


def row_count(layer: Any) -> int:
    """Return the number of tokens of which an embedding or a head has a row."""
    return layer.num_embeddings if hasattr(layer, "num_embeddings") else layer.out_features


def find_tokens(
    model: nn.Module,
    wanted: Sequence[int] | Mapping[str, Sequence[int]],
    names: Names,
    ties: Ties,
    problems: list[str],
) -> Tokens:
    """Return where `train_tokens` puts its rows; what is wrong goes into `problems`.

    Token numbers alone mean the model's input embedding and its output head, as one where they are tied.
    """
    found = Tokens()
    if isinstance(wanted, str) or not isinstance(wanted, Sequence | Mapping):
        problems.append(f"train_tokens is {wanted!r}; give token numbers, or {{layer: token numbers}}")
        return found
    chosen: dict[str, Sequence[int]] = {}
    if isinstance(wanted, Mapping):
        for pattern, ids in wanted.items():
            matched, problem = find_modules(pattern, names)
            problems += [f"train_tokens {problem}"] if problem else []
            for name in matched:
                if chosen.setdefault(name, ids) != ids:
                    problems.append(f"train_tokens gives {name} two lists of token numbers")
    elif wanted:
        layers = _input_and_output(model, names)
        if not layers:
            problems.append(
                "train_tokens: this model does not say which layer embeds its tokens; give {layer: numbers}"
            )
        chosen.update(dict.fromkeys(layers, wanted))
    for name, ids in chosen.items():
        try:
            _put_rows(name, ids, names, ties, found)
        except NoHost as error:
            problems.append(f"train_tokens: {name}: {error}")
    return found


def _put_rows(name: str, ids: Sequence[int], names: Names, ties: Ties, found: Tokens) -> None:
    """Put rows of a layer where they belong: to the first of the layers that share its weight; the others mirror it."""
    host = names.host(name)
    _check_layer(names.modules[name], host)
    _check_ids(ids, host.shape(names.modules[name], "weight")[1 if host.lookup else 0])
    group = [name, *sharing(name, "weight", host, names, ties)]
    source = next(other for other in names.modules if other in group)
    source_host = host if source == name else names.host(source)
    rows = tuple(sorted(ids))
    if found.rows.setdefault(source, rows) != rows:
        raise NoHost(f"it shares its weight with {enumerate_names(group[1:])}, of which other tokens are named")
    for other in group:
        if other != source:
            found.ties[other] = tie_of(other, source, source_host, names)


def _input_and_output(model: nn.Module, names: Names) -> list[str]:
    first = {id(module): name for name, module in reversed(names.modules.items())}
    layers = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        find = getattr(model, method, None)
        layer = find() if callable(find) else None
        if layer is not None and id(layer) in first:
            layers.append(names.canonical[first[id(layer)]])
    if not layers:
        embeddings = [n for n, m in names.modules.items() if isinstance(m, nn.Embedding) and names.canonical[n] == n]
        layers = embeddings if len(embeddings) == 1 else []
    return list(dict.fromkeys(layers))


def _check_layer(layer: nn.Module, host: Host) -> None:
    if host.transposed or not (isinstance(layer, nn.Embedding | nn.Linear) or host.quantised):
        raise NoHost(f"a {type(layer).__name__} has no rows of tokens")


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    listed = isinstance(ids, Sequence) and not isinstance(ids, str)
    if not listed or not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise NoHost(f"token numbers are whole numbers; got {ids!r}")
    if len(set(ids)) < len(ids):
        raise NoHost("a token is named twice")
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise NoHost(
            f"there is no token {outside[0]} in a vocabulary of {vocabulary}; resize_token_embeddings makes room for "
            "new ones"
        )
