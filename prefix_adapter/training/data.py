"""Rows from the Hub or from files, under the task's names for their columns."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

import datasets
import pandas
import pyarrow
from pyarrow import csv

if TYPE_CHECKING:
    from .recipe import Data

_READERS = {".jsonl": "json", ".json": "json", ".csv": None, ".tsv": None, ".parquet": "parquet"}
"""The builders of `datasets` that read files; tables of text are read here."""
FILE_TYPES = ".jsonl, .json, .csv, .tsv or .parquet (.jsonl, .json, .csv and .tsv also as .gz)"


class DataError(ValueError):
    """Rows that cannot be learnt from; the message names the file or split, and the row, counted from 1."""


def load_rows(data: Data, split: str) -> datasets.Dataset:
    """Read the rows of `data.train`, `data.validation` or `data.test`.

    Returns:
        The rows, as `rename` gives them.

    Raises:
        DataError: if there are none, or a column is missing.
    """
    source = getattr(data, split)
    if data.path is None:
        rows = read_file(source)
    else:
        try:
            files = _saved(data.path)
            path = "arrow" if files else data.path
            options = {"data_files": files, "revision": data.revision}
            options |= _texts_of_csv(datasets.load_dataset_builder(path, data.name, **options), source)
            rows = datasets.load_dataset(path, data.name, split=source, **options)
        except Exception as error:
            raise DataError(f"data.path {data.path!r}, split {source!r}: {type(error).__name__}: {error}") from error
    return rename(rows, data.columns, source)


def _saved(folder: str) -> dict[str, str] | None:
    """Where the splits are that `save_to_disk` left in a folder; `datasets.load_dataset` would guess their names."""
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        with open(splits, encoding="utf-8") as file:
            return {name: os.path.join(folder, name, "*.arrow") for name in json.load(file)["splits"]}
    alone = os.path.isfile(os.path.join(folder, "state.json"))
    return {"train": os.path.join(folder, "*.arrow")} if alone else None


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
    try:
        if kind in (".csv", ".tsv"):
            rows = _read_csv(path, "\t" if kind == ".tsv" else ",")
        else:
            # `datasets` tells by the time of change whether it has read a file before; two versions can have the same.
            rows = datasets.load_dataset(_READERS[kind], _digest(path), data_files=path, split="train")
            rows.data.validate(full=True)  # nothing else looks at the encoding of JSON's texts
            if kind != ".parquet" and any(map(_is_time, rows.features.values())):
                rows = datasets.Dataset.from_list(_read_json(path))
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{path} has no rows.") from error
        cause = str((_damaged_line(path) if kind == ".jsonl" else None) or error.__cause__ or error)
        cause = re.sub(r"^(CSV parse error|In CSV column #\d+): Row #(\d+)", r"row \2 (with the header)", cause)
        raise DataError(f"{path} cannot be read as {kind[1:]}: {cause}") from error
    return rows


def _read_csv(path: str, delimiter: str) -> datasets.Dataset:
    """Read a file of texts: each cell as it is written, and `None` for an empty one.

    The task says what a column means. A reader that guesses makes 1 of 01, a number of 0.0, and nothing of NA.

    Raises:
        ValueError: if a row has more or fewer cells than the header, or two columns have the same name.
    """

    def options(names: list[str]) -> dict[str, Any]:
        return {
            # Without threads an error names the row. No row may be longer than a block.
            "read_options": csv.ReadOptions(use_threads=False, block_size=2**26),
            "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            "convert_options": csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        }

    with csv.open_csv(path, **options([])) as reader:
        names = reader.schema.names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"there are two columns {name!r}")
    table = csv.read_csv(path, **options(names))
    if not table.num_rows:
        raise ValueError("corresponds to no data")
    return datasets.Dataset(table)


def _texts_of_csv(builder: Any, split: str) -> dict[str, Any]:
    """What `datasets.load_dataset` is told so that it reads CSV as `_read_csv` does; nothing for other formats.

    The reader of CSV is known by its having settings of pandas'. Types that the data set declares are kept.

    Args:
        builder: the data set's builder.
        split: the split, perhaps with a slice behind it.
    """
    if not hasattr(builder.config, "keep_default_na") or builder.info.features is not None:
        return {}
    files = builder.config.data_files or {}
    name = next((name for name in files if re.match(rf"{re.escape(str(name))}\b", split)), None)
    if name is None:  # loading will say which splits there are
        return {}
    header = pandas.read_csv(files[name][0], sep=builder.config.sep, nrows=0)
    text = datasets.Value("string")
    return {
        "features": datasets.Features(dict.fromkeys(header.columns, text)),
        "keep_default_na": False,
        "na_values": [""],
    }


def _is_time(feature: Any) -> bool:
    """Whether a JSON column was read as one of times. JSON has texts only, and `datasets` takes some for times."""
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Value) and inner.dtype.startswith(("timestamp", "date", "time"))


def _read_json(path: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON, or of JSON lines, with all texts as they are written."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        text = file.read().decode("utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    return found if isinstance(found, list) else [found]


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _damaged_line(path: str) -> str | None:
    """Which line of a file of JSON lines is the first that is none, and why."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError as error:
                    return f"line {number}: {getattr(error, 'msg', error)}"
                if not isinstance(row, dict):
                    return f"line {number}: it must be an object, it is {row!r}"
    except (OSError, EOFError) as error:
        return str(error)
    return None


