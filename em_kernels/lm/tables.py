"""Rows by number: of JSON, CSV and Parquet files, of folders and names of data sets.

A row that cannot be read stands there as the reason, a text.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from em_kernels.lm.data import json_rows, json_value, read_bytes
from em_kernels.lm.hub import looks_like_a_path, quick_to_fail
from em_kernels.lm.optional import require
from em_kernels.lm.text import one_line

Row = Mapping[str, Any] | str


class Rows(NamedTuple):
    """(number from 1, row), and what the numbers count: a "line" or a "row"."""

    noun: str
    rows: Iterable[tuple[int, Row]]


def rows_at(name: str, split: str, config: str | None = None) -> Rows:
    """The rows of a file, a folder or the name of a data set.

    A .json file holds lines, an array of objects, or an object with such an array: under "data",
    under the name of the split, or the only one.

    Args:
        name: a file (`FORMATS`), a folder (of `datasets.save_to_disk`, or of files by split), or
            the name of a data set.
        split: of a folder or data set.
        config: of a data set.

    Raises:
        FileNotFoundError: a path that is not there.
        ImportError: Parquet without pyarrow, a folder or a data set without `datasets`.
        ValueError: a file of another kind, or one that cannot be read; a data set that cannot be
            loaded, or has no such split.
    """
    path = Path(name).expanduser()
    reader = _READERS.get(_kind(path))
    if path.is_file():
        if reader is None:
            raise ValueError(f"{path}: rows are read from {FORMATS} files")
        return reader(path, split)
    if path.is_dir():
        return Rows("row", enumerate(_folder(path, split), start=1))
    if reader is not None:
        raise FileNotFoundError(f"no such file: {path}")
    if looks_like_a_path(name) or not _NAME.fullmatch(name):
        raise FileNotFoundError(f"no such file or folder: {path}")
    return Rows("row", enumerate(_named(name, split, config), start=1))


def has_splits(name: str) -> bool:
    """False of a file or folder that is one table, where naming a split would mean nothing."""
    path = Path(name).expanduser()
    if path.is_file():
        return _kind(path) == ".json"
    return not (path / "state.json").is_file()


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


# JSON


def _json(path: Path, split: str) -> Rows:
    """Lines where the first is an object, unless it is the only one of a .json file."""
    lines, is_json = Rows("line", json_rows(path)), _kind(path) == ".json"
    first, second, *_ = [*(row for _, row in islice(json_rows(path), 2)), None, None]
    if isinstance(first, dict) and not (is_json and second is None):
        return lines
    try:
        document = json_value(read_bytes(path), "utf-8-sig")
    except ValueError as error:
        if is_json and not isinstance(second, dict):
            raise ValueError(f"{path}: {error}") from None
        return lines
    if not isinstance(document, (dict, list)):
        return lines
    return Rows("row", _objects(_array(path, document, split)))


def _array(path: Path, document: dict | list, split: str) -> list:
    """The array of rows; a document without one is the only row."""
    if isinstance(document, list):
        return document
    arrays = {key: value for key, value in document.items() if _is_table(value)}
    for name in (split, "data", *(arrays if len(arrays) == 1 else ())):
        if name in arrays:
            return arrays[name]
    if arrays:
        raise ValueError(
            f"{path} holds several arrays, {', '.join(map(repr, arrays))}: `split` (--split) names "
            f"the one to read, got {split!r}"
        )
    return [document]


def _is_table(value: Any) -> bool:
    """An array of objects, which are not the turns of a chat."""
    return isinstance(value, list) and all(isinstance(v, dict) and "role" not in v for v in value)


def _objects(values: list) -> Iterator[tuple[int, Row]]:
    for number, value in enumerate(values, start=1):
        odd = f"not a JSON object but {type(value).__name__}"
        yield number, value if isinstance(value, dict) else odd


# CSV


def _csv(path: Path, split: str) -> Rows:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from None
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # Also what Excel writes where the comma is in numbers.
        delimiter = "\t" if _kind(path) == ".tsv" else _delimiter(text)
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    header, *rows = [row for row in table if row] or [[]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: its first line, the header, has {twice[0]!r} twice")
    return Rows("row", ((n, _cells(header, row)) for n, row in enumerate(rows, start=1)))


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","


def _cells(header: list[str], row: list[str]) -> Row:
    if len(row) != len(header):
        return f"{len(row)} cells where the header has {len(header)}"
    return dict(zip(header, row))


# Tables of other packages


def _parquet(path: Path, split: str) -> Rows:
    parquet = require("pyarrow.parquet", "em-kernels[datasets]", "save the rows as JSON lines")

    def rows() -> Iterator[Row]:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"{path}: {one_line(error)}") from None
        except Exception as error:  # pyarrow's own
            raise ValueError(f"{path}: not a Parquet file ({one_line(error)})") from None

    return Rows("row", enumerate(rows(), start=1))


def _folder(path: Path, split: str) -> Iterable[Row]:
    """As `save_to_disk` wrote it, else files by split as `datasets` finds them."""
    datasets = _datasets()
    saved = [name for name in _SAVED if (path / name).is_file()]
    if not saved:
        return _loaded(str(path), lambda: datasets.load_dataset(str(path), split=split), split)
    found = _loaded(str(path), lambda: datasets.load_from_disk(str(path)), split)
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ValueError(
            f"cannot load the data set {str(path)!r}, split {split!r}: it has {', '.join(found)}; "
            "`split` (--split) names one"
        )
    return found[split]


def _named(name: str, split: str, config: str | None) -> Iterable[Row]:
    datasets = _datasets()
    with quick_to_fail(name) as reason:
        options = {"split": split, "name": config}
        return _loaded(name, lambda: datasets.load_dataset(name, **options), split, reason)


def _loaded(name: str, load: Callable[[], Any], split: str, reason: str = "") -> Any:
    try:
        return load()
    except Exception as error:  # the hub, the network, the file: each has its own
        raise ValueError(
            f"cannot load the data set {name!r}, split {split!r}: {reason or one_line(error)}"
        ) from error


def _datasets() -> Any:
    return require("datasets", "em-kernels[datasets]", "save the rows as JSON lines")


_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w.-]+)?")  # of a data set
_SAVED = ("dataset_dict.json", "state.json")
_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
FORMATS = ".jsonl, .json, .csv, .tsv (each also .gz) and .parquet"
