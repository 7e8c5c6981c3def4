"""The files of `predict`: rows and answers as JSON lines, CSV or Parquet, read and written a chunk at a time."""

from __future__ import annotations

import csv as text_csv
import datetime
import decimal
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import pyarrow
from pyarrow import csv, parquet

from .data import DataError, csv_columns, csv_options
from .squad_files import read_squad

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
Row = dict[str, Any]


class FoundRow(NamedTuple):
    """A row of a file.

    Attributes:
        place: Where it stands: `"line 3"`.
        row: The row; empty if it cannot be read.
        problem: Why it cannot be read; `None` if it can.
    """

    place: str
    row: Row
    problem: str | None = None


def file_type(path: str | os.PathLike[str]) -> str:
    """The type of a file by its name: `.csv`, `.tsv` or `.parquet`; `.jsonl` for all other names."""
    kind = os.path.splitext(os.fspath(path).removesuffix(".gz"))[1]
    return kind if kind in (*_DELIMITERS, ".parquet") else ".jsonl"


# ---- Reading


class RowSource:
    """A file of JSON lines, one row after the other; or a file .json in SQuAD's own format.

    Args:
        path: The file; `-` for standard input.

    Attributes:
        schema: The columns and their types; `None` if only the rows know them.
        total: The size of the file in units; `None` if it is not known.
        unit: The unit of `total` and `position`.
    """

    schema: pyarrow.Schema | None = None
    total: int | None = None
    unit = "B"

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: Any = None

    @contextmanager
    def opened(self) -> Iterator[Iterator[FoundRow]]:
        """Open the file, and yield its rows.

        Raises:
            DataError: If the file is damaged.
            OSError: If it cannot be read.
        """
        if self.path == "-":
            yield self._lines(getattr(sys.stdin, "buffer", sys.stdin))
            return
        with open(self.path, "rb") as file:
            self._file = file
            if os.path.isfile(self.path):
                self.total = os.path.getsize(self.path)
            with self.damage_named():
                rows = self._rows(gzip.GzipFile(fileobj=file) if self.path.endswith(".gz") else file)
            yield self._named(rows)

    @property
    def position(self) -> int:
        """How much of `total` is read."""
        return 0 if self._file is None or self.total is None else self._file.tell()

    @contextmanager
    def damage_named(self) -> Iterator[None]:
        """Turn errors of a damaged file into one that names it."""
        try:
            yield
        except (EOFError, gzip.BadGzipFile, pyarrow.ArrowException, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path} cannot be read as {file_type(self.path)[1:]}: {error}") from error

    def _named(self, rows: Iterator[FoundRow]) -> Iterator[FoundRow]:
        while True:
            with self.damage_named():
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _rows(self, file: Any) -> Iterator[FoundRow]:
        is_json = os.path.isfile(self.path) and self.path.removesuffix(".gz").endswith(".json")
        questions = read_squad(file) if is_json else None
        if questions is None:
            return self._lines(file)
        return (FoundRow(f"question {number}", row) for number, row in enumerate(questions, start=1))

    def _lines(self, lines: Any) -> Iterator[FoundRow]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield FoundRow(place, {}, f"invalid JSON: {error}.")
                continue
            if isinstance(row, dict):
                yield FoundRow(place, row)
            else:
                yield FoundRow(place, {}, f"expected a JSON object, got {row!r:.80}.")


class _CsvSource(RowSource):
    """A file of CSV or TSV, with all cells as texts, and empty cells as `None`."""

    def _rows(self, file: Any) -> Iterator[FoundRow]:
        bad: dict[int, str] = {}

        def note(row: Any) -> str:
            bad[row.number] = f"expected {row.expected_columns} cells, got {row.actual_columns}."
            return "skip"

        delimiter = _DELIMITERS[file_type(self.path)]
        names = csv_columns(self.path, delimiter, note)
        bad.clear()
        self.schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
        # As bytes: a cell that is no UTF-8 spoils its row alone.
        options = csv_options(delimiter, names, pyarrow.binary(), note)
        return self._cells(csv.open_csv(file, **options), bad)

    def _cells(self, batches: Any, bad: dict[int, str]) -> Iterator[FoundRow]:
        number = 1  # the header
        for batch in batches:
            for cells in batch.to_pylist():
                number += 1
                while number in bad:
                    yield FoundRow(f"row {number - 1}", {}, bad.pop(number))
                    number += 1
                try:
                    row = {name: cell if cell is None else cell.decode("utf-8") for name, cell in cells.items()}
                except UnicodeDecodeError as error:
                    yield FoundRow(f"row {number - 1}", {}, f"it is not UTF-8: {error}.")
                else:
                    yield FoundRow(f"row {number - 1}", row)
        for place, problem in sorted(bad.items()):
            yield FoundRow(f"row {place - 1}", {}, problem)


class _ParquetSource(RowSource):
    """A Parquet file."""

    unit = "row"

    def _rows(self, file: Any) -> Iterator[FoundRow]:
        opened = parquet.ParquetFile(file)
        self.schema, self.total, self._read = opened.schema_arrow, opened.metadata.num_rows, 0
        return self._batches(opened)

    def _batches(self, opened: Any) -> Iterator[FoundRow]:
        for batch in opened.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                self._read += 1
                yield FoundRow(f"row {self._read}", row)

    @property
    def position(self) -> int:
        return self._read


