"""Load, evaluate and run a trained adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm

from ..files.contents import SECOND
from ..files.source import AdapterSource
from . import checkpoint, outputs
from .adapter_recipe import load_adapter_recipe
from .answer_files import AnswerLines, FoundRow, RowSource, file_type, open_answers, open_rows
from .data import DataError, columns_found, divide, load_rows
from .evaluation import answer_rows, evaluate
from .files import atomic_write, check_new, fsync_path
from .loop import training_accelerator
from .model import (
    check_virtual_tokens,
    load_base,
    load_tokenizer,
    peft_allows_a_second_adapter,
    trained_parameters,
    wrap,
)
from .recipe import NO_ADAPTER, Recipe, RecipeError, load_recipe, say
from .streams import first_rows
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .tasks import Task

_SPLITS = ("test", "validation", "train")
_SHOWN_ROWS = 10  # the bad rows that are named
PARTIAL = ".partial"
"""The suffix of an output file of `predict` until all rows are answered."""


def load_trained(
    adapter: str | os.PathLike[str],
    model: str | None = None,
    revision: str | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Recipe, Task, nn.Module]:
    """Load an adapter that `train` wrote, with its base model and task.

    The recipe in the adapter's folder is untrusted: only harmless settings are read from it (`load_adapter_recipe`).

    Args:
        adapter: The folder that `train` wrote, or the name of the adapter on the Hub.
        model: The base model, a folder or a name on the Hub; by default that of the recipe.
        revision: The revision of the adapter on the Hub.
        config: A recipe that you trust. It replaces the recipe in the adapter's folder, and all of it is used.
        trust_remote_code: Whether to run Python code from the base model's repository.

    Returns:
        The recipe, the task with its labels, and the model in eval mode, on the CPU.

    Raises:
        RecipeError: If there is no adapter of `train`, or if its recipe sets what only the caller can set.

    Example:
        >>> recipe, task, model = load_trained("runs/ner")
        >>> answer_rows(task, model, {"tokens": [["A", "sentence"]]}, 8, torch.device("cpu"))
    """
    recipe = _recipe_of(adapter, model, revision, config, trust_remote_code)
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    base, new = load_base(recipe, task)
    kind = recipe.adapter["peft_type"]
    if kind in NO_ADAPTER and not recipe.second_adapter:
        whole = wrap(recipe, task, base, new)
        if trained_parameters(whole):
            checkpoint.load_weights(whole, Path(adapter))
        return recipe, task, whole.eval()
    wrapped: Any = base
    try:
        if kind == "FULL":
            checkpoint.load_weights(base, Path(adapter))
        else:
            wrapped = _load_adapter(base, adapter, "default", revision=revision)
        if recipe.second_adapter:
            with peft_allows_a_second_adapter():
                wrapped = _load_adapter(wrapped, adapter, SECOND, revision=revision, subfolder=SECOND)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{adapter}: there is no finished adapter to load onto {recipe.model}: {error}") from error
    check_virtual_tokens(recipe, task, wrapped.active_peft_config)
    return recipe, task, wrapped.eval()


def _load_adapter(model: Any, adapter: str | os.PathLike[str], name: str, **place: Any) -> PeftModel:
    """Put a saved adapter into a model.

    Args:
        model: The model.
        adapter: The adapter's folder, or its name on the Hub.
        name: Its name in the model.
        **place: Its `revision`, and its `subfolder`.

    Raises:
        ValueError: If it is damaged, or does not fit the model.
        OSError: If there is none.
    """
    if getattr(PeftConfig.from_pretrained(str(adapter), **place), "megatron_config", None):
        raise ValueError("`megatron_core` in its configuration names a module to import, which is not allowed.")
    return PeftModel.from_pretrained(model, str(adapter), adapter_name=name, **place)


def _recipe_of(
    adapter: str | os.PathLike[str],
    model: str | None,
    revision: str | None,
    config: str | os.PathLike[str] | None,
    trust_remote_code: bool,
) -> Recipe:
    """Read the recipe for an adapter; see `load_trained`."""
    if config is not None:
        overrides = {} if model is None else {"model": model}
        return load_recipe(config, trust_remote_code=trust_remote_code, **overrides)
    source = AdapterSource.of(adapter, kwargs={"revision": revision})
    try:
        path = source.find(outputs.RECIPE, "it was not written by `prefix-adapter train`")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return load_adapter_recipe(path, model=model, rows=os.path.isdir(adapter), trust_remote_code=trust_remote_code)


class Metrics(dict[str, float]):
    """Metrics by name, and the rows that they were computed on.

    Attributes:
        split: test, validation or train for rows of the run; `None` for another file.
        source: The file of the rows, or the data set and its split.
        rows: The number of rows.
    """

    split: str | None
    source: str
    rows: int


def evaluate_adapter(
    adapter: str | os.PathLike[str],
    data: str | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    batch_size: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Metrics:
    """Evaluate a trained adapter on rows with targets. Under `accelerate launch` the processes share the work.

    Args:
        adapter: The folder that `train` wrote, or the name of the adapter on the Hub.
        data: A file, of which all rows are used; or `test`, `validation` or `train` for exactly the rows that the run
            used. By default the test rows of the run, or its validation rows if it had no test rows.
        model: The base model, a folder or a name on the Hub; by default that of the recipe.
        revision: The revision of the adapter on the Hub.
        batch_size: Features per forward pass; by default the recipe's `eval_batch_size`.
        predictions: A file to write the rows with their predictions to: .csv, .tsv, .parquet, or JSON lines.
        overwrite: Whether an existing file `predictions` is replaced.
        config: A recipe that you trust. It replaces the recipe in the adapter's folder, and all of it is used.
        trust_remote_code: Whether to run Python code from the base model's repository.

    Returns:
        The metrics by name, with the rows that they were computed on.

    Raises:
        RecipeError: If there is no such adapter.
        DataError: If the rows are invalid, or if `predictions` is the file of the rows.
        FileExistsError: If `predictions` exists and `overwrite` is false.
        OSError: If the predictions cannot be written.

    Example:
        >>> metrics = evaluate_adapter("runs/ner", "other.jsonl")
        >>> metrics["f1"], metrics.rows
    """
    if predictions is not None:
        if data is not None and data not in _SPLITS:
            _check_not_source(data, Path(predictions))
        _check_target(predictions)
        check_new(Path(predictions), overwrite)
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    if (data is None or data in _SPLITS) and config is None and not os.path.isdir(adapter):
        raise RecipeError(
            f"{adapter}: the source of the rows is not taken from an adapter on the Hub. Name a file of rows, or a "
            "recipe that you trust (--config, in Python `config=`)."
        )
    if data is None:
        data = "test" if recipe.data.test else "validation"
    if data in _SPLITS:
        if predictions is not None and recipe.data.path is None:
            sources = (source.train for source in recipe.data.sources)
            for file in filter(None, (*sources, recipe.data.validation, recipe.data.test)):
                _check_not_source(file, Path(predictions))
        split, source, rows = data, *_rows_of_run(recipe, task, data)
    else:
        split, source = None, data
        rows = load_rows(dataclasses.replace(recipe.data, path=None, test=data), "test")
    task.check(rows, source)
    recipe.report_to = []
    with training_accelerator(recipe) as accelerator:
        trained.to(accelerator.device)
        found, answers = evaluate(task, trained, rows, batch_size or recipe.eval_batch_size, accelerator)
        if predictions is not None and accelerator.is_main_process:
            target = Path(os.path.realpath(predictions))
            target.parent.mkdir(parents=True, exist_ok=True)
            kind = file_type(predictions)
            with atomic_write(target) as scratch, scratch.open("wb") as out:
                written = open_answers(out, kind, rows.features.arrow_schema, task.answer_types)
                for start in range(0, len(rows), 1000):
                    chunk = [rows[index] for index in range(start, min(start + 1000, len(rows)))]
                    written.write(chunk, answers[start : start + len(chunk)])
                written.close()
    metrics = Metrics(found)
    metrics.split, metrics.source, metrics.rows = split, source, len(rows)
    return metrics


def _rows_of_run(recipe: Recipe, task: Task, split: str) -> tuple[str, Dataset]:
    """The name and the rows of a split, as a run used it."""
    data = recipe.data
    if split == "test" and data.test is None:
        raise RecipeError("`data.test`: the run had no test rows. Name a file, or evaluate on `validation`.")
    if data.streaming and split == "train":
        raise RecipeError("`data.streaming`: the run had a stream of training rows. Name a file.")
    read = "train" if split == "validation" and data.validation is None else split
    source = data.source_of(read)
    if data.validation is None and split != "test":
        part = "held out of" if split == "validation" else "not held out of"
        source = f"{part} {source}"
    if data.streaming:
        return source, first_rows(data, split, task, recipe.seed)
    return source, divide({read: load_rows(data, read, recipe.seed)}, data, recipe.seed)[split]


def predict(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: str | None = None,
    revision: str | None = None,
    batch_size: int | None = None,
    chunk_size: int = 1000,
    device: str | None = None,
    bad_rows: Literal["stop", "skip"] = "stop",
    progress: bool = False,
    overwrite: bool = False,
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Predict the rows of a file of any size, `chunk_size` rows at a time.

    Files are CSV (.csv, .tsv), Parquet (.parquet), or JSON lines. CSV is read as in training: each cell is a text, an
    empty cell is missing. In CSV, values that are no texts are written as JSON.

    The rows with their predictions are written to `<target>.partial`, which is renamed to `target` when all rows are
    done. After an error the `.partial` file has the predictions for all rows before the row that the error names.

    Args:
        adapter: The folder that `train` wrote, or the name of the adapter on the Hub.
        source: A file of rows; CSV and JSON lines may be compressed (.gz). `-` for JSON lines from standard input.
        target: A file for the same rows with `prediction` (and, for some tasks, more) added, or `-` for JSON lines to
            standard output.
        model: The base model, a folder or a name on the Hub; by default that of the recipe.
        revision: The revision of the adapter on the Hub.
        batch_size: Features per forward pass; by default the recipe's `eval_batch_size`.
        chunk_size: Number of rows that are read and predicted together. Those of similar length share a batch.
        device: The device to compute on; by default a GPU if there is one.
        bad_rows: Whether a row that cannot be read or answered is an error, or is left out. The first ten rows that
            are left out are named on standard error, and all are counted.
        progress: Whether to show a progress bar, if standard error is a terminal.
        overwrite: Whether existing files `target` and `<target>.partial` are replaced.
        config: A recipe that you trust. It replaces the recipe in the adapter's folder, and all of it is used.
        trust_remote_code: Whether to run Python code from the base model's repository.

    Returns:
        The number of answered rows.

    Raises:
        RecipeError: If there is no such adapter or no such device.
        DataError: For the first invalid row, after all rows before it are written; if the file is damaged or a column
            is missing; if `target` cannot have the rows; or if it is `source`.
        FileExistsError: If `target` or `<target>.partial` exists and `overwrite` is false.
        OSError: If a file cannot be read or written.
        KeyboardInterrupt: On Ctrl-C. Like the other errors, it says how many rows are written.

    Example:
        >>> predict("runs/ner", "sentences.jsonl", "tagged.jsonl")
        1000
    """
    rows_in, answers = open_rows(source), _AnswerWriter(None if str(target) == "-" else Path(target))
    _check_target(target)
    answers.check(source, overwrite)
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained.to(place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        raise RecipeError(f"`device`: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    with (
        rows_in.opened() as found_rows,
        answers.writing(overwrite, rows_in.schema, task),
        _bar(rows_in, progress) as bar,
    ):
        rows = _CheckedRows(found_rows, str(source), task, recipe.data.columns, skip=bad_rows == "skip")
        rows.check_columns(rows_in.schema)
        problem: DataError | None = None
        while problem is None:
            chunk: list[tuple[dict[str, Any], dict[str, Any]]] = []
            try:
                for row in islice(rows, chunk_size):
                    chunk.append(row)
            except DataError as error:  # raised below, after the rows before it are answered
                problem = error
            if not chunk:
                break
            columns: dict[str, list[Any]] = {name: [own[name] for _, own in chunk] for name in rows.names}
            found = answer_rows(task, trained, columns, batch_size or recipe.eval_batch_size, place)
            answers.write([row for row, _ in chunk], found)
            bar.update((rows_in.position if rows_in.total else answers.count) - bar.n)
        if problem is not None:
            raise problem
    if rows.skipped:
        say(f"{rows.skipped} bad rows of {source} were left out.")
    return answers.count


def _bar(rows: RowSource, progress: bool) -> Any:
    """A progress bar; without one if standard error is no terminal."""
    unit = rows.unit if rows.total else "row"
    disable = None if progress else True
    return tqdm(total=rows.total, desc="Predicting", unit=unit, unit_scale=True, leave=False, disable=disable)


def _check_target(target: str | os.PathLike[str]) -> None:
    if str(target).endswith(".gz"):
        raise DataError(f"{target}: answers are not compressed. Leave out .gz, or write to standard output (-).")


@dataclass
class _AnswerWriter:
    """Writes answered rows to a file, through `<file>.partial`, or to standard output.

    Attributes:
        target: The file; `None` for standard output.
        count: The number of rows written so far.
    """

    target: Path | None
    count: int = 0
    _answers: AnswerLines | None = None

    @property
    def partial(self) -> Path | None:
        """The file to write to until all rows are answered; `None` to write to the target itself."""
        if self.target is None or (self.target.exists() and not self.target.is_file()):
            return None  # a terminal, a pipe or a device
        final = Path(os.path.realpath(self.target))  # replace the file behind a link, not the link
        return final.with_name(final.name + PARTIAL)

    def check(self, source: str | os.PathLike[str], overwrite: bool) -> None:
        """Check that the files can be written.

        Raises:
            DataError: If one of them is the file of the rows.
            FileExistsError: If one of them exists and `overwrite` is false.
            IsADirectoryError: If the target is a folder.
        """
        for path in (self.target, self.partial):
            if path is not None:
                if str(source) != "-" and self.partial:
                    _check_not_source(source, path)
                check_new(path, overwrite)

    @contextmanager
    def writing(self, overwrite: bool, schema: Any, task: Task) -> Iterator[None]:
        """Open the file, and rename it at the end. Errors get a note of how many rows were answered."""
        partial = self.partial
        file: Any = nullcontext(_StandardOutput())
        if self.target is not None:
            place = partial or self.target
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.open("wb" if overwrite or partial is None else "xb")
        answer_type = file_type(self.target or "-")
        try:
            with file as opened:
                self._answers = open_answers(opened, answer_type, schema, task.answer_types)
                try:
                    yield
                finally:
                    self._answers.close()
            if partial is not None:
                fsync_path(partial)
                partial.replace(partial.with_name(partial.name.removesuffix(PARTIAL)))
        except (DataError, OSError, KeyboardInterrupt) as error:
            kind = OSError if isinstance(error, OSError) else type(error)
            text = str(error).rstrip(".") or "Stopped"
            raise kind(f"{text}. {self._progress(partial)}") from error
        except BaseException as error:
            error.add_note(self._progress(partial))
            raise
        finally:
            if partial is not None and partial.exists():  # not renamed: drop a line that is half written
                os.truncate(partial, self._size) if self._size else partial.unlink()

    @property
    def _size(self) -> int:
        """The size of the file with all rows that were answered; 0 if there are none, or if they are lost."""
        return self._answers.size if self._answers is not None and self.count else 0

    def _progress(self, partial: Path | None) -> str:
        where = f": the answers are in {partial}" if partial is not None and self._size else ""
        return f"{self.count} rows were answered before{where}."

    def write(self, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        """Write answered rows."""
        assert self._answers is not None
        self._answers.write(rows, answers)
        self.count += len(rows)


class _StandardOutput:
    """Standard output as a file of bytes: UTF-8, whatever the encoding of the terminal."""

    def write(self, content: bytes) -> None:
        if hasattr(sys.stdout, "buffer"):
            sys.stdout.buffer.write(content)
        else:
            sys.stdout.write(content.decode())

    def flush(self) -> None:
        sys.stdout.flush()


def _check_not_source(source: str | os.PathLike[str], target: Path) -> None:
    """Raise a DataError if the file to write is the file of the rows, under any name."""
    if os.path.exists(source) and target.exists() and os.path.samefile(source, target):
        raise DataError(f"{target} is the file of the rows, which would be lost. Choose another name.")


class _CheckedRows(Iterator[tuple[dict[str, Any], dict[str, Any]]]):
    """The rows of a file that can be answered, each as it is in the file, and with the task's column names.

    Args:
        rows: the rows of the file.
        source: the name of the file.
        task: the task.
        columns: the names of columns in the file, by the task's names.
        skip: whether a bad row is left out; otherwise it raises `DataError`.

    Attributes:
        skipped: the number of rows that were left out.
        names: the task's columns that each row has; empty before the first row.
    """

    def __init__(self, rows: Iterator[FoundRow], source: str, task: Task, columns: dict[str, str], skip: bool) -> None:
        self.rows, self.source, self.task, self.columns, self.skip = rows, source, task, columns, skip
        self.skipped = 0
        self.names: list[str] = []

    def check_columns(self, schema: Any) -> None:
        """Check that a file whose columns are known has those of the task.

        Raises:
            DataError: If one is missing.
        """
        if schema is None:
            return
        known = set(schema.names)
        ours = {*known, *(own for own, theirs in self.columns.items() if theirs in known)}
        for name, meaning in self.task.input_columns(ours).items():
            if name not in ours:
                expected = self.columns.get(name, name)
                raise DataError(
                    f"{self.source} has no column {expected!r} ({meaning}); {columns_found(sorted(known))}"
                )

    def __next__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        for found in self.rows:
            row = found.row
            own = {**row, **{ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}}
            problem = found.problem or self._problem(row, own)
            if not problem:
                return row, own
            text = f"{self.source}, {found.place}: {problem}"
            if not self.skip:
                raise DataError(text)
            self.skipped += 1
            if self.skipped <= _SHOWN_ROWS:
                tqdm.write(f"Left out: {text}", file=sys.stderr)
        raise StopIteration

    def _problem(self, row: dict[str, Any], own: dict[str, Any]) -> str | None:
        """What is wrong with a row; `None` if it can be answered."""
        needed = self.task.input_columns(own.keys())
        for name, meaning in needed.items():
            if name not in own:
                return f"{self.columns.get(name, name)!r} is missing ({meaning}); it has {sorted(row)}."
        names = [*needed, *(name for name in self.task.optional_columns if name in own and name not in needed)]
        if self.names and names != self.names:
            return f"it has the columns {names} of the task, but the first row has {self.names}."
        problem = self.task.problem(own, False) or _surrogate_problem(own, names)
        if problem is None:
            self.names = names
        return problem


def _surrogate_problem(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """Describe a text with half a surrogate pair, which tokenizers cannot read; `None` if there is none."""
    for name in names:
        try:
            json.dumps(row[name], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"{name!r} has {error.object[error.start]!a}, half of a surrogate pair."
    return None
