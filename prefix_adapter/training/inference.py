"""What a trained adapter is for: measuring it, and answering rows that stream past."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel

from . import checkpoint, outputs
from .data import DataError, load_rows
from .evaluation import answer_rows, evaluate
from .loop import accelerating
from .model import load_base, load_tokenizer
from .recipe import NO_ADAPTER, Recipe, RecipeError, load_recipe
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from torch import nn

    from .tasks import Task

_SPLITS = ("test", "validation", "train")


def load_trained(
    adapter: str | os.PathLike[str], model: str | None = None, revision: str | None = None
) -> tuple[Recipe, Task, nn.Module]:
    """Load what `train` left.

    Args:
        adapter: the folder, or the adapter's name on the Hub.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.

    Returns:
        Its recipe, its task with labels, and the model in eval mode, on the CPU.

    Raises:
        RecipeError: if there is no adapter, or none that `train` left.
    """
    folder = Path(adapter)
    if folder.is_dir():
        path = folder / outputs.RECIPE
        if not path.is_file():
            raise RecipeError(f"{folder} has no {outputs.RECIPE}: `prefix-adapter train` did not leave this adapter.")
    else:
        try:
            path = Path(hf_hub_download(str(adapter), outputs.RECIPE, revision=revision))
        except (OSError, ValueError) as error:
            raise RecipeError(f"There is no folder {str(adapter)!r}, and on the Hub: {error}") from error
    recipe = load_recipe(path, **({"model": model} if model else {}))
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    base, _ = load_base(recipe, task)
    if recipe.adapter["peft_type"] in NO_ADAPTER:
        checkpoint.load_weights(base, folder)
        return recipe, task, base.eval()
    try:
        wrapped = PeftModel.from_pretrained(base, str(adapter), revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{adapter}: there is no finished adapter to load: {error}") from error
    return recipe, task, wrapped.eval()


def evaluate_adapter(
    adapter: str | os.PathLike[str],
    data: str | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    batch_size: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Measure a trained adapter on rows with solutions; run by `accelerate launch`, the processes share the work.

    Args:
        adapter: the folder that `train` left, or the adapter's name on the Hub.
        data: a file, or `test`, `validation` or `train` for the recipe's own rows; by default the recipe's test rows
            or, if it has none, its validation rows.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.
        batch_size: features of a forward pass; the recipe's by default.
        predictions: a JSONL file for the rows with their answers.

    Returns:
        The metrics.

    Raises:
        RecipeError: if there is no such adapter.
        DataError: if there is something wrong with the rows.
        OSError: if the answers cannot be written.
    """
    recipe, task, trained = load_trained(adapter, model, revision)
    if data is None:
        data = next((split for split in _SPLITS[:2] if getattr(recipe.data, split)), None)
        if data is None:
            raise RecipeError("The recipe has neither test nor validation rows of its own: give a file of rows.")
    if data in _SPLITS:
        if getattr(recipe.data, data) is None:
            raise RecipeError(f"`data.{data}`: the recipe has no such rows; give a file.")
        split, source = data, getattr(recipe.data, data)
    else:
        recipe.data.path, recipe.data.test = None, data
        split, source = "test", data
    rows = load_rows(recipe.data, split)
    task.check(rows, source)
    recipe.report_to = []
    with accelerating(recipe) as accelerator:
        trained.to(accelerator.device)
        metrics, answers = evaluate(task, trained, rows, batch_size or recipe.eval_batch_size, accelerator)
        if predictions is not None and accelerator.is_main_process:
            with _writing(predictions) as out:
                for row, answer in zip(rows, answers, strict=True):
                    out.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
    return metrics


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
) -> int:
    """Answer the rows of a JSONL file, however many there are: `chunk_size` of them are in memory at a time.

    Args:
        adapter: the folder that `train` left, or the adapter's name on the Hub.
        source: a file with a JSON object in each line, or `-` for standard input.
        target: a file for the same lines with `prediction` and more added, or `-` for standard output. A file appears
            when all rows are answered.
        model: the base model, if it is not where the recipe says.
        revision: the adapter's revision on the Hub.
        batch_size: features of a forward pass; the recipe's by default.
        chunk_size: rows that are read, answered and written together; those of similar length share a batch.
        device: where to compute; a GPU if there is one.

    Returns:
        The number of rows.

    Raises:
        RecipeError: if there is no such adapter.
        DataError: for the first row that cannot be answered.
        OSError: if a file cannot be read or written.
    """
    if str(source) != "-" and not os.path.isfile(source):
        raise DataError(f"There is no file {str(source)!r}.")
    recipe, task, trained = load_trained(adapter, model, revision)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trained.to(place)
    count = 0
    with _reading(source) as lines, _writing(target) as out:
        rows = _rows(lines, str(source), task, recipe.data.columns)
        while chunk := list(itertools.islice(rows, chunk_size)):
            names = [name for name in (*task.columns, *task.optional_columns) if name in chunk[0][1]]
            columns: dict[str, list[Any]] = {name: [own[name] for _, own in chunk] for name in names}
            answers = answer_rows(task, trained, columns, batch_size or recipe.eval_batch_size, place)
            for (row, _), answer in zip(chunk, answers, strict=True):
                out.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
            out.flush()
            count += len(chunk)
    return count


def _rows(
    lines: Iterable[str], source: str, task: Task, columns: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row as it is in the file, and under the task's names for its columns."""
    optional: set[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {number}: no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: a JSON object was expected, got {line.strip()[:80]!r}.")
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
        problem = task.problem(own, False)
        if problem:
            raise DataError(f"{source}, line {number}: {problem}")
        yield row, own


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Iterable[str]]:
    if str(path) == "-":
        yield sys.stdin
    else:
        with open(path, encoding="utf-8") as file:
            yield file


@contextmanager
def _writing(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Standard output, or a file that gets its name when all is in it."""
    if str(path) == "-":
        yield sys.stdout
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with outputs.replacing(target) as scratch, scratch.open("w", encoding="utf-8") as file:
        yield file