def open_rows(path: str | os.PathLike[str]) -> RowSource:
    """The rows of a file, by the type of the file; `-` for JSON lines from standard input.

    Raises:
        DataError: If there is no such file, or if it is CSV or Parquet and no regular file.
    """
    if os.fspath(path) != "-" and (not os.path.exists(path) or os.path.isdir(path)):
        raise DataError(f"There is no file {os.fspath(path)!r}.")
    if file_type(path) != ".jsonl" and not os.path.isfile(path):
        raise DataError(f"{path} is no regular file; only JSON lines can be read from a pipe.")
    kinds = {".jsonl": RowSource, ".parquet": _ParquetSource}
    return kinds.get(file_type(path), _CsvSource)(os.fspath(path))


# ---- Writing


class AnswerLines:
    """Writes rows as JSON lines.

    Args:
        file: The file to write to.

    Attributes:
        size: The size of the file up to the last whole row: an unfinished file is cut off there.
    """

    def __init__(self, file: Any) -> None:
        self.file, self.size = file, 0

    def write(self, rows: list[Row], answers: list[Row]) -> None:
        """Write rows with their answers.

        Raises:
            DataError: If they cannot be written in this format.
            OSError: If the file cannot be written.
        """
        content = self._encode(_join(rows, answers))
        self.file.write(content)
        self.file.flush()
        self.size += len(content)

    def close(self) -> None:
        """Complete the file, also after an error. It is still open."""

    def _encode(self, rows: list[Row]) -> bytes:
        return b"".join(map(json_line, rows))


class _CsvAnswers(AnswerLines):
    """Writes rows as CSV or TSV. Values that are no texts are written as JSON; no value is an empty cell."""

    def __init__(self, file: Any, delimiter: str) -> None:
        super().__init__(file)
        self.delimiter = delimiter
        self.names: list[str] = []

    def _encode(self, rows: list[Row]) -> bytes:
        buffer = io.StringIO(newline="")
        writer = text_csv.writer(buffer, delimiter=self.delimiter, lineterminator="\n")
        if not self.names and rows:
            self.names = _all_names(rows)
            writer.writerow(self.names)
        for row in rows:
            _check_names(row, self.names, "CSV")
            writer.writerow([_cell(row.get(name)) for name in self.names])
        return buffer.getvalue().encode("utf-8", "backslashreplace")


class _ParquetAnswers(AnswerLines):
    """Writes rows as Parquet, a group of rows for each chunk.

    Args:
        file: The file to write to.
        schema: The types of the columns of the source, if they are known.
        types: Names of Arrow types of columns that may have no value in a whole chunk.
    """

    def __init__(self, file: BinaryIO, schema: pyarrow.Schema | None, types: Mapping[str, str]) -> None:
        super().__init__(file)
        self.schema, self.types = schema, types
        self.writer: Any = None

    def write(self, rows: list[Row], answers: list[Row]) -> None:
        joined = _join(rows, answers)
        if self.writer is None:
            self.schema = self._infer_schema(joined, _all_names(answers))
            self.writer = parquet.ParquetWriter(self.file, self.schema)
        assert self.schema is not None
        for row in joined:
            _check_names(row, self.schema.names, "Parquet")
        try:
            table = pyarrow.Table.from_pylist(joined, self.schema)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"The rows have values of another type than those before them ({error}), which Parquet cannot have. "
                "Write JSON lines (.jsonl)."
            ) from error
        self.writer.write_table(table)

    def close(self) -> None:
        writer = self.writer or parquet.ParquetWriter(self.file, self.schema or pyarrow.schema([]))
        writer.close()
        self.file.flush()
        self.size = self.file.tell()

    def _infer_schema(self, rows: list[Row], answers: list[str]) -> pyarrow.Schema:
        """The types of all columns: those of the source, and of other columns and answers those of their values."""
        source = self.schema or pyarrow.schema([])
        known = {field.name: field for field in source if field.name not in answers}
        names = dict.fromkeys([*source.names, *_all_names(rows)])
        fields = [known[name] if name in known else self._infer_field(name, rows) for name in names]
        return pyarrow.schema(fields, metadata=source.metadata)

    def _infer_field(self, name: str, rows: list[Row]) -> pyarrow.Field:
        try:
            kind = pyarrow.array([row.get(name) for row in rows]).type
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"The column {name!r} has values of several types ({error}), which Parquet cannot have. Write JSON "
                "lines (.jsonl)."
            ) from error
        if pyarrow.types.is_null(kind):
            kind = pyarrow.type_for_alias(self.types.get(name, "string"))
        return pyarrow.field(name, kind)


def open_answers(
    file: Any, kind: str, schema: pyarrow.Schema | None = None, types: Mapping[str, str] | None = None
) -> AnswerLines:
    """A writer for a type of file.

    Args:
        file: The open file.
        kind: See `file_type`.
        schema: The types of the columns of the rows, if they are known.
        types: Names of Arrow types of columns that may have no value in a whole chunk.
    """
    if kind in _DELIMITERS:
        return _CsvAnswers(file, _DELIMITERS[kind])
    return _ParquetAnswers(file, schema, types or {}) if kind == ".parquet" else AnswerLines(file)


def json_line(row: Row) -> bytes:
    """A line of JSON in UTF-8. Half a surrogate pair has no UTF-8 form and is written as an escape."""
    return (_json(row) + "\n").encode("utf-8", "backslashreplace")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    """A value of Parquet that JSON does not have."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    raise DataError(f"The rows have values of type {type(value).__name__}, which only Parquet (.parquet) can have.")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal, datetime.timedelta)):
        return _plain(value)
    return _json(value)


def _join(rows: list[Row], answers: list[Row]) -> list[Row]:
    return [{**row, **answer} for row, answer in zip(rows, answers, strict=True)]


def _all_names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _check_names(row: Row, names: list[str], kind: str) -> None:
    for name in row:
        if name not in names:
            raise DataError(
                f"A row has a column {name!r}, which none of the first rows has, and {kind} has the same columns in "
                "all rows. Write JSON lines (.jsonl)."
            )
