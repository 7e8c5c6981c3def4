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
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from peft import PeftConfig, PeftModel

from ..files.source import AdapterSource
from . import checkpoint, outputs
from .adapter_recipe import load_adapter_recipe
from .data import DataError, divide, load_rows
from .evaluation import answer_rows, evaluate
from .files import atomic_write, check_new, fsync_path
from .loop import training_accelerator
from .model import load_base, load_tokenizer, wrap
from .recipe import NO_ADAPTER, Recipe, RecipeError, load_recipe
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .tasks import Task

_SPLITS = ("test", "validation", "train")
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
    if recipe.adapter["peft_type"] in NO_ADAPTER:
        whole = wrap(recipe, task, base, new)
        checkpoint.load_weights(whole, Path(adapter))
        return recipe, task, whole.eval()
    try:
        if getattr(PeftConfig.from_pretrained(str(adapter), revision=revision), "megatron_config", None):
            raise ValueError("`megatron_core` in its configuration names a module to import, which is not allowed.")
        wrapped = PeftModel.from_pretrained(base, str(adapter), revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{adapter}: there is no finished adapter to load: {error}") from error
    return recipe, task, wrapped.eval()


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
        predictions: A JSONL file to write the rows with their predictions to.
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
            for file in filter(None, (recipe.data.train, recipe.data.validation, recipe.data.test)):
                _check_not_source(file, Path(predictions))
        split, source, rows = data, *_rows_of_run(recipe, data)
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
            with atomic_write(target) as scratch, scratch.open("wb") as out:
                for row, answer in zip(rows, answers, strict=True):
                    out.write(_json_line({**row, **answer}))
    metrics = Metrics(found)
    metrics.split, metrics.source, metrics.rows = split, source, len(rows)
    return metrics


def _rows_of_run(recipe: Recipe, split: str) -> tuple[str, Dataset]:
    """The name and the rows of a split, as a run used it."""
    data = recipe.data
    if split == "test" and data.test is None:
        raise RecipeError("`data.test`: the run had no test rows. Name a file, or evaluate on `validation`.")
    read = "train" if split == "validation" and data.validation is None else split
    name = getattr(data, read)
    source = name if data.path is None else f"{data.path}, split {name}"
    if data.validation is None and split != "test":
        part = "held out of" if split == "validation" else "not held out of"
        source = f"{part} {source}"
    return source, divide({read: load_rows(data, read)}, data, recipe.seed)[split]


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
    overwrite: bool = False,
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Predict the rows of a JSONL file of any size, `chunk_size` rows at a time.

    The rows with their predictions are written to `<target>.partial`, which is renamed to `target` when all rows are
    done. After an error the `.partial` file has the predictions for all rows before the row that the error names.

    Args:
        adapter: The folder that `train` wrote, or the name of the adapter on the Hub.
        source: A file with one JSON object per line, or `-` for standard input.
        target: A file for the same rows with `prediction` (and, for some tasks, more) added, or `-` for standard
            output.
        model: The base model, a folder or a name on the Hub; by default that of the recipe.
        revision: The revision of the adapter on the Hub.
        batch_size: Features per forward pass; by default the recipe's `eval_batch_size`.
        chunk_size: Number of rows that are read and predicted together. Those of similar length share a batch.
        device: The device to compute on; by default a GPU if there is one.
        overwrite: Whether existing files `target` and `<target>.partial` are replaced.
        config: A recipe that you trust. It replaces the recipe in the adapter's folder, and all of it is used.
        trust_remote_code: Whether to run Python code from the base model's repository.

    Returns:
        The number of rows.

    Raises:
        RecipeError: If there is no such adapter or no such device.
        DataError: For the first invalid row, after all rows before it are written; or if `target` is `source`.
        FileExistsError: If `target` or `<target>.partial` exists and `overwrite` is false.
        OSError: If a file cannot be read or written.
        KeyboardInterrupt: On Ctrl-C. Like the other errors, it says how many rows are written.

    Example:
        >>> predict("runs/ner", "sentences.jsonl", "tagged.jsonl")
        1000
    """
    if str(source) != "-" and (not os.path.exists(source) or os.path.isdir(source)):
        raise DataError(f"There is no file {str(source)!r}.")
    answers = _AnswerWriter(None if str(target) == "-" else Path(target))
    answers.check(source, overwrite)
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained.to(place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        raise RecipeError(f"`device`: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    with answers.writing(overwrite), _open_source(source) as lines:
        rows = _parse_rows(lines, str(source), task, recipe.data.columns)
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
            names = [name for name in (*task.columns, *task.optional_columns) if name in chunk[0][1]]
            columns: dict[str, list[Any]] = {name: [own[name] for _, own in chunk] for name in names}
            found = answer_rows(task, trained, columns, batch_size or recipe.eval_batch_size, place)
            answers.write([{**row, **answer} for (row, _), answer in zip(chunk, found, strict=True)])
        if problem is not None:
            raise problem
    return answers.count


@dataclass
class _AnswerWriter:
    """Writes answered rows to a file, through `<file>.partial`, or to standard output.

    Attributes:
        target: The file; `None` for standard output.
        count: The number of rows written so far.
    """

    target: Path | None
    count: int = 0
    _size: int = 0
    _file: BinaryIO | None = None

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
    def writing(self, overwrite: bool) -> Iterator[None]:
        """Open the file, and rename it at the end. Errors get a note of how many rows were answered."""
        partial = self.partial
        if self.target is not None:
            place = partial or self.target
            place.parent.mkdir(parents=True, exist_ok=True)
            self._file = place.open("wb" if overwrite or partial is None else "xb")
        try:
            with self._file or nullcontext():
                yield
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
                os.truncate(partial, self._size) if self.count else partial.unlink()

    def _progress(self, partial: Path | None) -> str:
        where = f": the answers are in {partial}" if partial is not None and self.count else ""
        return f"{self.count} rows were answered before{where}."

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write answered rows."""
        lines = b"".join(map(_json_line, rows))
        if self._file is not None:
            self._file.write(lines)
            self._file.flush()
        elif hasattr(sys.stdout, "buffer"):  # UTF-8, whatever the encoding of the terminal
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()
        else:
            sys.stdout.write(lines.decode())
        self.count, self._size = self.count + len(rows), self._size + len(lines)


def _check_not_source(source: str | os.PathLike[str], target: Path) -> None:
    """Raise a DataError if the file to write is the file of the rows, under any name."""
    if os.path.exists(source) and target.exists() and os.path.samefile(source, target):
        raise DataError(f"{target} is the file of the rows, which would be lost. Choose another name.")


def _json_line(row: dict[str, Any]) -> bytes:
    """A line of JSON in UTF-8. Half a surrogate pair has no UTF-8 form and is written as an escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _parse_rows(
    lines: Iterable[str | bytes], source: str, task: Task, columns: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each row as it is in the file, and with the task's column names.

    Raises:
        DataError: For the first line that is not a valid row.
    """
    optional: set[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}, line {number}: invalid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: expected a JSON object, got {row!r:.80}.")
        own = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
        for name, meaning in task.columns.items():
            if name not in own:
                expected = columns.get(name, name)
                raise DataError(f"{source}, line {number}: {expected!r} is missing ({meaning}); it has {sorted(row)}.")
        given = {name for name in task.optional_columns if name in own}
        if optional is None:
            optional = given
        if given != optional:
            raise DataError(
                f"{source}, line {number}: it has the optional columns {sorted(given)}, but the first row has "
                f"{sorted(optional)}."
            )
        problem = task.problem(own, False) or _surrogate_problem(own, [*task.columns, *given])
        if problem:
            raise DataError(f"{source}, line {number}: {problem}")
        yield row, own


def _surrogate_problem(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """Describe a text with half a surrogate pair, which tokenizers cannot read; `None` if there is none."""
    for name in names:
        try:
            json.dumps(row[name], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"{name!r} has {error.object[error.start]!a}, half of a surrogate pair."
    return None


@contextmanager
def _open_source(path: str | os.PathLike[str]) -> Iterator[Iterable[str | bytes]]:
    if str(path) == "-":
        yield getattr(sys.stdin, "buffer", sys.stdin)
    else:
        with open(path, "rb") as file:
            yield file
