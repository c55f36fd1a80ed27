"""The paper's numbers of trained parameters beside those of the modules that are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from typing import Any

import torch
from torch import nn

from ..baselines import Full
from ..copies import count
from ..extras import require
from ..planning import plan
from ..shapes import configuration_of
from .paper_rows import ROWS, Row

_UNITS = {"M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Verdict:
    """A row of the paper, counted."""

    row: Row
    counted: int
    verdict: str  # exact: rounded, it is what is printed; rounded: so it is when rounded in another way; differs
    reason: str


def verdicts(rows: Sequence[Row] | None = None) -> Iterator[Verdict]:
    """Yield what the paper prints beside what its modules have. No weights are loaded.

    Every number is that of the parameters of modules on the meta device.
    """
    for row in ROWS if rows is None else rows:
        counted = trained_parameters(row)
        verdict, how = compare(row.printed, counted)
        reasons = [] if verdict == "exact" else [how, row.reason]
        yield Verdict(row, counted, verdict, "; ".join(filter(None, reasons)))


@cache
def trained_parameters(row: Row) -> int:
    """Return how many parameters a row trains."""
    model = _model(row.model, row.pooler)
    if isinstance(row.method[0], Full):
        return count(model.parameters())
    return plan(model, list(row.method), list(row.targets) or None).trainable_parameters


def compare(printed: str, counted: int) -> tuple[str, str]:
    """Return a verdict on a printed number, such as 0.35M, and in which way it was rounded."""
    digits, unit = Decimal(printed[:-1].replace(",", "")), _UNITS[printed[-1]]
    last = Decimal(1).scaleb(int(digits.as_tuple().exponent))

    def to_its_digits(by: int, rounding: str) -> Decimal:
        return (Decimal(counted) / by).quantize(last, rounding)

    if to_its_digits(unit, ROUND_HALF_UP) == digits:
        return "exact", ""
    if unit == 10**6 and to_its_digits(2**20, ROUND_HALF_UP) == digits:
        return "rounded", f"in units of 2^20; in millions it is {counted / unit:,.2f}"
    if to_its_digits(unit, ROUND_DOWN) == digits:
        return "rounded", f"cut, not rounded: {counted / unit:,.2f}{printed[-1]}"
    return "differs", ""


@cache
def _model(name: str, pooler: bool) -> nn.Module:
    transformers: Any = require("transformers", "building a model")
    config = configuration_of(name)
    decoder = config.model_type == "gpt2"
    kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    options = {"add_pooling_layer": pooler} if config.model_type == "roberta" else {}
    with torch.device("meta"):
        return kind.from_config(config, **options)
