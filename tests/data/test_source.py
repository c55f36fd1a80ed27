"""Sources: every kind of file is read as it stands, and what cannot be read is named with its place."""

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from lorank import AdapterError
from lorank.data import columns_of, hold_out, open_source


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(source: str, **options: Any) -> list[dict[str, Any]]:
    return open_source(source, **options).to_list()


def test_json_lines_and_json_are_read_alike(tmp_path: Path) -> None:
    records = [{"text": "a\nb", "n": 1}, {"text": "ü", "n": 2}]
    lines = "\n".join(json.dumps(record) for record in records)
    assert rows(write(tmp_path / "a.jsonl", lines)) == records
    assert rows(write(tmp_path / "a.ndjson", lines + "\n\n")) == records
    assert rows(write(tmp_path / "a.json", json.dumps(records))) == records
    assert rows(write(tmp_path / "b.json", json.dumps(records, indent=2))) == records
    assert rows(write(tmp_path / "c.json", "\ufeff" + lines)) == records


def test_texts_in_json_stay_texts(tmp_path: Path) -> None:
    records = [{"a": "NA", "b": "007", "c": "2020-01-01", "d": "1e5"}, {"a": "", "b": "1", "c": "2021-12-31", "d": "2"}]
    assert rows(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))) == records
    assert rows(write(tmp_path / "a.json", json.dumps(records))) == records
    assert open_source(str(tmp_path / "a.jsonl")).column_names == ["a", "b", "c", "d"]


