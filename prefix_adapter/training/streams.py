"""Training rows that are read while training (`data.streaming`)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets

from .batches import Batches
from .data import DataError, columns_found, load_split, stream_file

if TYPE_CHECKING:
    from .recipe import Data
    from .tasks import Task


class RowStream:
    """The training rows of a recipe, a block at a time, pass after pass.

    Args:
        data: The source of the rows.
        task: The task.
        seed: The seed of the draws of a mixture.

    Attributes:
        source: The name of the rows in error messages.
        epoch: The number of finished passes.
        block: The number of blocks that were read in this pass.
        row: The number of rows that were read in this pass.
    """

    def __init__(self, data: Data, task: Task, seed: int) -> None:
        self.source, self.task = data.source_of("train"), task
        self.size = data.shuffle_buffer
        self._held_out = (data.max_validation_rows or 0) if data.validation is None else 0
        self._rows = _open(data, "train", task, seed).skip(self._held_out)
        self._beginning = copy.deepcopy(self._rows.state_dict())
        self.epoch, self.block, self.row = 0, 0, 0
        self._iterator = iter(self._rows)

    def state(self) -> dict[str, Any]:
        """The place in the stream, as plain values."""
        return {"epoch": self.epoch, "block": self.block, "row": self.row, "rows": self._rows.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the place where `state` was called."""
        self.epoch, self.block, self.row = state["epoch"], state["block"], state["row"]
        self._rows.load_state_dict(state["rows"])
        self._iterator = iter(self._rows)

    def read(self, count: int) -> datasets.Dataset:
        """Read the next block. After the last row, the next pass begins.

        Args:
            count: The number of rows; the last block of a pass may have fewer.

        Raises:
            DataError: If the rows cannot be read or are invalid, or if there are none.
        """
        rows = self._next_rows(count)
        if not rows and self.row:
            self.epoch, self.block, self.row = self.epoch + 1, 0, 0
            self._rows.load_state_dict(self._beginning)
            self._iterator = iter(self._rows)
            rows = self._next_rows(count)
        if not rows:
            raise DataError(f"{self.source} has no rows to train on.")
        found = _checked(rows, self.task, self.source, self._held_out + self.row)
        self.block, self.row = self.block + 1, self.row + len(rows)
        return found

    def _next_rows(self, count: int) -> list[dict[str, Any]]:
        return _read(self._iterator, count, self.source, self._held_out + self.row)


