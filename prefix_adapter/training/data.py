"""Rows from the Hub or from files, under the task's names for their columns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import datasets

if TYPE_CHECKING:
    from .recipe import Data

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
FILE_TYPES = ".jsonl, .json, .csv, .tsv or .parquet (.jsonl, .json, .csv and .tsv also as .gz)"


class DataError(ValueError):
    """Rows that cannot be learnt from; the message names the file or split, and the row, counted from 1."""


def load_rows(data: Data, split: str) -> datasets.Dataset:
    """Read the rows of `data.train`, `data.validation` or `data.test`.

    Returns:
        The rows, with the columns of `data.columns` renamed.

    Raises:
        DataError: if there are none, or a column is missing.
    """
    source = getattr(data, split)
    if data.path is None:
        rows = read_file(source)
    else:
        try:
            rows = datasets.load_dataset(data.path, data.name, split=source, revision=data.revision)
        except Exception as error:
            raise DataError(f"data.path {data.path!r}, split {source!r}: {type(error).__name__}: {error}") from error
    return rename(rows, data.columns, source)


def read_file(path: str) -> datasets.Dataset:
    """Read a file of rows.

    Raises:
        DataError: if it is missing, empty, of an unknown type or damaged.
    """
    if not os.path.isfile(path):
        hint = "" if os.path.splitext(path)[1] else " (for a split of a data set of the Hub, give `data.path` too)"
        raise DataError(f"There is no file {path!r}{hint}.")
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    if kind not in _READERS:
        raise DataError(f"{path}: files must be {FILE_TYPES}.")
    if not os.path.getsize(path):
        raise DataError(f"{path} is empty.")
    options: dict[str, Any] = {"sep": "\t"} if kind == ".tsv" else {}
    try:
        rows = datasets.load_dataset(_READERS[kind], data_files=path, split="train", **options)
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as {kind[1:]}: {cause}") from error
    return rows


def rename(rows: datasets.Dataset, columns: dict[str, str], source: str) -> datasets.Dataset:
    """Give columns the task's names.

    Args:
        rows: the rows.
        columns: `{ours: theirs}`.
        source: what the rows are called in error messages.

    Raises:
        DataError: if there are no rows, or a column is missing.
    """
    if not len(rows):
        raise DataError(f"{source} has no rows.")
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(f"{source} has no column {theirs!r} (data.columns.{ours}); it has {rows.column_names}.")
        if ours == theirs:
            continue
        if ours in rows.column_names:
            rows = rows.remove_columns(ours)
        rows = (
            rows.add_column(ours, rows[theirs]) if _used_twice(columns, theirs) else rows.rename_column(theirs, ours)
        )
    return rows


def _used_twice(columns: dict[str, str], theirs: str) -> bool:
    return list(columns.values()).count(theirs) > 1


def take(rows: datasets.Dataset, most: int | None, seed: int) -> datasets.Dataset:
    """`most` of the rows, drawn at random; all of them if there are no more, or if `most` is `None`."""
    if most is None or most >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(most)).flatten_indices()


def hold_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows at random into those to learn from and those to choose by.

    Raises:
        DataError: if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError("There is one training row: none can be held out. Give `data.validation`, or more rows.")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"].flatten_indices(), parts["test"].flatten_indices()
