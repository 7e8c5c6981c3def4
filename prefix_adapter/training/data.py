"""Read rows from the Hub or from files, rename their columns, and split them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from io import BufferedReader
from typing import TYPE_CHECKING, Any

import datasets
import pandas
import pyarrow
from pyarrow import csv

from .squad_files import read_squad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .recipe import Data

_READERS = {".jsonl": "json", ".json": "json", ".csv": None, ".tsv": None, ".parquet": "parquet"}
"""The builder of `datasets` for each type of file; `None` for types that `_read_csv` reads."""
FILE_TYPES = ".jsonl, .json, .csv, .tsv or .parquet (.jsonl, .json, .csv and .tsv also as .gz)"


class DataError(ValueError):
    """Rows are invalid or cannot be read. The message names the file or split, and the row, counted from 1."""


def load_rows(data: Data, split: str, seed: int = 0) -> datasets.Dataset:
    """Read the rows of a split.

    Args:
        data: The source of the rows.
        split: train, validation or test: the field of `data` that names the split or file.
        seed: The seed of the draws of a mixture with weights.

    Returns:
        All rows, with the task's column names and class names (see `rename`).

    Raises:
        DataError: If the rows cannot be read, if there are none, or if a column is missing.

    Example:
        >>> rows = load_rows(Data(train="train.jsonl", columns={"text": "review"}), "train")
    """
    if split == "train" and data.mixture is not None:
        return mix([load_rows(each, split) for each in data.sources], data, seed)
    source = getattr(data, split)
    rows = read_file(source) if data.path is None else load_split(data, source)
    return rename(rows, data.columns, data.source_of(split))


def load_split(data: Data, split: str, **more: Any) -> Any:
    """A split of the data set at `data.path`, as `datasets.load_dataset` loads it.

    Args:
        data: The source of the rows.
        split: The split.
        **more: Further arguments of `datasets.load_dataset`.

    Raises:
        DataError: If it cannot be loaded.
    """
    try:
        files = _saved_splits(str(data.path))
        path = "arrow" if files else data.path
        options = {"data_files": files, "revision": data.revision}
        options |= _csv_options(datasets.load_dataset_builder(path, data.name, **options), split)
        return datasets.load_dataset(path, data.name, split=split, **options, **more)
    except Exception as error:
        raise DataError(f"data.path {data.path!r}, split {split!r}: {type(error).__name__}: {error}") from error


def mix(parts: list[datasets.Dataset], data: Data, seed: int) -> datasets.Dataset:
    """Mix the rows of the sources of a mixture. Columns that not all sources have are left out.

    Args:
        parts: The rows of each of `data.sources`.
        data: The source of the rows.
        seed: The seed of the draws of a mixture with weights.

    Raises:
        DataError: If the same column has other types in another source.
    """
    common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    parts = [part.select_columns(common) for part in parts]
    first = parts[0].features
    for number, part in enumerate(parts):
        if part.features != first:
            try:
                parts[number] = part.cast(first)
            except (pyarrow.ArrowException, TypeError, ValueError) as error:
                raise DataError(
                    f"{data.sources[number].source_of('train')}: its columns have other types than those of "
                    f"{data.sources[0].source_of('train')}: {part.features}, and {first}."
                ) from error
    if data.weights is None:
        return datasets.concatenate_datasets(parts)
    return datasets.interleave_datasets(
        parts, probabilities=data.weights, seed=seed, stopping_strategy=data.stopping_strategy
    )


def _saved_splits(folder: str) -> dict[str, str] | None:
    """The files of each split in a folder of `save_to_disk`; `datasets.load_dataset` would guess the splits' names."""
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        with open(splits, encoding="utf-8") as file:
            return {name: os.path.join(folder, name, "*.arrow") for name in json.load(file)["splits"]}
    is_single = os.path.isfile(os.path.join(folder, "state.json"))
    return {"train": os.path.join(folder, "*.arrow")} if is_single else None


