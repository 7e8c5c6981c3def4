"""What a trained adapter is for: measuring it, and answering rows that stream past."""

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
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel

from ..training import checkpoint, outputs
from .data import DataError, divide, load_rows
from .evaluation import answer_rows, evaluate
from .files import atomic_write, check_new, fsync_path
from .loop import training_accelerator
from .model import load_base, load_tokenizer, wrap
from .recipe import NO_ADAPTER, Recipe, RecipeError, load_adapter_recipe, load_recipe
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .tasks import Task

_SPLITS = ("test", "validation", "train")
PARTIAL = ".partial"
"""What is added to the name of a file of answers until all rows are answered."""


def load_trained(
    adapter: str | os.PathLike[str],
    model: str | None = None,
    revision: str | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Recipe, Task, nn.Module]:
    """Load what `train` left.

    Only harmless settings are taken from the recipe in the adapter's folder: see `recipe.load_adapter_recipe`.

    Args:
        adapter: the folder, or the adapter's name on the Hub.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.
        config: a recipe that you trust, in place of the one in the adapter's folder; all of it is used.
        trust_remote_code: run the Python code that the base model's repository contains.

    Returns:
        Its recipe, its task with labels, and the model in eval mode, on the CPU.

    Raises:
        RecipeError: if there is no adapter, or none that `train` left, or its recipe sets what only you may set.
    """
    folder = Path(adapter)
    if config is not None:
        overrides: dict[str, Any] = {"trust_remote_code": trust_remote_code, **({"model": model} if model else {})}
        recipe = load_recipe(config, **overrides)
    else:
        if folder.is_dir():
            path = folder / outputs.RECIPE
            if not path.is_file():
                raise RecipeError(
                    f"{folder} has no {outputs.RECIPE}: `prefix-adapter train` did not leave this adapter."
                )
        else:
            try:
                path = Path(hf_hub_download(str(adapter), outputs.RECIPE, revision=revision))
            except (OSError, ValueError) as error:
                raise RecipeError(f"There is no folder {str(adapter)!r}, and on the Hub: {error}") from error
        recipe = load_adapter_recipe(path, model=model, rows=folder.is_dir(), trust_remote_code=trust_remote_code)
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    base, new = load_base(recipe, task)
    if recipe.adapter["peft_type"] in NO_ADAPTER:
        whole = wrap(recipe, task, base, new)
        checkpoint.load_weights(whole, folder)
        return recipe, task, whole.eval()
    try:
        if getattr(PeftConfig.from_pretrained(str(adapter), revision=revision), "megatron_config", None):
            raise ValueError("`megatron_core` in its configuration would import a module of the author's choice.")
        wrapped = PeftModel.from_pretrained(base, str(adapter), revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{adapter}: there is no finished adapter to load: {error}") from error
    return recipe, task, wrapped.eval()


class Metrics(dict[str, float]):
    """Metrics by name, and which rows they were measured on.

    Attributes:
        split: test, validation or train, for rows of the run; `None` for another file.
        source: the file of the rows, or the data set and its split.
        rows: the number of rows.
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
    """Measure a trained adapter on rows with solutions; run by `accelerate launch`, the processes share the work.

    Args:
        adapter: the folder that `train` left, or the adapter's name on the Hub.
        data: a file, of which all rows are used; or `test`, `validation` or `train` for the rows that the run used as
            such, also those that it held out or drew. By default the run's test rows, or if it had none its
            validation rows.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.
        batch_size: features of a forward pass; the recipe's by default.
        predictions: a JSONL file for the rows with their answers.
        overwrite: whether a file at `predictions` may be replaced.
        config: a recipe that you trust, in place of the one in the adapter's folder; all of it is used.
        trust_remote_code: run the Python code that the base model's repository contains.

    Returns:
        The metrics, which also say what they were measured on.

    Raises:
        RecipeError: if there is no such adapter.
        DataError: if there is something wrong with the rows, or `predictions` is the file of the rows.
        OSError: if the answers cannot be written.
    """
    if predictions is not None:
        if data is not None and data not in _SPLITS:
            _check_apart(data, Path(predictions))
        check_new(Path(predictions), overwrite)
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    if (data is None or data in _SPLITS) and config is None and not os.path.isdir(adapter):
        raise RecipeError(
            f"{adapter}: which rows to read is not taken from an adapter on the Hub. Give a file of rows, or a recipe "
            "that you trust (--config, in Python `config=`)."
        )
    if data is None:
        data = "test" if recipe.data.test else "validation"
    if data in _SPLITS:
        if predictions is not None and recipe.data.path is None:
            for file in filter(None, (recipe.data.train, recipe.data.validation, recipe.data.test)):
                _check_apart(file, Path(predictions))
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
                    out.write(_line({**row, **answer}))
    metrics = Metrics(found)
    metrics.split, metrics.source, metrics.rows = split, source, len(rows)
    return metrics


def _rows_of_run(recipe: Recipe, split: str) -> tuple[str, Dataset]:
    """The rows that a run used as its test, validation or training rows, and what they are called."""
    data = recipe.data
    if split == "test" and data.test is None:
        raise RecipeError("`data.test`: the run had no test rows; give a file, or `validation`.")
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
    """Answer the rows of a JSONL file, however many there are: `chunk_size` of them are in memory at a time.

    The answers are written as they come, into `<target>.partial`, which gets the name `target` when all rows are
    answered. After an error it stays as it is, with the answers to all rows before the one that the error names.

    Args:
        adapter: the folder that `train` left, or the adapter's name on the Hub.
        source: a file with a JSON object in each line, or `-` for standard input.
        target: a file for the same lines with `prediction` and more added, or `-` for standard output.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.
        batch_size: features of a forward pass; the recipe's by default.
        chunk_size: rows that are read, answered and written together; those of similar length share a batch.
        device: where to compute; a GPU if there is one.
        overwrite: whether files at `target` and `<target>.partial` may be replaced.
        config: a recipe that you trust, in place of the one in the adapter's folder; all of it is used.
        trust_remote_code: run the Python code that the base model's repository contains.

    Returns:
        The number of rows.

    Raises:
        RecipeError: if there is no such adapter, or no such device.
        DataError: for the first row that cannot be answered, or if `target` is `source`; all rows before it are
            answered.
        FileExistsError: if `target` or `<target>.partial` exists.
        OSError: if a file cannot be read or written.
        KeyboardInterrupt: on a Ctrl-C; as for the others, the message says how many rows were answered.
    """
    if str(source) != "-" and (not os.path.exists(source) or os.path.isdir(source)):
        raise DataError(f"There is no file {str(source)!r}.")
    answers = _Answers(None if str(target) == "-" else Path(target))
    answers.check(source, overwrite)
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained.to(place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise RecipeError(f"`device`: nothing can be computed on {device!r}: {str(error).splitlines()[0]}") from error
    with answers.writing(overwrite), _reading(source) as lines:
        rows = _rows(lines, str(source), task, recipe.data.columns)
        problem: DataError | None = None
        while problem is None:
            chunk: list[tuple[dict[str, Any], dict[str, Any]]] = []
            try:
                for row in islice(rows, chunk_size):
                    chunk.append(row)
            except DataError as error:  # the rows before it are answered first
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
class _Answers:
    """The file that answers are written to as they come, or standard output.

    Attributes:
        target: the file; `None` for standard output.
        count: how many rows are answered.
    """

    target: Path | None
    count: int = 0
    _size: int = 0
    _file: BinaryIO | None = None

    @property
    def partial(self) -> Path | None:
        """Where the answers are until all rows are answered; `None` if they go straight to where they belong."""
        if self.target is None or (self.target.exists() and not self.target.is_file()):
            return None  # a terminal, a pipe or a device
        final = Path(os.path.realpath(self.target))  # a link stays one
        return final.with_name(final.name + PARTIAL)

    def check(self, source: str | os.PathLike[str], overwrite: bool) -> None:
        """See whether the answers to a file may be written.

        Raises:
            DataError: if they would take the place of the rows.
            FileExistsError: if there is a file that may not be replaced.
            IsADirectoryError: if the target is a folder.
        """
        for path in (self.target, self.partial):
            if path is not None:
                if str(source) != "-" and self.partial:
                    _check_apart(source, path)
                check_new(path, overwrite)

    @contextmanager
    def writing(self, overwrite: bool) -> Iterator[None]:
        """Open the file, and give it its name at the end. An error says how many rows were answered."""
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
            raise kind(f"{text}. {self._what_there_is(partial)}") from error
        except BaseException as error:
            error.add_note(self._what_there_is(partial))
            raise
        finally:
            if partial is not None and partial.exists():  # the rows are not all answered
                os.truncate(partial, self._size) if self.count else partial.unlink()

    def _what_there_is(self, partial: Path | None) -> str:
        where = f": the answers are in {partial}" if partial is not None and self.count else ""
        return f"{self.count} rows were answered before{where}."

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write some answered rows."""
        lines = b"".join(map(_line, rows))
        if self._file is not None:
            self._file.write(lines)
            self._file.flush()
        elif hasattr(sys.stdout, "buffer"):  # whatever encoding the terminal has
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()
        else:
            sys.stdout.write(lines.decode())
        self.count, self._size = self.count + len(rows), self._size + len(lines)


def _check_apart(source: str | os.PathLike[str], target: Path) -> None:
    """See that a file to be written is not the file that is read, by whatever names.

    Raises:
        DataError: if it is.
    """
    if os.path.exists(source) and target.exists() and os.path.samefile(source, target):
        raise DataError(f"{target} is the file of the rows: the answers would take its place. Choose another name.")


def _line(row: dict[str, Any]) -> bytes:
    """A line of JSON in UTF-8. What UTF-8 does not have, one half of a pair of surrogates, is written as an escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _rows(
    lines: Iterable[str | bytes], source: str, task: Task, columns: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row as it is in the file, and under the task's names for its columns."""
    optional: set[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}, line {number}: no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: a JSON object was expected, got {row!r:.80}.")
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
                f"{source}, line {number}: it has {sorted(given)}, and the first row has {sorted(optional)}."
            )
        problem = task.problem(own, False) or _not_unicode(own, [*task.columns, *given])
        if problem:
            raise DataError(f"{source}, line {number}: {problem}")
        yield row, own


def _not_unicode(row: dict[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        try:
            json.dumps(row[name], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"{name!r} has {error.object[error.start]!a}, one half of a character."
    return None


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Iterable[str | bytes]]:
    if str(path) == "-":
        yield getattr(sys.stdin, "buffer", sys.stdin)
    else:
        with open(path, "rb") as file:
            yield file
