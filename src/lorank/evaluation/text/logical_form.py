"""Logical-form accuracy, as WikiSQL's evaluation counts it, of queries that are given as text.

WikiSQL compares {column, aggregate, conditions}: the same column and aggregate, and the same set of conditions
(column, operator, value), whatever their order, with values in lower case. A text is read for it as

    SELECT [MAX | MIN | COUNT | SUM | AVG] column FROM table [WHERE column (= | > | <) value [AND ...]]

in capitals or not, with or without brackets after the aggregate, quotes around columns and values, and a semicolon at
the end. Columns are compared by name, in lower case and without blanks, as WikiSQL finds them. A value is compared as a
text, in lower case: 7 and 7.0 differ. The name of the table is not compared; there is one. A text that cannot be read
so is wrong.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import AdapterError
from .base import Metric, Predictions, References, on_one_line

# WikiSQL has tables with nameless columns, and conditions on empty values.
_QUERY = re.compile(r"SELECT (?:(?P<selected>.+?) )?FROM \S+( (?P<word>WHERE) (?P<where>.+))?", re.IGNORECASE)
_AGGREGATE = re.compile(
    r"(?P<name>MAX|MIN|COUNT|SUM|AVG)(?: ?\( ?(?P<bracketed>.+?) ?\)| (?P<plain>.+))", re.IGNORECASE
)
_CONDITION = re.compile(r"(?P<column>.*?) ?(?P<sign>[=<>]) ?(?P<value>.*)")
_SIGNS = re.compile(r"[=<>]")


@dataclass(frozen=True)
class LogicalForm:
    """A query as it is compared."""

    aggregate: str  # "" for none
    column: str
    conditions: frozenset[tuple[str, str, str]]  # (column, operator, value)


def logical_form(text: str) -> LogicalForm | None:
    """Return a query's logical form; None where the text is no such query."""
    found = _QUERY.fullmatch(on_one_line(text).rstrip("; "))
    if found is None:
        return None
    aggregate, selected = "", found["selected"] or ""
    if of := _AGGREGATE.fullmatch(selected):
        aggregate, selected = of["name"].upper(), of["bracketed"] or of["plain"]
    conditions = [_CONDITION.fullmatch(part) for part in _parts(found["where"] or "", found["word"] or "")]
    if not all(conditions):
        return None
    read = (condition.group("column", "sign", "value") for condition in conditions if condition)
    return LogicalForm(
        aggregate, _column(selected), frozenset((_column(c), sign, _bare(value).lower()) for c, sign, value in read)
    )


def _parts(where: str, word: str) -> list[str]:
    """Return the conditions after a WHERE.

    After one in capitals AND has capitals too, and `rock and roll` is a value. Else an `and` with no sign of its own
    after it is taken for a part of the value, or of the first column.
    """
    parts: list[str] = []
    for piece in re.split(" AND ", where, flags=0 if word.isupper() else re.IGNORECASE) if where else []:
        if parts and not (_SIGNS.search(piece) and _SIGNS.search(parts[-1])):
            parts[-1] += f" and {piece}"
        else:
            parts.append(piece)
    return parts


def _column(name: str) -> str:
    return re.sub(r"\s", "", _bare(name)).lower()


def _bare(text: str) -> str:
    """Return a text without the quotes around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"`" else text


def scores(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return `logical-form`: the share of outputs with the logical form of one of their references."""
    right = 0
    for i, (text, ours) in enumerate(zip(predictions, references, strict=True)):
        wanted = [logical_form(other) for other in ours]
        if None in wanted:
            bad = ours[wanted.index(None)]
            raise AdapterError(f"reference {i + 1:,} is no query that can be compared: {bad!r:.200}")
        right += logical_form(text) in wanted
    return {"logical-form": right / len(predictions)}


METRICS = {"logical-form": Metric(scores, "share of SQL queries with the logical form of a reference (WikiSQL)")}