def read_file(path: str) -> datasets.Dataset:
    """Read a file of rows.

    Args:
        path: A file of one of `FILE_TYPES`. A JSON file may be in SQuAD's own format (see `read_squad`).

    Raises:
        DataError: If the file is missing, empty, damaged or of an unknown type.

    Example:
        >>> rows = read_file("train.jsonl")
    """
    kind = _kind_of(path)
    try:
        if kind in (".csv", ".tsv"):
            rows = _read_csv(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".json" and (questions := _read_squad(path)) is not None:
            rows = questions
        else:
            # The digest names the cache entry: two versions of a file can have the same modification time, by which
            # `datasets` recognises a file.
            rows = datasets.load_dataset(_READERS[kind], _digest(path), data_files=path, split="train")
            rows.data.validate(full=True)  # checks the encoding of JSON strings, which nothing else does
            if kind != ".parquet" and any(map(_is_time, rows.features.values())):
                rows = datasets.Dataset.from_list(_read_json(path))
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{path} has no rows.") from error
        cause = str((_damaged_line(path) if kind == ".jsonl" else None) or error.__cause__ or error)
        cause = re.sub(r"^(CSV parse error|In CSV column #\d+): Row #(\d+)", r"row \2 (with the header)", cause)
        raise DataError(f"{path} cannot be read as {kind[1:]}: {cause}{_encoding_hint(path, kind)}") from error
    return rows


def _encoding_hint(path: str, kind: str) -> str:
    """A sentence, after a line break, that says how to save a text file that is not in UTF-8; nothing for others."""
    if kind == ".parquet":
        return ""
    try:
        with _open(path) as file:
            file.read().decode("utf-8")
    except UnicodeDecodeError:
        return "\nThe file is not in UTF-8: save it in this encoding (in Excel: CSV UTF-8)."
    except (OSError, EOFError):  # a damaged archive
        pass
    return ""


def columns_found(names: Iterable[str]) -> str:
    """The columns of rows that lack one, for an error message, and a hint if a CSV file has another delimiter."""
    found = [*names]
    others = [each for each in ";\t|" if len(found) == 1 and each in found[0]]
    hint = f" Its cells are separated by {others[0]!r}: save it with commas, or as .tsv with tabs." if others else ""
    return f"it has {found}.{hint}"


def _kind_of(path: str) -> str:
    """The type of a file of rows, by its name.

    Raises:
        DataError: If the file is missing, empty or of an unknown type.
    """
    if not os.path.isfile(path):
        hint = "" if os.path.splitext(path)[1] else " (for a split of a data set of the Hub, give `data.path` too)"
        raise DataError(f"There is no file {path!r}{hint}.")
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    if kind not in _READERS:
        raise DataError(f"{path}: files must be {FILE_TYPES}.")
    if not os.path.getsize(path):
        raise DataError(f"{path} is empty.")
    return kind


def stream_file(path: str) -> datasets.IterableDataset:
    """The rows of a file of one of `FILE_TYPES`, to be read one after the other. Cells of CSV are texts.

    Raises:
        DataError: If the file is missing, empty, of an unknown type, or its header is damaged.
    """
    kind = _kind_of(path)
    options: dict[str, Any] = {}
    try:
        if kind in (".csv", ".tsv"):
            delimiter = "\t" if kind == ".tsv" else ","
            options = {"sep": delimiter, **_as_texts(csv_columns(path, delimiter))}
        return datasets.load_dataset(
            _READERS[kind] or "csv", data_files=path, split="train", streaming=True, **options
        )
    except Exception as error:
        cause = (_damaged_line(path) if kind == ".jsonl" else None) or error
        raise DataError(f"{path} cannot be read as {kind[1:]}: {cause}") from error


def _read_squad(path: str) -> datasets.Dataset | None:
    """The questions of a file in SQuAD's own format; `None` for another format."""
    with _open(path) as file:
        rows = read_squad(file)
        if rows is None:
            return None
        found = list(rows)
    if not found:
        raise ValueError("corresponds to no data")
    return datasets.Dataset.from_list(found)


def _read_csv(path: str, delimiter: str) -> datasets.Dataset:
    """Read each cell of a CSV file as text, and an empty cell as `None`.

    Types are not inferred: inference would turn 01 into 1, 0.0 into a number, and NA into nothing.

    Raises:
        ValueError: If there are no rows, if a row has more or fewer cells than the header, or if two columns have the
            same name.
    """

    names = csv_columns(path, delimiter)
    table = csv.read_csv(path, **csv_options(delimiter, names))
    if not table.num_rows:
        raise ValueError("corresponds to no data")
    return datasets.Dataset(table)


def csv_columns(path: str, delimiter: str, on_bad_row: Callable[[Any], str] | None = None) -> list[str]:
    """The names of the columns of a CSV file.

    Args:
        path: The file.
        delimiter: The character between two cells.
        on_bad_row: See `csv_options`.

    Raises:
        ValueError: If two columns have the same name.
    """
    with csv.open_csv(path, **csv_options(delimiter, [], on_bad_row=on_bad_row)) as reader:
        names: list[str] = reader.schema.names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"there are two columns {name!r}")
    return names