def rename(rows: datasets.Dataset, columns: dict[str, str], source: str) -> datasets.Dataset:
    """Give columns the task's names, and classes (`datasets.ClassLabel`) their own in place of their numbers.

    Args:
        rows: the rows.
        columns: `{ours: theirs}`.
        source: what the rows are called in error messages.

    Raises:
        DataError: if there are no rows, or a column is missing.
    """
    if not len(rows):
        raise DataError(f"{source} has no rows.")
    firsts: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(f"{source} has no column {theirs!r} (data.columns.{ours}); it has {rows.column_names}.")
        firsts.setdefault(theirs, ours)
    replaced = [name for name in rows.column_names if name in columns and name not in firsts]
    rows = _name_classes(rows.remove_columns(replaced).rename_columns(firsts))
    for ours, theirs in columns.items():
        if ours != firsts[theirs]:
            rows = rows.add_column(ours, rows[firsts[theirs]])
    return rows


def _name_classes(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the names of classes for their numbers; what has no class (-1) is `None`."""
    features, names = rows.features.copy(), {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        # Classes that are called like columns, as COPA's choice1 and choice2, are the numbers of those columns.
        if isinstance(inner, datasets.ClassLabel) and not set(inner.names) <= set(rows.column_names):
            names[column] = dict(enumerate(inner.names))
            text = datasets.Value("string")
            features[column] = text if inner is feature else datasets.List(text)
    if not names:
        return rows

    def name(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            column: [[own.get(i) for i in each] if isinstance(each, list) else own.get(each) for each in batch[column]]
            for column, own in names.items()
        }

    return rows.map(name, batched=True, features=features, desc="Naming classes")


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


def divide(rows: dict[str, datasets.Dataset], data: Data, seed: int) -> dict[str, datasets.Dataset]:
    """The rows that a run trains on, chooses by and is measured on, of those that were read.

    Args:
        rows: all rows of the splits that the recipe names; those of other splits than the wanted one may be missing,
            but to hold out validation rows the training rows must be there.
        data: where the recipe says how many rows to hold out, and to use at most.
        seed: the recipe's.
    """
    if data.validation is None and "train" in rows:
        rows = dict(rows)
        rows["train"], rows["validation"] = hold_out(rows["train"], data.validation_fraction, seed)
    return {split: take(own, getattr(data, f"max_{split}_rows"), seed) for split, own in rows.items()}


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns, row by row."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
