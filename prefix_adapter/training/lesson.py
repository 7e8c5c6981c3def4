"""What a training loop learns: a task, with its features in batches and the rows to measure it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .batches import Batches
from .data import DataError, rows_of
from .distributed import prepare
from .evaluation import evaluate, is_better, make_features
from .recipe import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import Tensor

    from .recipe import Recipe
    from .tasks import Task


class Lesson:
    """A task to learn.

    `batches` are lists of features by number; `items` says of how many items each feature's loss is the mean.

    Args:
        recipe: the recipe.
        task: its task, with labels.
        train_rows: rows to learn from, checked.
        validation_rows: rows to choose the best checkpoint by, checked.
        accelerator: the accelerator.

    Raises:
        DataError: if there is nothing to learn from.
    """

    command = "train"
    """The command that goes on with it."""

    def __init__(
        self, recipe: Recipe, task: Task, train_rows: Dataset, validation_rows: Dataset, accelerator: Accelerator
    ) -> None:
        self.recipe, self.task, self.accelerator = recipe, task, accelerator
        self.validation_rows = validation_rows
        features = make_features(task, train_rows, True, recipe.data.num_proc)
        task.check_tokens(features, recipe.data.train)
        items = [task.num_items(labels) for labels in features["labels"]]
        if not all(items):  # a completion that did not fit in, for instance: the mean of no losses is not a number
            kept = [i for i, count in enumerate(items) if count]
            accelerator.print(f"{len(items) - len(kept)} features have nothing to learn from and are left out.")
            features, items = features.select(kept), [items[i] for i in kept]
        if not items:
            raise DataError("No training row has anything to learn from: `max_length` may be too small.")
        self.features, self.items = features, items
        lengths = [len(ids) for ids in features["input_ids"]] if recipe.group_by_length else None
        self.batches = Batches(len(items), recipe.batch_size, recipe.seed, lengths)
        self.metric = recipe.metric_for_best_model or task.default_metric

    def prepare(self, model: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """The model and its optimizer as Accelerate has prepared them, and the optimizer that PyTorch knows.

        Raises:
            RecipeError: see `distributed.prepare`.
        """
        return prepare(self.accelerator, model, self.recipe)

    def try_out(self, model: Any) -> None:
        """Meet now what would else end the run in its middle.

        Args:
            model: the model, not wrapped by Accelerate; it is left in eval mode.

        Raises:
            RecipeError: if the longest row is too long for the model, or there is no such metric.
        """
        lengths = [len(ids) for ids in self.features["input_ids"]]
        try:
            with torch.no_grad():
                self.loss(model.eval(), [lengths.index(max(lengths))])
        except (ValueError, IndexError, RuntimeError) as error:
            raise RecipeError(f"`max_length`: the model cannot take the longest row: {error}") from error
        if self.recipe.metric_for_best_model:
            few = self.validation_rows.select(range(min(2, len(self.validation_rows))))
            known = self.measure(model, few)
            if self.metric not in known:
                raise RecipeError(f"`metric_for_best_model`: there is no {self.metric!r}; there are {sorted(known)}.")

    def loss(self, model: Any, features: list[int]) -> Tensor:
        """The model's mean loss on some features."""
        batch = self.task.collate(rows_of(self.features[features]))
        return self.task.loss(model, {key: value.to(self.accelerator.device) for key, value in batch.items()})[0]

    def measure(self, model: Any, rows: Dataset | None = None) -> dict[str, float]:
        """The metrics of the validation rows or of others, `loss` among them.

        Args:
            model: the model, not wrapped by Accelerate.
            rows: other rows, checked.
        """
        rows = self.validation_rows if rows is None else rows
        return evaluate(self.task, model, rows, self.recipe.eval_batch_size, self.accelerator)[0]

    def is_better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        """Whether metrics are better than the best so far."""
        return is_better(self.task, self.metric, metrics[self.metric], None if best is None else best[self.metric])
