"""Readers: the records of published data sets as prompts and completions, as the LoRA paper's experiments have them.

A reader takes a record in any of the forms in which its data set is published, and gives one pair for each text in it.
The forms of E2E, WebNLG and DART are flattened as the converters in microsoft/LoRA, examples/NLG/src, do it. For
WikiSQL and MNLI the paper says what stands in a text and not how it is written down: that is ours.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, did_you_mean, enumerate_names

Record = Mapping[str, Any]
Pair = dict[str, str]

# The categories of WebNLG 2017 that its training data has, as microsoft/LoRA lists them; the others are unseen.
SEEN = frozenset(
    (
        *("Airport", "Astronaut", "Building", "City", "ComicsCharacter"),
        *("Food", "Monument", "SportsTeam", "University", "WrittenWork"),
    )
)
_SLOT = re.compile(r"\s*([^,\[\]]+)\[([^\]]*)\]")
_SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_MNLI = ("entailment", "neutral", "contradiction")


def flattened(records: Iterable[Record], reader: str) -> list[Pair]:
    """Return records as a reader writes them; those that have a prompt and a completion already stay as they are.

    Raises AdapterError for an unknown reader, and for a record that is in none of the forms that it knows.
    """
    known(reader)
    pairs: list[Pair] = []
    for number, record in enumerate(records, start=1):
        if {"prompt", "completion"} <= record.keys():
            pairs.append(dict(record))
            continue
        try:
            pairs += READERS[reader](record)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
            raise AdapterError(
                f"record {number:,} is in no form of {reader} that is known: {what} (its columns are "
                f"{enumerate_names(record)})"
            ) from None
    return pairs


def known(reader: str) -> str:
    """Return the name of a reader; raises AdapterError for one that there is not."""
    if reader not in READERS:
        raise AdapterError(f"there is no reader '{reader}'; {did_you_mean(reader, READERS)}")
    return reader


def unpacked(path: Path, suffix: str, reader: str) -> list[Record] | None:
    """Return the records of a file that only this reader can open; None where any file of its kind will do."""
    if reader == "e2e" and suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [{"line": line} for line in lines if line.strip()]
    if suffix == ".json" and reader in ("webnlg", "dart"):
        try:
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise AdapterError(f"{path} is no whole json file: {error}") from None
        if reader == "webnlg" and isinstance(whole, dict) and "entries" in whole:
            return [entry for numbered in whole["entries"] for entry in numbered.values()]
        if isinstance(whole, list):
            return whole
    return None


def _e2e(record: Record) -> Iterator[Pair]:
    """`slots || text` of Li and Liang's files; or a meaning representation as the challenge writes it, and its text."""
    if "line" in record:
        slots, text = (part.strip() for part in record["line"].split("||"))
        yield {"prompt": slots, "completion": text}
        return
    meaning = _either(record, "mr", "meaning_representation")
    found = _SLOT.findall(meaning)
    if not found:
        raise ValueError(f"{meaning!r:.60} is no list of slots, name[The Vaults], food[French]")
    slots = " | ".join(f"{_SLOT_NAMES.get(name, name)} : {value}" for name, value in found)
    yield {"prompt": slots, "completion": _either(record, "ref", "human_reference").strip()}


def _webnlg(record: Record) -> Iterator[Pair]:
    """The challenge's JSON; the form of `web_nlg` on the hub; or that of GEM."""
    seen = "seen" if record["category"] in SEEN else "unseen"
    if "modifiedtripleset" in record:
        triples = [(t["subject"], t["property"], t["object"]) for t in record["modifiedtripleset"]]
        texts = [text["lex"] for text in record["lexicalisations"] if text["comment"] == "good"]
    elif "modified_triple_sets" in record:
        triples = [_split_triple(triple) for triple in record["modified_triple_sets"]["mtriple_set"][0]]
        lex = record["lex"]
        texts = [text for text, comment in zip(lex["text"], lex["comment"], strict=True) if comment == "good"]
    else:
        triples = [_split_triple(triple) for triple in record["input"]]
        texts = record.get("references") or [record["target"]]
    for text in texts:
        yield {"prompt": _triples(triples), "completion": text, "seen": seen}


def _dart(record: Record) -> Iterator[Pair]:
    """DART's own JSON; the form of `dart` on the hub; or that of GEM. Relations are in small letters."""
    triples = [(subject, relation.lower(), value) for subject, relation, value in record["tripleset"]]
    if "annotations" in record:
        noted = record["annotations"]
        texts = noted["text"] if isinstance(noted, Mapping) else [annotation["text"] for annotation in noted]
    else:
        texts = record.get("references") or [record["target"]]
    for text in texts:
        yield {"prompt": _triples(triples), "completion": text}


def _samsum(record: Record) -> Iterator[Pair]:
    """A conversation, an utterance a line, with an empty line behind it; and its summary. None of an empty one."""
    if record["dialogue"] in (None, ""):
        return
    utterances = record["dialogue"].replace("\r\n", "\n").strip()
    yield {"prompt": f"{utterances}\n\n", "completion": record["summary"].strip()}


def _wikisql(record: Record) -> Iterator[Pair]:
    """The columns of the table and the question; the query as WikiSQL's own code writes it."""
    columns = " | ".join(record["table"]["header"])
    query = record["sql"]["human_readable"]
    yield {"prompt": f"table: {columns}\nquestion: {record['question'].strip()}\n", "completion": query}


def _mnli(record: Record) -> Iterator[Pair]:
    """Premise and hypothesis as text, and the label's name."""
    label = record["label"]
    if isinstance(label, int):
        if label < 0:  # a pair without one
            return
        label = _MNLI[label]
    if label not in _MNLI:
        raise ValueError(f"the label {label!r} is none of {', '.join(_MNLI)}")
    premise, hypothesis = record["premise"].strip(), record["hypothesis"].strip()
    yield {"prompt": f"premise: {premise}\nhypothesis: {hypothesis}\n", "completion": label}


READERS: dict[str, Callable[[Record], Iterator[Pair]]] = {
    "e2e": _e2e,
    "webnlg": _webnlg,
    "dart": _dart,
    "samsum": _samsum,
    "wikisql": _wikisql,
    "mnli": _mnli,
}


def _triples(triples: Iterable[tuple[str, str, str]]) -> str:
    return " | ".join(f"{subject} : {relation} : {value}" for subject, relation, value in triples)


def _split_triple(text: str) -> tuple[str, str, str]:
    subject, relation, value = (part.strip() for part in text.split(" | "))
    return subject, relation, value


def _either(record: Record, first: str, second: str) -> str:
    return record[first] if first in record else record[second]
