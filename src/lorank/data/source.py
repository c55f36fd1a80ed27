"""Where records come from: a JSONL, JSON, CSV, TSV or Parquet file, here or at an address, or a data set on the hub."""

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AdapterError, did_you_mean, enumerate_names, raise_problems
from ..extras import require
from .fetching import fetched
from .readers import flattened, known, unpacked

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_READERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_KNOWN = (*_READERS, *_SEPARATORS)
_PROBED_LINES = 1000
_LONGEST_FIELD = 2**31 - 1  # characters in a field of a CSV file; the csv module's own limit is below a long document
_QUOTED = re.compile(r'(?:^|(?<=\t))"[^"]*(?:""[^"]*)*"(?=\t|\r?$)', re.MULTILINE)


def open_source(source: str, split: str = "train", limit: int | None = None, reader: str | None = None) -> Any:
    """Return the records of a file or of a hub data set as a `datasets.Dataset`.

    source: a file; the address of one (https://..., or hf://datasets/... on the hub), which is fetched once; or a hub
        data set, as an id or id:configuration.
    reader: the name of one of `readers.READERS`, which makes prompts and completions of a published data set.

    In CSV and TSV files every value is text as it stands in the file: `NA` is not missing and `007` not 7. In JSON
    files a text stays one, a date too. `limit` takes the first so many records. Raises AdapterError when there is
    nothing to read, and says what there is.
    """
    datasets = require("datasets", "reading data")
    known(reader) if reader else None
    path = Path(source).expanduser()
    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        if "://" in source:
            path = fetched(datasets, source)
        if path.is_file():
            found = _open_file(datasets, path, _suffix(source), reader)
        elif path.is_dir():
            found = _open_hub(datasets, str(path), split)  # a folder as the hub has them
        elif path.suffix.lower() in _KNOWN or path.is_absolute() or source.startswith((".", "~")):
            raise AdapterError(f"there is no file {source}{_neighbours(path)}")
        else:
            found = _open_hub(datasets, source, split)
    except AdapterError as error:
        raise AdapterError(f"cannot read the data: {error}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    if reader:
        found = datasets.Dataset.from_list(flattened(found, reader))
    if limit is not None and limit < len(found):
        found = found.select(range(limit))
    if not len(found):
        raise AdapterError(f"cannot read the data: {source} holds no record")
    return found


def _suffix(source: str) -> str:
    """Return the ending of a path or of an address, without what may follow on it there."""
    return Path(source.partition("?")[0] if "://" in source else source).suffix.lower()


def _open_file(datasets: Any, path: Path, suffix: str, reader: str | None = None) -> Any:
    """Return the records of a file of the kind that `suffix` says; a fetched one has lost its own."""
    special = None if reader is None else unpacked(path, suffix, reader)
    if special is not None:
        return special
    if suffix not in _KNOWN:
        raise AdapterError(f"{path} ends in {suffix!r}; known are {', '.join(_KNOWN)}")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path} is empty")
    try:
        if suffix in _SEPARATORS:
            limit = csv.field_size_limit(_LONGEST_FIELD)
            try:
                columns = _columns(path, _SEPARATORS[suffix])
            finally:
                csv.field_size_limit(limit)
            return datasets.Dataset.from_dict(columns)
        found = datasets.load_dataset(_READERS[suffix], data_files=str(path), split="train")
        if _READERS[suffix] == "json":
            found.data.table.validate(full=True)  # else bytes that are not UTF-8 come to light with the record
            found = _with_dates_as_text(datasets, found, path)
        return found
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError, OSError, csv.Error) as error:
        reason = error.__cause__ or error
        raise AdapterError(f"{path} is no whole {suffix[1:]} file: {reason}") from None


def _with_dates_as_text(datasets: Any, found: Any, path: Path) -> Any:
    """Return the records of a JSON file with the texts that the reader took for dates as they stand in the file."""
    dates = [field.name for field in found.data.schema if "timestamp[" in str(field.type)]
    if not dates:
        return found
    values: dict[str, list[Any]] = {name: [] for name in dates}
    for record in _json_records(path):
        for name in dates:
            values[name].append(record.get(name))
    names = found.column_names
    rest, texts = found.remove_columns(dates), datasets.Dataset.from_dict(values)
    joined = datasets.concatenate_datasets([rest, texts], axis=1) if rest.column_names else texts
    return joined.select_columns(names)


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file with one on each line, or with one JSON value for all."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            first = None
        file.seek(0)
        if isinstance(first, dict):
            yield from (json.loads(line) for line in file if line.strip())
            return
        whole = json.load(file)
    yield from whole if isinstance(whole, list) else [whole]


def _columns(path: Path, separator: str) -> dict[str, list[str]]:
    """Return a CSV or TSV file by column; every line must have as many fields as the first.

    TSV comes in two kinds, with quoted fields and with quotes that mean nothing. It is the first kind if every field
    with a quote in it, in the first lines, is a well-formed quoted one.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:  # UnicodeDecodeError is a ValueError
        head = list(itertools.islice(file, _PROBED_LINES))
        quoted = separator == "," or '"' not in _QUOTED.sub("", "".join(head))
        file.seek(0)
        reader = csv.reader(
            file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
        )
        header = next(reader, [])
        if not header:
            raise ValueError("its first line, the names of the columns, is empty")
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise ValueError(f"its first line, the names of the columns, has {', '.join(map(repr, doubled))} twice")
        rows = []
        for row in reader:
            if len(row) != len(header) and row:  # an empty line is none
                raise ValueError(f"line {reader.line_num} has {len(row)} fields and the first line {len(header)}")
            rows += [row] if row else []
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _open_hub(datasets: Any, source: str, split: str) -> Any:
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except ValueError as error:  # an unknown split or configuration: the library lists the known ones
        raise AdapterError(f"{source}: {error}") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise AdapterError(
            f"{source!r} is no file here, and as a data set of the hub it could not be read: {error}"
        ) from None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    files = [other.name for other in path.parent.iterdir() if other.suffix.lower() in _KNOWN]
    return f"; {did_you_mean(path.name, files, 'in its folder are')}" if files else ""


def columns_of(records: Any, wanted: dict[str, str]) -> None:
    """Raise AdapterError unless every wanted column is there and full; `wanted` says what each is for."""
    problems = []
    for column, purpose in wanted.items():
        if column not in records.column_names:
            near = did_you_mean(column, records.column_names, "the columns are")
            problems.append(f"the {purpose} column '{column}' is not in the data; {near}")
            continue
        empty = records.data.column(column).null_count
        if empty:  # in the whole table, of which these records may be a part
            empty = records.select_columns([column]).with_format("arrow")[:][column].null_count
        if empty:
            rows = [i for i, value in enumerate(itertools.islice(records[column], 100_000)) if value is None]
            where = f" (records {enumerate_names(map(str, (i + 1 for i in rows)), 3)})" if rows else ""
            problems.append(f"the {purpose} column '{column}' is empty in {empty:,} of {len(records):,} records{where}")
    raise_problems("cannot use the data", problems)


def hold_out(records: Any, share: float, seed: int, most: int = 1000) -> tuple[Any, Any]:
    """Return the records in two parts, drawn at random: those to train on, and at least one to evaluate on."""
    count = min(most, max(1, round(share * len(records))))
    if count >= len(records):
        raise AdapterError(f"cannot hold out a share of {share} of {len(records)} records; give eval_data of its own")
    parts = records.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]
