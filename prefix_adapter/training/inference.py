"""What a trained adapter is for: measuring it, and answering rows that stream past."""

from __future__ import annotations

import dataclasses
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
from peft import PeftConfig, PeftModel

from . import checkpoint, outputs
from .data import DataError, divide, load_rows
from .evaluation import answer_rows, evaluate
from .loop import accelerating
from .model import load_base, load_tokenizer
from .recipe import NO_ADAPTER, Recipe, RecipeError, load_adapter_recipe, load_recipe
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .tasks import Task

_SPLITS = ("test", "validation", "train")


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
    base, _ = load_base(recipe, task)
    if recipe.adapter["peft_type"] in NO_ADAPTER:
        checkpoint.load_weights(base, folder)
        return recipe, task, base.eval()
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
        config: a recipe that you trust, in place of the one in the adapter's folder; all of it is used.
        trust_remote_code: run the Python code that the base model's repository contains.

    Returns:
        The metrics, which also say what they were measured on.

    Raises:
        RecipeError: if there is no such adapter.
        DataError: if there is something wrong with the rows.
        OSError: if the answers cannot be written.
    """
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    if (data is None or data in _SPLITS) and config is None and not os.path.isdir(adapter):
        raise RecipeError(
            f"{adapter}: which rows to read is not taken from an adapter on the Hub. Give a file of rows, or a recipe "
            "that you trust (--config, in Python `config=`)."
        )
    if data is None:
        data = "test" if recipe.data.test else "validation"
    if data in _SPLITS:
        split, source, rows = data, *_rows_of_run(recipe, data)
    else:
        split, source = None, data
        rows = load_rows(dataclasses.replace(recipe.data, path=None, test=data), "test")
    task.check(rows, source)
    recipe.report_to = []
    with accelerating(recipe) as accelerator:
        trained.to(accelerator.device)
        found, answers = evaluate(task, trained, rows, batch_size or recipe.eval_batch_size, accelerator)
        if predictions is not None and accelerator.is_main_process:
            with _writing(predictions) as out:
                for row, answer in zip(rows, answers, strict=True):
                    out.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
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
    config: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
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
        config: a recipe that you trust, in place of the one in the adapter's folder; all of it is used.
        trust_remote_code: run the Python code that the base model's repository contains.

    Returns:
        The number of rows.

    Raises:
        RecipeError: if there is no such adapter, or no such device.
        DataError: for the first row that cannot be answered.
        OSError: if a file cannot be read or written.
    """
    if str(source) != "-" and not os.path.isfile(source):
        raise DataError(f"There is no file {str(source)!r}.")
    recipe, task, trained = load_trained(adapter, model, revision, config=config, trust_remote_code=trust_remote_code)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trained.to(place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise RecipeError(f"`device`: nothing can be computed on {device!r}: {str(error).splitlines()[0]}") from error
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
