"""Where records come from: a local JSONL, JSON, CSV, TSV or Parquet file, or a data set on the hub."""

import csv
import itertools
from pathlib import Path
from typing import Any

from ..errors import AdapterError, did_you_mean, enumerate_names, raise_problems
from ..extras import require

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_READERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_KNOWN = (*_READERS, *_SEPARATORS)
_PROBED_LINES = 1000


def open_source(source: str, split: str = "train", limit: int | None = None) -> Any:
    """Return the records of a file or of a hub data set as a `datasets.Dataset`.

    In CSV and TSV files every value is text as it stands in the file: `NA` is not missing and `007` not 7. `limit`
    takes the first so many records. Raises AdapterError when there is nothing to read, and says what there is.
    """
    datasets = require("datasets", "reading data")
    path = Path(source).expanduser()
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            found = _open_file(datasets, path)
        elif path.suffix in _KNOWN or path.is_absolute() or source.startswith((".", "~")):
            raise AdapterError(f"there is no file {source}{_neighbours(path)}")
        else:
            found = _open_hub(datasets, source, split)
    except AdapterError as error:
        raise AdapterError(f"cannot read the data: {error}") from None
    finally:
        datasets.enable_progress_bars()
    if limit is not None and limit < len(found):
        found = found.select(range(limit))
    if not len(found):
        raise AdapterError(f"cannot read the data: {source} holds no record")
    return found


def _open_file(datasets: Any, path: Path) -> Any:
    if path.suffix not in _KNOWN:
        raise AdapterError(f"{path} ends in {path.suffix!r}; known are {', '.join(_KNOWN)}")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path} is empty")
    try:
        if path.suffix in _SEPARATORS:
            return datasets.Dataset.from_dict(_columns(path, _SEPARATORS[path.suffix]))
        return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError, OSError, csv.Error) as error:
        reason = error.__cause__ or error
        raise AdapterError(f"{path} is no whole {path.suffix[1:]} file: {reason}") from None


def _columns(path: Path, separator: str) -> dict[str, list[str]]:
    """Return a CSV or TSV file by column; every line must have as many fields as the first.

    TSV comes in two kinds, with quoted fields and with quotes that mean nothing. It is the first kind if every field
    with a quote in it, in the first lines, is a well-formed quoted one.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:  # UnicodeDecodeError is a ValueError
        head = list(itertools.islice(file, _PROBED_LINES))
        fields = [field for line in head for field in line.rstrip("\r\n").split(separator) if '"' in field]
        quoted = separator == "," or all(_is_quoted(field) for field in fields)
        file.seek(0)
        reader = csv.reader(
            file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
        )
        header = next(reader)
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise ValueError(f"its first line, the names of the columns, has {', '.join(map(repr, doubled))} twice")
        rows = []
        for row in reader:
            if len(row) != len(header) and row:  # an empty line is none
                raise ValueError(f"line {reader.line_num} has {len(row)} fields and the first line {len(header)}")
            rows += [row] if row else []
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


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
    files = [other.name for other in path.parent.iterdir() if other.suffix in _KNOWN]
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
