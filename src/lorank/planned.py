"""Plan: what an adapter consists of, and how that is shown."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .adapted import base_class
from .baselines import Baseline, Full, Inserted
from .copies import count, own_parameters
from .errors import enumerate_names
from .hosts import Host, own_parameter
from .names import label_of
from .tied import Tie
from .tokens import row_size
from .variants import Spec

Bias = Literal["none", "adapted", "all"]
Build = Callable[[torch.device | None], Inserted]


@dataclass(frozen=True)
class Place:
    """One matrix that gets an update: a part of a layer, with the spec that holds for it."""

    name: str  # the layer's dotted name
    part: str  # "weight", or a part of a fused projection
    layer: nn.Module = dataclasses.field(repr=False)
    host: Host = dataclasses.field(repr=False)
    spec: Spec
    shape: tuple[int, ...]  # (out, in), or (number, out, in) of a stack

    @property
    def parameters(self) -> int:
        """Numbers that would be trained here, counted on the module itself."""
        built = self.spec.build(self.host, self.layer, self.part, torch.device("meta"))
        return sum(parameter.numel() for parameter in built.parameters())

    @property
    def label(self) -> str:
        """The name with the part: `h.0.attn.c_attn[q]`."""
        return label_of(self.name, self.part)


@dataclass(frozen=True)
class Plan:
    """What an adapter consists of. Printing it shows a table; layers that differ only in numbers share a line."""

    adapter: str
    spec: Spec | None  # of the updates; None when there are none
    places: tuple[Place, ...]
    copies: dict[str, nn.Module] = dataclasses.field(repr=False)  # modules trained whole, as a copy
    biases: dict[str, nn.Module] = dataclasses.field(repr=False)  # layers whose bias is trained
    bias: Bias
    left_out: dict[str, str]  # layers that `all-linear` or `attention` passed over, with the reason
    base_parameters: int
    warnings: tuple[str, ...] = ()
    tied: dict[str, tuple[Host, Tie]] = dataclasses.field(default_factory=dict, repr=False)  # layers that mirror others
    tokens: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # rows that are trained, by layer
    token_layers: dict[str, nn.Module] = dataclasses.field(default_factory=dict, repr=False)
    baselines: tuple[Baseline, ...] = ()
    arranged: tuple[str, ...] = ()  # of the copies, those that a baseline asks for
    inserted: dict[str, tuple[nn.Module, Build]] = dataclasses.field(default_factory=dict, repr=False)  # by module

    @property
    def layers(self) -> list[str]:
        """The names of the layers that get a low-rank update."""
        return list(dict.fromkeys(place.name for place in self.places))

    @property
    def whole(self) -> bool:
        """Whether the base itself is trained, all of it, and there is no adapter."""
        return any(isinstance(baseline, Full) for baseline in self.baselines)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that would be trained: factors, copies, biases, and what baselines insert."""
        if self.whole:
            return self.base_parameters
        inserted = sum(_size(build) for _, build in self.inserted.values())
        copies = sum(count(own_parameters(module)) for module in self.copies.values())
        biases = sum(own_parameter(module, "bias").numel() for module in self.biases.values())
        rows = sum(len(ids) * row_size(self.token_layers[name]) for name, ids in self.tokens.items())
        return sum(place.parameters for place in self.places) + copies + biases + rows + inserted

    def __str__(self) -> str:
        rows: dict[tuple[str, ...], tuple[list[str], int]] = {}

        def add(what: str, layer: nn.Module, shape: str, spec: str, parameters: int) -> None:
            key = (re.sub(r"\b\d+\b", "*", what), base_class(layer).__name__, shape, spec)
            names, total = rows.get(key, ([], 0))
            rows[key] = ([*names, what], total + parameters)

        for place in self.places:
            add(place.label, place.layer, " x ".join(map(str, place.shape)), str(place.spec), place.parameters)
        for name, module in self.copies.items():
            add(name, module, "", "trained whole, as a copy", count(own_parameters(module)))
        for name, module in self.biases.items():
            bias = own_parameter(module, "bias")
            add(f"{name}.bias", module, str(bias.numel()), "trained", bias.numel())
        for name, ids in self.tokens.items():
            size = row_size(self.token_layers[name])
            add(name, self.token_layers[name], f"{len(ids)} rows x {size}", "trained", len(ids) * size)
        for name, (module, build) in self.inserted.items():
            made = build(torch.device("meta"))
            if size := sum(parameter.numel() for parameter in made.parameters()):
                add(name, module, "", str(made.spec), size)
        table = [("layers", "", "kind", "out x in", "", "parameters")]
        table += [(joined(names), f"x {len(names)}", *k[1:], f"{total:,}") for k, (names, total) in rows.items()]
        table = [] if self.whole else table
        widths = [] if self.whole else [max(len(row[i]) for row in table) for i in range(6)]
        lines = [
            "  ".join(
                c.rjust(w) if i in (1, 5) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        trained, base = self.trainable_parameters, self.base_parameters
        whose = "all of the base" if self.whole else f"adapter '{self.adapter}'"
        lines.append(f"{whose}: {trained:,} parameters to train, {trained / max(base, 1):.3%} of {base:,}")
        lines += [
            f"tied: {name} has the weight of {tie.source}, and its update" for name, (_, tie) in self.tied.items()
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left out: {enumerate_names(layers)} ({reason})" for reason, layers in reasons.items()]
        lines += [f"at inference, {baseline.variant}: {baseline.inference()}" for baseline in self.baselines]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def joined(names: Sequence[str]) -> str:
    """Return names that differ only in numbers as one: `layers.{0-11}.q_proj`, `layers.{1,3}.q_proj`."""
    numbers_of = [[int(number) for number in re.findall(r"\b\d+\b", name)] for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers_of, strict=True)]
    every_combination = math.prod(map(len, columns)) == len(names)

    def text(numbers: list[int]) -> str:
        if len(numbers) == 1:
            return str(numbers[0])
        if not every_combination:
            return "*"
        consecutive = numbers == list(range(numbers[0], numbers[-1] + 1))
        return f"{{{numbers[0]}-{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"

    replacements = iter([text(column) for column in columns])
    return re.sub(r"\b\d+\b", lambda match: next(replacements), names[0])


def _size(build: Build) -> int:
    """Return how many numbers are trained in what a baseline would insert."""
    return sum(parameter.numel() for parameter in build(torch.device("meta")).parameters())