def csv_options(
    delimiter: str, names: list[str], kind: Any = None, on_bad_row: Callable[[Any], str] | None = None
) -> dict[str, Any]:
    """The options with which pyarrow reads each cell of a CSV file as text, and an empty cell as `None`.

    Args:
        delimiter: The character between two cells.
        names: The names of the columns.
        kind: The type of the columns; text by default.
        on_bad_row: Called with each row that has more or fewer cells than the header (`pyarrow.csv.InvalidRow`). It
            returns `"skip"` or `"error"`; by default such a row is an error.
    """
    return {
        # Errors name the row only without threads. A row must fit into a block.
        "read_options": csv.ReadOptions(use_threads=False, block_size=2**26),
        "parse_options": csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_bad_row
        ),
        "convert_options": csv.ConvertOptions(
            column_types=dict.fromkeys(names, kind or pyarrow.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    }


def _csv_options(builder: Any, split: str) -> dict[str, Any]:
    """The options with which `datasets.load_dataset` reads CSV as `_read_csv` does; none for other formats.

    Types that the data set declares are kept.

    Args:
        builder: The builder of the data set. That of CSV is recognised by its settings of pandas.
        split: The split, with or without a slice (`train[:100]`).
    """
    if not hasattr(builder.config, "keep_default_na") or builder.info.features is not None:
        return {}
    files = builder.config.data_files or {}
    name = next((name for name in files if re.match(rf"{re.escape(str(name))}\b", split)), None)
    if name is None:  # `load_dataset` raises the error for an unknown split
        return {}
    header = pandas.read_csv(files[name][0], sep=builder.config.sep, nrows=0)
    return _as_texts(header.columns)


def _as_texts(names: Iterable[str]) -> dict[str, Any]:
    """The options with which `datasets` reads each cell of CSV as text, and an empty cell as `None`."""
    text = datasets.Value("string")
    return {
        "features": datasets.Features(dict.fromkeys(names, text)),
        "keep_default_na": False,
        "na_values": [""],
    }


def _is_time(feature: Any) -> bool:
    """Whether `datasets` parsed the texts of a JSON column as times. JSON itself has no such type."""
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Value) and inner.dtype.startswith(("timestamp", "date", "time"))


def _read_json(path: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON or JSON lines, with all texts as written."""
    with _open(path) as file:
        text = file.read().decode("utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    return found if isinstance(found, list) else [found]


def _open(path: str) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _damaged_line(path: str) -> str | None:
    """The first line of a file of JSON lines that is not a JSON object, and what is wrong with it."""
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError as error:
                    return f"line {number}: {getattr(error, 'msg', error)}"
                if not isinstance(row, dict):
                    return f"line {number}: expected a JSON object, got {row!r}"
    except (OSError, EOFError) as error:
        return str(error)
    return None


def rename(rows: datasets.Dataset, columns: dict[str, str], source: str) -> datasets.Dataset:
    """Rename columns, and replace the numbers of classes (`datasets.ClassLabel`) by the names of the classes.

    Args:
        rows: The rows.
        columns: `{name of the task: name in the data}`. One column of the data can serve as several of the task.
        source: The name of the rows in error messages.

    Raises:
        DataError: If there are no rows, or a column is missing.

    Example:
        >>> rows = rename(rows, {"text": "review"}, "train.jsonl")
    """
    if not len(rows):
        raise DataError(f"{source} has no rows.")
    firsts: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            raise DataError(
                f"{source} has no column {theirs!r} (data.columns.{ours}); {columns_found(rows.column_names)}"
            )
        firsts.setdefault(theirs, ours)
    replaced = [name for name in rows.column_names if name in columns and name not in firsts]
    rows = _name_classes(rows.remove_columns(replaced).rename_columns(firsts))
    for ours, theirs in columns.items():
        if ours != firsts[theirs]:
            rows = rows.add_column(ours, rows[firsts[theirs]])
    return rows


def _name_classes(rows: datasets.Dataset) -> datasets.Dataset:
    """Replace the numbers of classes by their names, and -1 (no class) by `None`."""
    features, names = rows.features.copy(), {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)  # the element type of a list
        # COPA's classes choice1 and choice2 have the names of columns. Their numbers are what the task needs.
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
    """Draw `most` rows at random. Return all rows if there are no more, or if `most` is `None`."""
    if most is None or most >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(most)).flatten_indices()


def hold_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows at random into training and validation rows.

    Args:
        rows: The rows.
        fraction: The share of validation rows; at least one row and at most all but one.
        seed: The seed of the draw.

    Raises:
        DataError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError("There is only one training row, so none can be held out. Set `data.validation`, or add rows.")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"].flatten_indices(), parts["test"].flatten_indices()


def divide(rows: dict[str, datasets.Dataset], data: Data, seed: int) -> dict[str, datasets.Dataset]:
    """Hold out validation rows if the recipe names none, and draw at most the maximum number of rows per split.

    Args:
        rows: All rows of each split. Splits that are not needed can be missing; if the recipe names no validation
            rows, `validation` needs `train`.
        data: The settings of the recipe (`validation_fraction`, `max_train_rows`, ...).
        seed: The seed of the recipe.
    """
    if data.validation is None and "train" in rows:
        rows = dict(rows)
        rows["train"], rows["validation"] = hold_out(rows["train"], data.validation_fraction, seed)
    return {split: take(own, getattr(data, f"max_{split}_rows"), seed) for split, own in rows.items()}


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn columns into rows: `{"a": [1, 2]}` into `[{"a": 1}, {"a": 2}]`."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
