"""Readers: every published form of a data set becomes the same prompts and completions."""

import functools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import config

from lorank import AdapterError
from lorank.data import open_source
from lorank.data.readers import READERS, flattened


def only(reader: str, record: dict[str, Any]) -> tuple[str, str]:
    """Return what becomes of a record with one text."""
    (pair,) = flattened([record], reader)
    return pair["prompt"], pair["completion"]


VAULTS = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
SLOTS = "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic"
TEXT = "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30."


def test_e2e() -> None:
    assert only("e2e", {"mr": VAULTS, "ref": TEXT}) == (SLOTS, TEXT)
    assert only("e2e", {"meaning_representation": VAULTS, "human_reference": TEXT}) == (SLOTS, TEXT)
    assert only("e2e", {"line": f"{SLOTS}||{TEXT} "}) == (SLOTS, TEXT)
    assert only("e2e", {"mr": "name[X], familyFriendly[yes]", "ref": "X."})[0] == "name : X | family friendly : yes"


def test_e2e_in_lines(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(f"{SLOTS}||{TEXT}\n\n{SLOTS}||Café.\n")
    pairs = open_source(str(tmp_path / "train.txt"), reader="e2e").to_list()
    assert pairs == [{"prompt": SLOTS, "completion": text} for text in (TEXT, "Café.")]


def test_all_of_e2e_can_be_read() -> None:
    folder = os.environ.get("LORANK_DATA")
    if folder is None:
        pytest.skip("LORANK_DATA names no folder with E2E")
    for name, count, prompts in (("dev", 4672, 547), ("test", 4693, 630)):
        pairs = open_source(f"{folder}/e2e/{name}.csv", reader="e2e")
        assert len(pairs) == count and len(set(pairs["prompt"])) == prompts
        assert all(prompt.startswith("name : ") and "[" not in prompt for prompt in set(pairs["prompt"]))


# As microsoft/LoRA's examples/NLG/data has it, as the challenge's script for the hub gives it, and as GEM does.
SUBJECT, OBJECT = "Aarhus", "Jacob_Bundsgaard"
LEADER = "The leader of Aarhus is Jacob Bundsgaard."
WEBNLG = [
    {
        "category": "Airport",
        "lexicalisations": [
            {"comment": "good", "lang": "", "lex": LEADER, "xml_id": "Id1"},
            {"comment": "bad", "lang": "", "lex": "Aarhus?", "xml_id": "Id2"},
        ],
        "modifiedtripleset": [
            {"object": OBJECT, "property": "leaderName", "subject": SUBJECT},
            {"object": "Denmark", "property": "country", "subject": SUBJECT},
        ],
    },
    {
        "category": "Airport",
        "modified_triple_sets": {
            "mtriple_set": [[f"{SUBJECT} | leaderName | {OBJECT}", f"{SUBJECT} | country | Denmark"]]
        },
        "lex": {"comment": ["good", "bad"], "lid": ["Id1", "Id2"], "text": [LEADER, "Aarhus?"], "lang": ["", ""]},
    },
    {
        "category": "Airport",
        "input": [f"{SUBJECT} | leaderName | {OBJECT}", f"{SUBJECT} | country | Denmark"],
        "target": LEADER,
        "references": [],
    },
]


@pytest.mark.parametrize("record", WEBNLG, ids=["challenge", "hub", "gem"])
def test_webnlg(record: dict[str, Any]) -> None:
    prompt = f"{SUBJECT} : leaderName : {OBJECT} | {SUBJECT} : country : Denmark"
    assert flattened([record], "webnlg") == [{"prompt": prompt, "completion": LEADER, "seen": "seen"}]
    assert flattened([{**record, "category": "Artist"}], "webnlg")[0]["seen"] == "unseen"


def test_webnlg_in_its_own_file(tmp_path: Path) -> None:
    entries = [{str(i + 1): {**WEBNLG[0], "category": category}} for i, category in enumerate(("Airport", "Artist"))]
    (tmp_path / "dev.json").write_text(json.dumps({"entries": entries}))
    found = open_source(str(tmp_path / "dev.json"), reader="webnlg")
    assert found["seen"][:] == ["seen", "unseen"] and found["completion"][:] == [LEADER] * 2


TRIPLES = [["Ben Mauk", "High school", "Kenton"], ["Ben Mauk", "College", "Wake Forest Cincinnati"]]
MAUK = "Ben Mauk, who attended Kenton High School, attended Wake Forest Cincinnati for college."
DART: list[dict[str, Any]] = [
    {
        "tripleset": TRIPLES,
        "subtree_was_extended": False,
        "annotations": [{"source": "WikiTableQuestions_lily", "text": MAUK}],
    },
    {"tripleset": TRIPLES, "annotations": {"source": ["WikiTableQuestions_lily"], "text": [MAUK]}},
    {"tripleset": TRIPLES, "target": MAUK, "references": []},
]


@pytest.mark.parametrize("record", DART, ids=["own", "hub", "gem"])
def test_dart(record: dict[str, Any]) -> None:
    prompt = "Ben Mauk : high school : Kenton | Ben Mauk : college : Wake Forest Cincinnati"
    assert only("dart", record) == (prompt, MAUK)


def test_several_texts_are_several_pairs() -> None:
    record = {"tripleset": TRIPLES, "annotations": [{"source": "", "text": text} for text in ("one", "two")]}
    assert [pair["completion"] for pair in flattened([record] * 2, "dart")] == ["one", "two"] * 2


def test_samsum() -> None:
    dialogue = "Amanda: I baked cookies. Do you want some?\r\nJerry: Sure!\r\nAmanda: I'll bring you tomorrow :-)"
    summary = "Amanda baked cookies and will bring Jerry some tomorrow."
    prompt = "Amanda: I baked cookies. Do you want some?\nJerry: Sure!\nAmanda: I'll bring you tomorrow :-)\n\n"
    assert only("samsum", {"id": "13818513", "dialogue": dialogue, "summary": summary}) == (prompt, summary)
    assert flattened([{"dialogue": empty, "summary": summary} for empty in ("", None)], "samsum") == []


def test_wikisql() -> None:
    query = "SELECT Notes FROM table WHERE Current slogan = SOUTH AUSTRALIA"
    record = {
        "phase": 1,
        "question": "Tell me what the notes are for South Australia ",
        "table": {"header": ["State/territory", "Current slogan", "Notes"], "types": ["text"] * 3, "id": "1-1000181-1"},
        "sql": {"human_readable": query, "sel": 2, "agg": 0},
    }
    prompt = (
        "table: State/territory | Current slogan | Notes\nquestion: Tell me what the notes are for South Australia\n"
    )
    assert only("wikisql", record) == (prompt, query)


def test_mnli() -> None:
    pair = {"premise": "The dog sleeps. ", "hypothesis": "The dog is awake."}
    prompt = "premise: The dog sleeps.\nhypothesis: The dog is awake.\n"
    assert [only("mnli", {**pair, "label": i})[1] for i in range(3)] == ["entailment", "neutral", "contradiction"]
    assert only("mnli", {**pair, "label": "neutral"}) == (prompt, "neutral")
    assert flattened([{**pair, "label": -1}], "mnli") == []


def test_names_of_labels_on_the_hub_are_those_of_the_reader() -> None:
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    )
    records = datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2]}, features=features)
    assert flattened(records.to_list(), "mnli")[0]["completion"] == "contradiction"


