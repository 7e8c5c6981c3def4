"""Answers and metrics of a model on rows, on any number of processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .data import rows_of
from .distributed import DataShare
from .tasks.task import input_length

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn

    from .tasks import Task
    from .tasks.task import Columns, Row


def make_features(task: Task, rows: Dataset, with_targets: bool, num_proc: int | None = None) -> Dataset:
    """Tokenize the rows of a data set.

    Args:
        task: the task.
        rows: the checked rows.
        with_targets: whether the rows have targets, from which labels are made.
        num_proc: the number of processes; `None` for this process alone.
    """
    return rows.map(
        task.training_features,
        batched=True,
        with_indices=True,
        fn_kwargs={"with_targets": with_targets},
        remove_columns=rows.column_names,
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="Tokenizing",
    )


@torch.no_grad()
def answer_rows(
    task: Task, model: nn.Module, rows: Columns, batch_size: int, device: torch.device, progress: bool = False
) -> list[Row]:
    """Predict the answers of rows in this process.

    Args:
        task: the task.
        model: the model, in eval mode.
        rows: the columns of the rows, which must have been checked.
        batch_size: features of a forward pass.
        device: the model's device.
        progress: whether to show a progress bar.

    Returns:
        An answer for each row.

    Example:
        >>> recipe, task, model = load_trained("runs/ner")
        >>> answer_rows(task, model, {"tokens": [["A", "sentence"]]}, 8, torch.device("cpu"))
    """
    return _predict(task, model, rows, batch_size, device, with_targets=False, progress=progress)[0]


def _predict(
    task: Task,
    model: Any,
    rows: Columns,
    batch_size: int,
    device: torch.device,
    with_targets: bool,
    progress: bool = False,
    rounds: int | None = None,
) -> tuple[list[Row], float, int]:
    """Predict the answers of rows, and compute their loss if they have targets.

    Args:
        task: the task.
        model: the model, in eval mode.
        rows: the columns of the rows.
        batch_size: features of a forward pass.
        device: the model's device.
        with_targets: whether to use the rows' targets.
        progress: whether to show a progress bar.
        rounds: the number of forward passes; by default as many as there are batches.

    Returns:
        An answer for each row, the sum of the losses of all items, and the number of items.
    """
    count = len(next(iter(rows.values())))
    columns = task.features(rows, list(range(count)), with_targets)
    features = rows_of(columns)
    # Features of similar length share a batch.
    order = sorted(range(len(features)), key=lambda i: input_length(features[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    records: list[Any] = [None] * len(features)
    loss, items = 0.0, 0
    for number in tqdm(
        range(rounds or len(batches)), desc="Evaluating", disable=None if progress else True, leave=False
    ):
        # A sharded model needs all processes in every forward pass: a process that is done repeats its last batch.
        indices = batches[min(number, len(batches) - 1)]
        chosen = [features[i] for i in indices]
        batch = {key: value.to(device) for key, value in task.collate(chosen).items()}
        output = None
        if with_targets:
            mean, output = task.loss(model, batch)
            own = sum(task.num_items(each["labels"]) for each in chosen)
            if number < len(batches) and own:  # The mean of no losses is not a number.
                loss, items = loss + float(mean) * own, items + own
        batch.pop("labels", None)
        for i, record in zip(indices, task.outputs(model, batch, output), strict=True):
            records[i] = record
    grouped: list[tuple[list[Row], list[Any]]] = [([], []) for _ in range(count)]
    for feature, record in zip(features, records, strict=True):
        grouped[feature["row"]][0].append(feature)
        grouped[feature["row"]][1].append(record)
    return [task.answer(row, *own) for row, own in zip(rows_of(rows), grouped, strict=True)], loss, items


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, rows: Dataset, batch_size: int, accelerator: Accelerator
) -> tuple[dict[str, float], list[Row]]:
    """Evaluate a model on rows with targets; each process computes its share of the rows.

    Args:
        task: the task.
        model: the model, with or without Accelerate's wrapper; its train or eval mode is restored.
        rows: the rows, which must have been checked.
        batch_size: features of a forward pass of one process.
        accelerator: the accelerator.

    Returns:
        The metrics, `loss` among them, and an answer for each row; the same in every process.
    """
    model = accelerator.unwrap_model(model)
    index, parts = DataShare.of(accelerator)
    size = -(-len(rows) // parts)
    start = index * size
    has_rows = start < len(rows)
    if not has_rows:  # This process computes the last row again: a sharded model needs all processes.
        start = len(rows) - 1
    mine = rows.select(range(start, min(start + size, len(rows))))[:]
    rounds = None
    if parts > 1:
        count = len(task.features(mine, list(range(len(next(iter(mine.values()))))), True)["row"])
        rounds = max(gather_object([-(-count // batch_size)]))
    progress = accelerator.is_main_process
    predict = partial(_predict, task, model, mine, batch_size, accelerator.device, progress=progress, rounds=rounds)
    training = model.training
    model.eval()
    try:
        answers, loss, items = predict(with_targets=True)
        if not task.answers_with_labels:
            answers, _, _ = predict(with_targets=False)
    finally:
        model.train(training)
    if not has_rows:
        answers, loss, items = [], 0.0, 0
    sums = [(loss, items)]
    if parts > 1:
        answers, sums = gather_object(answers), gather_object(sums)
    total = sum(each[1] for each in sums)
    loss = sum(each[0] for each in sums) / max(total, 1)
    targets = rows[task.target_column(rows.column_names)]
    return {"loss": loss, **task.loss_metrics(loss), **task.metrics(answers, targets)}, answers
