"""Tables of rows, as people keep them: JSON lines, JSON, CSV, Parquet. Any row by its number, in any process.

JSON lines and Parquet are read row by row, with an index of where each row lies; JSON and CSV, which cannot be, are
held in memory. What is no table at all is a :class:`UserError`; what is wrong with one row is a ``ValueError`` of
``read``, for the others are still of use.
"""

from __future__ import annotations

import csv
import io
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glimpseprune.config import UserError
from glimpseprune.data.shards import JSON_BYTES, open_file

Row = dict[str, Any]

FILE_BYTES = 1 << 31
"""Largest file that is held in memory."""
_BATCH = 16  # rows of a Parquet file at a time: pictures may be in them


class Table(Protocol):
    def __len__(self) -> int: ...

    def read(self, number: int) -> Row:
        """Row ``number``, 0 <= number < len; raises ValueError, which says why, where it is none."""

    def place(self, number: int) -> str:
        """Where the row stands, as people count: from 1, in JSON lines with the empty ones."""


def table(path: str | Path) -> Table:
    """The rows of a file, read as its name ends.

    Raises:
        UserError: there is no such file, its name ends otherwise, or it is no table.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: its name must end in one of {', '.join(_READERS)}")
    try:
        return read(path)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class Lines:
    """A JSON object on each line; empty lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.stream = open(path, "rb", buffering=0, opener=open_file)  # noqa: SIM115 (kept open)
        ends = _line_ends(self.stream.fileno())
        starts = np.concatenate([[0], ends + 1])[: len(ends)].astype(np.int64)
        filled = ends > starts
        for short in np.flatnonzero(ends == starts + 1):
            filled[short] = os.pread(self.stream.fileno(), 1, starts[short]) != b"\r"
        self.lines = np.flatnonzero(filled)
        self.starts, self.ends = starts[self.lines], ends[self.lines]

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, number: int) -> Row:
        start, size = int(self.starts[number]), int(self.ends[number] - self.starts[number])
        if size > JSON_BYTES:
            raise ValueError(f"the row has {size} bytes, more than the {JSON_BYTES} allowed")
        return _object(os.pread(self.stream.fileno(), size, start))

    def place(self, number: int) -> str:
        return str(self.lines[number] + 1)


def _line_ends(descriptor: int) -> np.ndarray:
    """Where each line ends, the last one, too."""
    size, found = os.fstat(descriptor).st_size, []
    for offset in range(0, size, 1 << 24):
        block = np.frombuffer(os.pread(descriptor, 1 << 24, offset), np.uint8)
        found.append(np.flatnonzero(block == ord("\n")) + offset)
    return np.concatenate([*found, [size]]).astype(np.int64)


def _object(data: bytes) -> Row:
    try:
        row = json.loads(data)
    except RecursionError:
        raise ValueError("the row is no JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the row is no JSON: {getattr(error, 'msg', error)}") from None
    return _row(row)


def _row(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"the row is no object with fields, but a {type(row).__name__}")
    return row


def shown_value(value: Any) -> str:
    """What a row has in the place of something else, for a message."""
    kind = "null" if value is None else type(value).__name__
    return f'{kind} "{value}"' if isinstance(value, str | int | float) else kind


class Held:
    """Rows in memory; a ValueError in the place of one that is none."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Row:
        if isinstance(self.rows[number], ValueError):
            raise self.rows[number]
        return _row(self.rows[number])

    def place(self, number: int) -> str:
        return str(number + 1)


def _json(path: Path) -> Table:
    """A list of rows, or an object with one such list, or of rows by their keys."""
    try:
        found = json.loads(_content(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # lines of JSON under another name
            return Lines(path)
        raise
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        if len(lists) == 1:
            found = lists[0]
        elif found and all(isinstance(value, dict) for value in found.values()):
            found = [{"key": key, **value} for key, value in found.items()]
    if not isinstance(found, list):
        raise ValueError("it must be a list of objects, or an object with one such list")
    return Held(found)


def _csv(path: Path, mark: str = ",") -> Table:
    """Cells are texts, but one that is a JSON list is that; an empty cell is no field."""
    text = _content(path).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    if not reader.fieldnames or len(set(reader.fieldnames)) < len(reader.fieldnames):
        raise ValueError("its first line must name the columns, each once")
    return Held(list(_cells(reader)))


def _cells(reader: csv.DictReader) -> Iterator[Row | ValueError]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield ValueError(f"the row is no CSV: {error}")
            continue
        if None in row:
            yield ValueError("the row has more cells than the first line has names")
        else:
            yield {name: _cell(cell) for name, cell in row.items() if cell}


def _cell(text: str) -> Any:
    if text[0] == "[":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def _content(path: Path) -> bytes:
    with open(path, "rb", opener=open_file) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > FILE_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {FILE_BYTES} allowed: give JSON lines")
        return stream.read()


class Parquet:
    """Rows of a Parquet file, a few at a time; reading them in their order reads nothing twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb", opener=open_file):  # a pipe would be waited for
            pass
        groups = self._file().metadata
        self.ends = list(accumulate(groups.row_group(i).num_rows for i in range(groups.num_row_groups)))
        self.owner, self.next, self.batches, self.batch = 0, 0, iter(()), []

    def _file(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{self.path}: to read Parquet, install pyarrow: pip install pyarrow") from None
        try:
            return parquet.ParquetFile(self.path)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, number: int) -> Row:
        group = bisect_right(self.ends, number)
        first = self.ends[group - 1] if group else 0
        if not first <= self.next <= number or self.owner != os.getpid():  # its threads do not live on in a fork
            self.owner, self.next = os.getpid(), first
            groups = list(range(group, len(self.ends)))
            self.batches, self.batch = self._file().iter_batches(_BATCH, groups, use_threads=False), []
        while True:
            if not self.batch:
                self.batch = next(self.batches).to_pylist()[::-1]
            row, self.next = self.batch.pop(), self.next + 1
            if self.next > number:
                return row

    def place(self, number: int) -> str:
        return str(number + 1)


class Joined:
    """Several tables, one after the other, each with a name, and with what turns its row, and the place of that, into
    the one that is wanted."""

    def __init__(self, tables: Sequence[tuple[str, Table, Callable[[Row, str], Row]]]) -> None:
        self.tables = tables
        self.ends = list(accumulate(len(each) for _, each, _ in tables))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, number: int) -> Row:
        (_, each, shape), own = self._find(number)
        return shape(each.read(own), each.place(own))

    def place(self, number: int) -> str:
        (name, each, _), own = self._find(number)
        return f"{name}:{each.place(own)}"

    def _find(self, number: int) -> tuple[tuple[str, Table, Callable[[Row, str], Row]], int]:
        part = bisect_right(self.ends, number)
        return self.tables[part], number - (self.ends[part - 1] if part else 0)


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": Lines,
    ".ndjson": Lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": Parquet,
}
