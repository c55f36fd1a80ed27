"""Patterns of a file: the same answers as `re` for what is supported, AdapterError for the rest."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

import lorank
from lorank.formats import pattern as pattern_module
from lorank.formats.pattern import Pattern

ATOMS = [*"ab1_-", ".", r"\.", r"\-", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S"]
MEMBERS = [*"ab1_.$*", "a-b", "0-9", "+-_", r"\d", r"\w", r"\W", r"\.", r"\]", r"\^"]
QUANTIFIERS = ["*", "+", "?", "{0}", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{2}?", "{0,2}?"]


def character_classes() -> st.SearchStrategy[str]:
    first = st.sampled_from(["", "^", "]", "^]", "-", "^-"])
    members = st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=3).map("".join)
    return st.tuples(st.just("["), first, members, st.sampled_from(["", "-"]), st.just("]")).map("".join)


def larger(patterns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.tuples(st.sampled_from(["(", "(?:"]), patterns, st.just(")")).map("".join)
    repeated = st.tuples(single | groups, st.sampled_from(QUANTIFIERS)).map("".join)
    several = st.lists(patterns, min_size=2, max_size=3)
    return groups | repeated | several.map("".join) | several.map("|".join)


single = st.sampled_from(ATOMS) | character_classes()
patterns = st.recursive(single | st.sampled_from(["", "^", "$"]), larger, max_leaves=8)
names = st.lists(st.text("ab1_-٣", max_size=3), max_size=4).map(".".join)


def as_in_peft(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@settings(max_examples=1500, deadline=None)
@given(patterns, names)
def test_same_answer_as_re(pattern: str, name: str) -> None:
    assert Pattern(pattern).matches_end(name) == as_in_peft(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"layers\.\d+\.attn",
        r"layers\.[0-3]\..*",
        r"^model\.layers\.(0|1)\.attn\.(q|v)_proj",
        r"model\.layers\.1(?:0|1)\.attn",
        "attn.q_proj",
        ".*proj",
        r"[^.]+\.q_proj",
        "attn$.q_proj",
        "",
    ],
)
def test_names_of_layers(pattern: str) -> None:
    layers = [f"model.layers.{i}.attn.{layer}" for i in (0, 1, 2, 10) for layer in ("q_proj", "v_proj", "out")]
    for name in [*layers, "model.layers.1.attn", "layers.10.attn", "q_proj", "xq_proj", "a", ".", ""]:
        assert Pattern(pattern).matches_end(name) == as_in_peft(pattern, name), name


@pytest.mark.parametrize("pattern", [r"[\.-z]", r"[+-\.]", r"[\--\.]", r"[\--a]", r"[^\.-z]"])
def test_range_with_escaped_ends_is_right_or_refused(pattern: str) -> None:
    try:
        compiled = Pattern(pattern)
    except lorank.AdapterError:
        return
    characters = [chr(code) for code in range(32, 127)]
    assert [compiled.matches_end(c) for c in characters] == [as_in_peft(pattern, c) for c in characters]


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*x", "(a?){300}a{300}b", "(((a*)*)*)*b", "(()*)*b"])
def test_catastrophic_pattern_is_no_trouble(pattern: str) -> None:
    length = 50 if "{" in pattern else 5000
    assert not Pattern(pattern).matches_end("a" * length)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=a)a", "only plain"),
        ("(?!a)b", "only plain"),
        ("(?<=a)b", "only plain"),
        ("(?<!a)b", "only plain"),
        ("(?P<name>a)", "only plain"),
        ("(?i)a", "only plain"),
        ("(?>a)", "only plain"),
        (r"(a)\1", r"\1 is not supported"),
        (r"\bq_proj", r"\b is not supported"),
        (r"[\b]", r"\b is not supported"),
        ("(a", "too early"),
        ("a)", "unbalanced )"),
        ("((a)", "too early"),
        ("[a", "too early"),
        ("a\\", "too early"),
        ("*a", "nothing to repeat"),
        ("a|+", "nothing to repeat"),
        ("^*a", "anchor"),
        ("a*+", "possessive"),
        ("a{2", r"written \{"),
        ("a{x}", r"written \{"),
        ("a{1001}", "out of range"),
        ("a{1,1001}", "out of range"),
        ("a{2,1}", "out of range"),
        ("(a{1000}){1000}", "too long"),
        ("a" * 20_001, "too long"),
        ("[b-a]", "range"),
        (r"[a-\d]", "range"),
        ("(" * 60 + "a" + ")" * 60, "too deep"),
        ("a{" + "9" * 5000 + "}", ""),
        ("a" + "{1}" * 2000, ""),
    ],
    ids=lambda text: text[:20],
)
def test_refused(pattern: str, reason: str) -> None:
    with pytest.raises(lorank.AdapterError) as error:
        Pattern(pattern)
    assert repr(pattern) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("pattern", ["(((){1000}){1000}){1000}", "(?:(?:a{0}){1000}){1000}"])
def test_repeating_nothing_costs_nothing(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions are limited, so the work to write them must be too."""
    write: Callable[..., None] = pattern_module._write
    calls = 0

    def counted(*args: object) -> None:
        nonlocal calls
        calls += 1
        assert calls < 100_000, "written out though nothing is repeated"
        write(*args)

    monkeypatch.setattr(pattern_module, "_write", counted)
    try:
        assert Pattern(f"a{pattern}").matches_end("b.a")
    except lorank.AdapterError as error:
        assert repr(f"a{pattern}") in str(error)
