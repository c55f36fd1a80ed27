"""Logical forms are equal where WikiSQL's own Query objects are."""

import random

import pytest

from lorank import AdapterError
from lorank.evaluation import text_scores
from lorank.evaluation.text.logical_form import LogicalForm, logical_form

# The table of the example in WikiSQL's README, with some headers as other tables have them.
HEADERS = ["State/territory", "Text/background colour", "Format", "Current slogan", "# of seats", "Order and rank", ""]
VALUES = ["South Australia", "SOUTH AUSTRALIA", "rock and roll", "7", "7.0", "it's", "notes, new", "a (b)", ""]
AGGREGATES = ["", "MAX", "MIN", "COUNT", "SUM", "AVG"]  # WikiSQL's numbers for them are their places
SIGNS = ["=", ">", "<"]
Query = tuple[int, int, list[tuple[int, int, str]]]  # column, aggregate, conditions


def same(one: Query, other: Query) -> bool:
    """Tell whether WikiSQL's `Query.__eq__` holds, without regard to order."""
    first, second = ({(c, sign, str(value).lower()) for c, sign, value in query[2]} for query in (one, other))
    return one[:2] == other[:2] and first == second


def as_text(query: Query, draw: random.Random) -> str:
    column, aggregate, conditions = query
    selected = f"{AGGREGATES[aggregate]} {HEADERS[column]}" if aggregate else HEADERS[column]
    if aggregate and draw.random() < 0.3:
        selected = f"{AGGREGATES[aggregate].lower()}({HEADERS[column]})" if HEADERS[column] else selected
    quote = draw.choice(["", "'", '"'])
    parts = [f"{HEADERS[c]} {SIGNS[sign]} {quote}{value}{quote}" for c, sign, value in conditions]
    return f"SELECT {selected} FROM table" + (" WHERE " + " AND ".join(parts) if parts else "")


def a_query(draw: random.Random) -> Query:
    conditions = [
        (draw.randrange(len(HEADERS) - 1), draw.randrange(3), draw.choice(VALUES)) for _ in range(draw.randrange(4))
    ]
    return draw.randrange(len(HEADERS) - 1), draw.randrange(6), conditions


def a_neighbour(query: Query, draw: random.Random) -> Query:
    column, aggregate, conditions = query[0], query[1], list(query[2])
    draw.shuffle(conditions)
    change = draw.randrange(6)
    if change == 0:
        column = draw.randrange(len(HEADERS) - 1)
    elif change == 1:
        aggregate = draw.randrange(6)
    elif change == 2 and conditions:
        conditions[0] = (conditions[0][0], conditions[0][1], draw.choice(VALUES))
    elif change == 3 and conditions:
        conditions.append(conditions[0])  # a set: once more says nothing
    elif change == 4:
        conditions = conditions[1:]
    return column, aggregate, conditions


def test_equal_where_wikisql_says_so() -> None:
    draw = random.Random(0)
    counts = {True: 0, False: 0}
    for _ in range(3000):
        query = a_query(draw)
        other = a_neighbour(query, draw)
        texts = as_text(query, draw), as_text(other, draw)
        wanted = same(query, other)
        assert (logical_form(texts[0]) == logical_form(texts[1])) is wanted, texts
        counts[wanted] += 1
    assert min(counts.values()) > 500


def test_the_form_of_a_query() -> None:
    text = 'select count( "Current slogan" ) from table where Notes = "No slogan AND more" and `Order` < 3;'
    conditions = frozenset({("notes", "=", "no slogan and more"), ("order", "<", "3")})
    assert logical_form(text) == LogicalForm("COUNT", "currentslogan", conditions)
    assert logical_form("SELECT FROM table WHERE = 3") == LogicalForm("", "", frozenset({("", "=", "3")}))
    assert logical_form("SELECT From week From table") == LogicalForm("", "fromweek", frozenset())


@pytest.mark.parametrize(
    "text", ["", "I do not know", "SELECT a", "SELECT a FROM", "SELECT a FROM t WHERE b", "FROM t"]
)
def test_what_is_no_query_is_wrong(text: str) -> None:
    assert logical_form(text) is None
    assert text_scores([text, "SELECT b FROM t"], [["SELECT b FROM t"]] * 2, "wikisql") == {"logical-form": 0.5}
    with pytest.raises(AdapterError, match="reference 2 is no query"):
        text_scores(["a", "b"], [["SELECT b FROM t"], [text]], "logical-form")