@pytest.mark.parametrize("reader", READERS)
def test_pairs_stay_as_they_are(reader: str) -> None:
    pair = {"prompt": "a", "completion": "b", "seen": "seen"}
    assert flattened([pair], reader) == [pair]


@pytest.mark.parametrize(
    ("reader", "record", "reason"),
    [
        ("e2e", {"text": "a"}, "record 2 is in no form of e2e that is known: it has no 'meaning_representation'"),
        ("e2e", {"mr": "a pub", "ref": "b"}, "'a pub' is no list of slots"),
        ("e2e", {"line": "no bars"}, "record 2 is in no form of e2e"),
        ("dart", {"tripleset": [["a", "b"]], "target": "c"}, "record 2 is in no form of dart"),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "the label 'maybe' is none of entailment"),
        ("samsum", {"dialogue": ["a", "b"], "summary": ""}, "record 2 is in no form of samsum"),
        ("webnlg", {"category": "Food", "input": ["a - b - c"], "target": "d"}, "record 2 is in no form of webnlg"),
    ],
)
def test_what_is_in_no_known_form_is_named(reader: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        flattened([{"prompt": "a", "completion": "b"}, record], reader)


def test_an_unknown_reader_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no reader 'webnlp'; nearest: webnlg"):
        open_source(str(tmp_path / "nothing.json"), reader="webnlp")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address at which a folder's files are, as long as the block runs."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let files be fetched into a cache of the test's own."""
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_file_at_an_address_is_fetched_once(tmp_path: Path, online: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "dart.json").write_text(json.dumps(DART[:1]))
    with served(tmp_path / "there") as address:
        first = open_source(f"{address}/dart.json?raw=true", reader="dart").to_list()
    assert first[0]["completion"] == MAUK
    assert open_source(f"{address}/dart.json?raw=true", reader="dart").to_list() == first  # nobody answers there now
    assert not list(online.glob("*.partial"))


def test_what_cannot_be_fetched_is_told(tmp_path: Path, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        served(tmp_path) as address,
        pytest.raises(AdapterError, match=r"none\.json could not be fetched: File not found"),
    ):
        open_source(f"{address}/none.json")
    assert not list(online.iterdir())
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="it is not in the cache, and HF_HUB_OFFLINE is set"):
        open_source(f"{address}/other.json")
    with pytest.raises(AdapterError, match=r"train\.parquet could not be fetched: ."):
        open_source("hf://datasets/someone/something@refs/convert/parquet/default/train.parquet")
