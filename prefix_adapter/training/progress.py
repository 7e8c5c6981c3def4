"""What a user sees of a run: a summary at the start, a bar with loss and rates, a line for each evaluation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..messages import shorten
from .model import learning_rates, unusual_rate
from .streams import RowStream

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from .objective import TaskObjective

_MAX_LABELS = 20


class Progress:
    """The progress of a training loop, on standard error.

    On a terminal there is a bar with the training loss and the learning rates. Redirected output gets no bar. A line
    for each evaluation is written in both cases.

    Args:
        steps: all steps of the run.
        step: the steps that are done.
        shown: whether anything is written.
    """

    def __init__(self, steps: int, step: int, shown: bool) -> None:
        self.steps, self.shown = steps, shown
        # `None`: no bar unless it is a terminal.
        self._bar = tqdm(total=steps, initial=step, desc="Training", disable=None if shown else True)
        self._loss: float | None = None

    def show_step(self) -> None:
        """Note that a step is done."""
        self._bar.update()

    def show_loss(self, loss: float, rates: dict[str, float]) -> None:
        """Show the mean loss of the last steps, and the learning rates by name."""
        self._loss = loss
        self._bar.set_postfix({"loss": f"{loss:.4g}", **{name: f"{rate:.2e}" for name, rate in rates.items()}})

    def show_evaluation(self, step: int, metrics: dict[str, Any], metric: str, is_best: bool) -> None:
        """Write a line about an evaluation.

        Args:
            step: the step.
            metrics: the metrics of the validation rows.
            metric: the one that chooses the best step.
            is_best: whether this step is the best so far.
        """
        if not self.shown:
            return
        order = sorted(metrics, key=lambda name: name != metric)
        values = ", ".join(f"{name} {metrics[name]:.4f}" for name in order if isinstance(metrics[name], float))
        loss = "" if self._loss is None else f"training loss {self._loss:.4f}; "
        line = f"step {step:,} of {self.steps:,}: {loss}validation {values}{' (best so far)' if is_best else ''}"
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def describe_task(objective: TaskObjective, model: Any, trained: int) -> str:
    """A summary of a task: rows, lengths, labels, trained parameters, learning rates.

    Args:
        objective: the objective of the task.
        model: its model, before Accelerate shards it.
        trained: the number of its trained parameters.
    """
    recipe, task = objective.recipe, objective.task
    total = model.num_parameters()  # of transformers: it counts weights in 4 bits, of which two share a number
    rate, head_rate, *second_rate = learning_rates(recipe, model)
    methods = " and ".join(each["peft_type"] for each in (recipe.adapter, recipe.second_adapter) if each)
    rates = [f"{rate:g}", *([f"of the head {head_rate:g}"] if task.has_head else ())]
    rates += [f"of the second adapter {each:g}" for each in second_rate]
    lines = [
        f"{recipe.task} with {recipe.model}",
        f"  rows: {', '.join(f'{_count(rows)} {split}' for split, rows in objective.rows.items())}",
        _describe_lengths(objective),
        f"  labels: {_join_labels(task.labels)}" if task.labels else "",
        f"  trained: {trained:,} of {total:,} parameters ({methods})",
        f"  learning rate: {', '.join(rates)}",
        f"  Warning: {unusual}" if (unusual := unusual_rate(recipe, model)) else "",
    ]
    return "\n".join(filter(None, lines))


def _describe_lengths(objective: TaskObjective) -> str:
    """The longest training input, and how many reach the maximum; nothing for a stream, which is not read yet."""
    if isinstance(objective.rows["train"], RowStream):
        return ""
    longest, most = max(objective.lengths), objective.task.max_length
    full = sum(length >= most for length in objective.lengths)
    cut = f"; {full:,} of {len(objective.lengths):,} reach max_length, where longer rows are cut or divided"
    return f"  longest input: {longest:,} of at most {most:,} tokens{cut if full else ''}"


def describe_failure(objective: TaskObjective, results: dict[str, Any]) -> str | None:
    """A warning that a model has learned nothing of its task; `None` if it has, or if nothing was trained.

    Then its score on the validation rows is within two standard errors of that of the same answer for every row. The
    best of several evaluations is a little above it by chance.

    Args:
        objective: the objective of the task.
        results: the results of the task.
    """
    recipe, metric = objective.recipe, objective.task.default_metric
    if metric not in results["constant_answer"] or not results["steps"] or recipe.adapter["peft_type"] == "NONE":
        return None
    score, constant = results["validation"][metric], results["constant_answer"][metric]
    if score > constant + 2 * (constant * (1 - constant) / results["rows"]["validation"]) ** 0.5:
        return None
    return (
        f"Warning: {recipe.task} with {recipe.model} was hardly learned: the validation {metric} is {score:.4f}, and "
        f"{constant:.4f} with the same answer for every row. Try a `learning_rate` three times as low or as high as "
        f"{results['learning_rates'][0]:g}, or more epochs (docs/troubleshooting.md)."
    )


def describe_steps(steps: int, batch_size: int, eval_steps: int, accelerator: Accelerator) -> str:
    """A summary of a training loop: its steps, the rows of a step, the steps between evaluations, and its device."""
    processes = f"{accelerator.num_processes} processes, " if accelerator.num_processes > 1 else ""
    return (
        f"  steps: {steps:,} of {batch_size} rows, with an evaluation every {eval_steps:,}\n"
        f"  device: {processes}{accelerator.device.type}, mixed precision: {accelerator.mixed_precision}"
    )


def describe_features(objective: TaskObjective, count: int = 2) -> str:
    """The first training rows of a task as the model reads them: tokens, and labels by token or row."""
    tokenizer = objective.task.tokenizer
    lines = []
    for feature in objective.features.select(range(min(count, len(objective.features)))):
        ids = feature["input_ids"]
        # Multiple choice has a text for each choice.
        texts = [tokenizer.decode(each) for each in (ids if ids and isinstance(ids[0], list) else [ids])]
        lines += [*(f"  text: {text}" for text in texts), f"  labels: {feature['labels']}"]
    return "\n".join([f"{objective.recipe.task}, the first {count} encoded rows:", *lines])


def _count(rows: Dataset | RowStream) -> str:
    return "streamed" if isinstance(rows, RowStream) else f"{len(rows):,}"


def _join_labels(labels: list[Any]) -> str:
    more = f" and {len(labels) - _MAX_LABELS:,} more" if len(labels) > _MAX_LABELS else ""
    return ", ".join(shorten(str(label), 40) for label in labels[:_MAX_LABELS]) + more