def test_dates_in_messages_stay_texts(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": "2020-01-01"}]}]
    assert rows(write(tmp_path / "a.jsonl", json.dumps(records[0]))) == records
    assert rows(write(tmp_path / "a.json", json.dumps(records[0], indent=2))) == records


def test_a_date_in_parquet_stays_one(tmp_path: Path) -> None:
    day = datetime.datetime(2020, 1, 1)
    datasets.Dataset.from_dict({"day": [day], "text": ["NA"]}).to_parquet(tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == [{"day": day, "text": "NA"}]


def test_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    content = '\ufeffid,text\r\n007,NA\r\n\r\n1.0,"a ""quoted"", long\nline"\r\n,null\r\n'
    assert rows(write(tmp_path / "a.csv", content)) == [
        {"id": "007", "text": "NA"},
        {"id": "1.0", "text": 'a "quoted", long\nline'},
        {"id": "", "text": "null"},
    ]


def test_a_long_document_fits_into_a_csv_field(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert rows(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")) == [{"text": "x" * 200_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('a\tb\n"one"\t"say ""hi"""\n', [{"a": "one", "b": 'say "hi"'}]),
        ('a\tb\r\n"one\ttwo"\t3\r\n', [{"a": "one\ttwo", "b": "3"}]),
        ('a\tb\n"one\ntwo"\t3\n4\t""\n', [{"a": "one\ntwo", "b": "3"}, {"a": "4", "b": ""}]),
        ('a\tb\n5" disk\tx\n"all"\ty\n', [{"a": '5" disk', "b": "x"}, {"a": '"all"', "b": "y"}]),
        ('a\tb\nsay "hi"\t"well\n', [{"a": 'say "hi"', "b": '"well'}]),
        ("a\tb\n1,5\tit's\n", [{"a": "1,5", "b": "it's"}]),
    ],
)
def test_tsv_is_read_in_the_kind_that_it_is(tmp_path: Path, content: str, expected: list[Any]) -> None:
    assert rows(write(tmp_path / "a.tsv", content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 fields and the first line 2"),
        ("a.csv", 'a,b\n1,"x\ny"\n3,4,5\n', "line 4 has 3 fields and the first line 2"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "line 2 has 3 fields and the first line 2"),
        ("a.csv", "a,b,a\n1,2,3\n", "has 'a' twice"),
        ("a.csv", '"a"\n"unclosed\n', "unexpected end of data"),
        ("a.csv", b"a\n\xff\n", "'utf-8' codec can't decode"),
        ("a.csv", "\ufeff", "the names of the columns, is empty"),
        ("a.csv", "\na,b\n", "the names of the columns, is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "a,b\n", "a.csv holds no record"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", b'{"a": "\xff"}\n', "Invalid UTF8"),
        ("a.jsonl", b'{"a": "x"}\n{"a": ["\xff"]}\n', "a.jsonl is no whole jsonl file"),
        ("a.jsonl", '{"a": 1}\nnot json\n', "a.jsonl is no whole jsonl file: JSON parse error"),
        ("a.json", "[]", "a.json"),
        ("a.jsonl", "\n\n", "a.jsonl"),
        ("a.parquet", "nonsense", "a.parquet is no whole parquet file: Parquet magic bytes"),
        ("a.txt", "text", r"ends in '\.txt'; known are \.jsonl, .*\.tsv"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    with pytest.raises(AdapterError, match=f"cannot read the data: .*{reason}"):
        open_source(write(tmp_path / name, content))


def test_a_missing_file_brings_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "reviews.jsonl", "{}")
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(AdapterError, match=r"there is no file .*review\.jsonl; nearest: reviews\.jsonl$"):
        open_source(str(tmp_path / "review.jsonl"))
    with pytest.raises(AdapterError, match=r"; in its folder are reviews\.jsonl$"):
        open_source(str(tmp_path / "0123456789"))
    with pytest.raises(AdapterError, match=r"there is no folder .*nowhere either"):
        open_source(str(tmp_path / "nowhere" / "a.csv"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"there is no file review\.jsonl; nearest: reviews\.jsonl$"):
        open_source("review.jsonl")


def test_the_limit_takes_the_first_records(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "n\n" + "\n".join(map(str, range(10))))
    assert [row["n"] for row in rows(source, limit=3)] == ["0", "1", "2"]
    assert len(rows(source, limit=10)) == len(rows(source, limit=99)) == 10


def test_a_data_set_is_opened_by_its_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "train.jsonl", '{"n": 1}\n{"n": 2}\n')
    write(folder / "validation.jsonl", '{"n": 3}\n')
    monkeypatch.chdir(tmp_path)
    assert rows("reviews") == [{"n": 1}, {"n": 2}]
    assert rows("reviews:default", split="validation") == [{"n": 3}]
    assert rows("reviews", split="train[1:]") == [{"n": 2}]
    with pytest.raises(AdapterError, match=r"reviews: Unknown split \"test\"\. Should be one of \['train', 'valid"):
        open_source("reviews", split="test")
    with pytest.raises(AdapterError, match=r"'small' not found\. Available: \['default'\]"):
        open_source("reviews:small")


def test_a_data_set_that_cannot_be_reached_is_no_file_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        AdapterError, match=r"'no-such/data-set' is no file here, and as a data set of the hub it could"
    ):
        open_source("no-such/data-set")


def test_progress_bars_are_afterwards_as_they_were(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "a\n1\n")
    before = datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        open_source(source)
        assert datasets.are_progress_bars_disabled()
        datasets.enable_progress_bars()
        open_source(source)
        assert not datasets.are_progress_bars_disabled()
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def test_wanted_columns_must_be_there_and_full() -> None:
    data = datasets.Dataset.from_dict({"text": ["a", None, "b", None], "label": [1, 2, 3, 4]})
    columns_of(data, {"label": "label"})
    with pytest.raises(AdapterError) as caught:
        columns_of(data, {"text": "text", "lable": "label", "zzz": "prompt"})
    assert str(caught.value).splitlines() == [
        "cannot use the data:",
        "  the text column 'text' is empty in 2 of 4 records (records 2, 4)",
        "  the label column 'lable' is not in the data; nearest: label",
        "  the prompt column 'zzz' is not in the data; the columns are label, text",
    ]


def test_empty_values_are_counted_in_the_chosen_records() -> None:
    data = datasets.Dataset.from_dict({"text": ["a", None, "b", None]})
    columns_of(data.select([0, 2]), {"text": "text"})
    with pytest.raises(AdapterError, match=r"is empty in 1 of 2 records \(records 2\)"):
        columns_of(data.select([2, 3]), {"text": "text"})


def test_records_without_a_key_are_empty_there(tmp_path: Path) -> None:
    data = open_source(write(tmp_path / "a.jsonl", '{"a": "x"}\n{"b": "y"}\n'))
    with pytest.raises(AdapterError, match=r"the text column 'a' is empty in 1 of 2 records \(records 2\)"):
        columns_of(data, {"a": "text"})


def test_holding_out_parts_the_records_by_the_seed() -> None:
    data = datasets.Dataset.from_dict({"n": list(range(100))})
    train, held = hold_out(data, 0.1, seed=3)
    assert (len(train), len(held)) == (90, 10)
    assert sorted([*train["n"], *held["n"]]) == list(range(100))
    again_train, again = hold_out(data, 0.1, seed=3)
    assert list(again["n"]) == list(held["n"]) and list(again_train["n"]) == list(train["n"])
    assert list(hold_out(data, 0.1, seed=4)[1]["n"]) != list(held["n"])


def test_at_least_one_and_at_most_so_many_are_held_out() -> None:
    data = datasets.Dataset.from_dict({"n": list(range(100))})
    assert len(hold_out(data, 0.001, seed=0)[1]) == 1
    assert len(hold_out(data, 0.5, seed=0, most=7)[1]) == 7
    with pytest.raises(AdapterError, match=r"cannot hold out a share of 0\.05 of 1 records"):
        hold_out(data.select([0]), 0.05, seed=0)


def test_mixed_values_are_kept_as_they_are(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "x"}\n')) == [{"a": 1}, {"a": "x"}]


def test_parquet_is_read_with_its_types(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["NA", "007"], "label": pyarrow.array([1, 0], pyarrow.int8())})
    datasets.Dataset(table).to_parquet(tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == [{"text": "NA", "label": 1}, {"text": "007", "label": 0}]