class StreamBatches:
    """The batches of a stream: those of one block after the other.

    The order within a block is random. The last batch of a block is filled from the block's start, as `Batches` fills
    that of an epoch. The state holds the place where the current block begins, so a resumed run continues bit for bit.

    Args:
        stream: The rows.
        use: Makes the features of a block the current ones, and returns their number.
        batch_size: Features of a batch, over all processes.
        seed: The seed of the order.
    """

    steps_per_epoch: int | None = None
    """Not known."""

    def __init__(self, stream: RowStream, use: Callable[[datasets.Dataset], int], batch_size: int, seed: int) -> None:
        self.stream, self.use, self.batch_size, self.seed = stream, use, batch_size, seed
        self._first = 0
        self._read_block()

    def __getitem__(self, step: int) -> list[int]:
        """The indices of the features of a step among those of its block, which become the current ones.

        Steps must be asked for in order.
        """
        while step >= self._first + self._batches.steps_per_epoch:
            self._first += self._batches.steps_per_epoch
            self._read_block()
        return self._batches[step - self._first]

    def _read_block(self) -> None:
        self._state = {"first_step": self._first, **self.stream.state()}
        size = -(-self.stream.size // self.batch_size) * self.batch_size  # so that no batch is filled
        count = self.use(self.stream.read(size))
        seed = random.Random(f"{self.seed} {self.stream.epoch} {self.stream.block}").getrandbits(63)
        self._batches = Batches(count, self.batch_size, seed)

    def state(self) -> dict[str, Any]:
        """The place of the current block, as plain values."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the block that was the current one when `state` was called."""
        self._first = state["first_step"]
        self.stream.load_state(state)
        self._read_block()

    def task_steps(self, steps: int) -> list[int]:
        """See `Batches.task_steps`."""
        return [steps]

    def epochs(self, steps: int) -> float:
        """The number of finished passes over the stream."""
        return float(self.stream.epoch)


def stream_splits(data: Data, task: Task, seed: int) -> dict[str, datasets.Dataset | RowStream]:
    """The rows by split: a stream of training rows, and validation and test rows in memory.

    Raises:
        DataError: If they cannot be read, or are invalid.
    """
    found: dict[str, datasets.Dataset | RowStream] = {"train": RowStream(data, task, seed)}
    for split in ("validation", *(("test",) if data.test else ())):
        found[split] = first_rows(data, split, task, seed)
    return found


def first_rows(data: Data, split: str, task: Task, seed: int) -> datasets.Dataset:
    """The rows of `validation` or `test`: the first ones of their own source, or of the training stream.

    Raises:
        DataError: If they cannot be read or are invalid, or if there are none.
    """
    name = split if getattr(data, split) else "train"
    source = data.source_of(name)
    rows = _read(iter(_open(data, name, task, seed)), getattr(data, f"max_{split}_rows"), source, 0)
    if not rows:
        raise DataError(f"{source} has no rows.")
    return _checked(rows, task, source, 0)


def check_optional_columns(task: Task, sources: Sequence[tuple[str, Collection[str]]]) -> None:
    """Check that each optional column of a task is in all sources or in none.

    Args:
        task: The task.
        sources: The name and the columns of each source.

    Raises:
        DataError: If it is not.
    """
    for column in task.optional_columns:
        lacking = [name for name, columns in sources if column not in columns]
        if 0 < len(lacking) < len(sources):
            raise DataError(
                f"{lacking[0]} has no column {column!r}, but other sources have: that would be another task."
            )


def _open(data: Data, split: str, task: Task, seed: int) -> datasets.IterableDataset:
    """The rows of a split, with the columns of the task only."""
    sources = data.sources if split == "train" else [data]
    streams, found = [], list[tuple[str, Collection[str]]]()
    for each in sources:
        rows, source = getattr(each, split), each.source_of(split)
        stream = stream_file(rows) if each.path is None else load_split(each, rows, streaming=True)
        first = _read(iter(stream), 1, source, 0)
        if not first:
            raise DataError(f"{source} has no rows.")
        for ours, theirs in each.columns.items():
            if theirs not in first[0]:
                raise DataError(f"{source} has no column {theirs!r} (data.columns.{ours}); {columns_found(first[0])}")
        row = _rename(first[0], each.columns)
        task.check(datasets.Dataset.from_list([row]), source)
        names = task.column_names(row.keys())
        found.append((source, names))
        stream = stream.map(_select, fn_kwargs={"columns": each.columns, "names": names})
        streams.append(stream.select_columns(names))
    check_optional_columns(task, found)
    if len(streams) == 1:
        return streams[0]
    try:
        return datasets.interleave_datasets(
            streams, probabilities=data.weights, seed=seed, stopping_strategy=data.stopping_strategy
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"data.mixture: the columns of the sources have different types: {error}") from error


def _rename(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _select(row: dict[str, Any], columns: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    row = _rename(row, columns)
    return {name: row.get(name) for name in names}


def _checked(rows: list[dict[str, Any]], task: Task, source: str, done: int) -> datasets.Dataset:
    """The rows as a data set.

    Raises:
        DataError: For the first invalid row.
    """
    for number, row in enumerate(rows, start=done + 1):
        if problem := task.problem(row, with_targets=True):
            raise DataError(f"{source}, row {number}: {problem}")
    return datasets.Dataset.from_list(rows)


def _read(iterator: Any, count: int | None, source: str, done: int) -> list[dict[str, Any]]:
    """The next `count` rows; all of them if `None`.

    Raises:
        DataError: If they cannot be read.
    """
    try:
        return list(islice(iterator, count))
    except Exception as error:  # of the readers of `datasets`: any kind
        cause = error.__cause__ or error
        raise DataError(f"{source}, after row {done:,}: {type(cause).__name__}: {cause}") from error
