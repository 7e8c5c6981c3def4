"""The objective of a training loop: its batches and loss, and the metrics that choose the best checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from datasets import Dataset

from .batches import Batches
from .data import DataError, rows_of
from .distributed import prepare_for_training
from .evaluation import evaluate, make_features
from .recipe import RecipeError
from .streams import RowStream, StreamBatches
from .tasks.task import input_length

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from .batches import JointBatches
    from .recipe import Recipe
    from .tasks import Task


class TrainingObjective(Protocol):
    """The interface of `Loop` to the tasks: `TaskObjective` for one task, `JointObjective` for several."""

    metric: str
    """The metric that chooses the best checkpoint."""
    lower_is_better: bool
    """Whether a lower value of `metric` is better."""
    items: list[int]
    """For each feature, the number of items (rows, words, tokens) over which its loss is the mean."""

    @property
    def batches(self) -> Batches | JointBatches | StreamBatches:
        """The batches, as lists of feature indices."""

    def prepare(self, model: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """Prepare the model and a new optimizer with Accelerate.

        Returns:
            The prepared model, the prepared optimizer, and the PyTorch optimizer inside it.
        """

    def dry_run(self, model: Any) -> None:
        """Find errors that would otherwise end the run in the middle.

        Args:
            model: the model without Accelerate's wrapper; it is left in eval mode.

        Raises:
            RecipeError: if the longest row is too long for the model, or the metric does not exist.
        """

    def loss(self, model: Any, features: list[int]) -> Tensor:
        """The model's mean loss on the features with these indices."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """The metrics on the validation rows, `loss` among them; `model` has no wrapper of Accelerate's."""


class TaskObjective:
    """The training objective of one task.

    Args:
        recipe: the recipe.
        task: the recipe's task, with labels.
        rows: the checked rows by split: `train`, which may be a stream, `validation` and perhaps `test`.
        accelerator: the accelerator.

    Raises:
        DataError: if no training row contributes to the loss.
    """

    def __init__(
        self, recipe: Recipe, task: Task, rows: dict[str, Dataset | RowStream], accelerator: Accelerator
    ) -> None:
        self.recipe, self.task, self.rows, self.accelerator = recipe, task, rows, accelerator
        self.batches: Batches | StreamBatches
        training = rows["train"]
        if isinstance(training, RowStream):
            self.batches = StreamBatches(training, self._use_block, recipe.batch_size, recipe.seed)
        else:
            self._use(make_features(task, training, True, recipe.data.num_proc))
            lengths = self.lengths if recipe.group_by_length else None
            self.batches = Batches(len(self.items), recipe.batch_size, recipe.seed, lengths)
        self.metric = recipe.metric_for_best_model or task.default_metric
        self.lower_is_better = self.metric in task.lower_is_better

    def _use_block(self, rows: Dataset) -> int:
        """Train on the rows of a block of a stream from here on; return the number of its features."""
        columns = self.task.training_features(rows[:], list(range(len(rows))))
        return self._use(Dataset.from_dict(columns))

    def _use(self, features: Dataset) -> int:
        """Train on these features from here on; return their number."""
        self.task.check_tokens(features, self.recipe.data.source_of("train"))
        items = [self.task.num_items(labels) for labels in features["labels"]]
        if not all(items):  # For instance a truncated completion. The mean of no losses is not a number.
            kept = [i for i, count in enumerate(items) if count]
            self.accelerator.print(
                f"{len(items) - len(kept)} features do not contribute to the loss and are left out."
            )
            features, items = features.select(kept), [items[i] for i in kept]
        if not items:
            raise DataError("No training row contributes to the loss: `max_length` may be too small.")
        self.features, self.items = features, items
        self.lengths = [input_length(ids) for ids in features["input_ids"]]
        return len(items)

    def prepare(self, model: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """See `TrainingObjective.prepare` and `distributed.prepare_for_training`."""
        return prepare_for_training(self.accelerator, model, self.recipe)

    def dry_run(self, model: Any) -> None:
        """See `TrainingObjective.dry_run`."""
        longest = max(self.lengths)
        try:
            with torch.no_grad():
                self.loss(model.eval(), [self.lengths.index(longest)])
        except (ValueError, IndexError, RuntimeError) as error:
            raise RecipeError(
                f"The model cannot process the longest training row, {longest} tokens (`max_length` is "
                f"{self.task.max_length}): {error}"
            ) from error
        if self.recipe.metric_for_best_model:
            rows = self.rows["validation"]
            assert isinstance(rows, Dataset)
            known = self._metrics(model, rows.select(range(min(2, len(rows)))))
            if self.metric not in known:
                raise RecipeError(f"`metric_for_best_model`: there is no {self.metric!r}; there are {sorted(known)}.")

    def loss(self, model: Any, features: list[int]) -> Tensor:
        """See `TrainingObjective.loss`."""
        batch = self.task.collate(rows_of(self.features[features]))
        return self.task.loss(model, {key: value.to(self.accelerator.device) for key, value in batch.items()})[0]

    def constant_metrics(self) -> dict[str, float]:
        """The metrics of the same answer for every validation row; empty if the task has no such answer."""
        rows = self.rows["validation"]
        assert isinstance(rows, Dataset)
        answers = self.task.constant_answers(rows_of(rows[:]))
        return self.task.metrics(answers, rows[self.task.target_column(rows.column_names)]) if answers else {}

    def evaluate(self, model: Any, split: str = "validation") -> dict[str, float]:
        """The metrics on the rows of a split, `loss` among them; `model` has no wrapper of Accelerate's."""
        rows = self.rows[split]
        assert isinstance(rows, Dataset)  # only training rows can be a stream
        return self._metrics(model, rows)

    def _metrics(self, model: Any, rows: Dataset) -> dict[str, float]:
        return evaluate(self.task, model, rows, self.recipe.eval_batch_size, self.accelerator)[0]
