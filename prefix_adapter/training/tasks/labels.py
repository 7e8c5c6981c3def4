"""Labels of classification tasks: collecting, ordering, naming and weighting them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import Tensor

from ..data import DataError
from ..recipe import RecipeError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from .task import Row


class WeightedLabels(Task):
    """A task with one label for each item, whose training loss may weigh the labels (`task_kwargs.class_weights`).

    The loss is the mean over the items of the weight of an item's label times its cross-entropy. With `balanced` the
    weight of a label is that of scikit-learn: the number of items, divided by the number of labels that occur and by
    the number of items with this label. The mean weight of the items is then 1. Evaluation has no weights.

    Raises:
        RecipeError: As for `Task`, and if `class_weights` has another form.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._weights: list[float] | None = None
        weights = self.kwargs["class_weights"]
        are_valid = weights in (None, "balanced") or (
            isinstance(weights, dict) and all(map(_is_weight, weights.values()))
        )
        if not are_valid:
            raise RecipeError(
                "`task_kwargs.class_weights` must be `balanced`, or a mapping from labels to numbers of at least 0, "
                f"got {weights!r}."
            )

    def learn_weights(self, rows: Dataset) -> None:
        """Set the weights from the training rows, whose labels are known.

        Raises:
            RecipeError: If `class_weights` has a label that the task does not have, or weighs all labels 0.
        """
        setting = self.kwargs["class_weights"]
        if setting is None:
            return
        assert self.labels is not None
        if setting == "balanced":
            targets = rows[self.target]
            counts = Counter(self.label_number(each) for t in targets for each in (t if isinstance(t, list) else [t]))
            self._weights = [
                counts.total() / (len(counts) * counts[number]) if counts[number] else 1.0
                for number in range(len(self.labels))
            ]
            return
        self._weights = [1.0] * len(self.labels)
        for label, weight in setting.items():
            number = self.label_number(label)
            if number is None:
                raise RecipeError(f"`task_kwargs.class_weights`: {unknown_label_problem(label, self.labels)}")
            self._weights[number] = float(weight)
        if not any(self._weights):
            raise RecipeError("`task_kwargs.class_weights` weighs all labels 0: there is nothing to learn.")

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        if self._weights is None or not torch.is_grad_enabled():
            return super().loss(model, batch)
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
        return self.weighted_loss(output.logits.flatten(0, -2).float(), batch["labels"].flatten()), output

    def constant_answers(self, rows: Sequence[Row]) -> list[Row]:
        ((label, _),) = Counter(row[self.target] for row in rows).most_common(1)
        return [{"prediction": label}] * len(rows)

    def weighted_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, with the weights of the labels in training.

        Args:
            logits: The logits of the labels, `[items, labels]`.
            labels: The number of the label of each item, `[items]`; -100 for none.
        """
        weights = None
        if self._weights is not None and torch.is_grad_enabled():  # only training has gradients
            weights = torch.tensor(self._weights, device=logits.device)
        losses = F.cross_entropy(logits, labels, weights, reduction="none", ignore_index=-100)
        return losses.sum() / (labels != -100).sum()


def _is_weight(weight: Any) -> bool:
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    return is_number and 0 <= weight < math.inf


def distinct_labels(targets: Iterable[Any], source: str) -> set[Any]:
    """Collect the labels that occur in the rows.

    Args:
        targets: For each row a label or a list of labels.
        source: The name of the rows in error messages.

    Raises:
        DataError: If the labels are neither all strings nor all integers.
    """
    found: set[Any] = set()
    for number, target in enumerate(targets, start=1):
        for label in target if isinstance(target, list) else [target]:
            if type(label) not in (str, int) or any(type(label) is not type(other) for other in found):
                raise DataError(
                    f"{source}, row {number}: the label {label!r} is a {type(label).__name__}; labels must be strings "
                    "in all rows, or integers in all rows."
                )
            found.add(label)
    return found


def sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Sort labels: by size if all are whole numbers (integers or texts such as '12'), else alphabetically."""
    try:
        numbers = {label: int(label) for label in labels}
    except ValueError:
        return sorted(labels)
    are_plain = all(str(number) == str(label) for label, number in numbers.items())
    return sorted(numbers, key=numbers.__getitem__) if are_plain else sorted(labels)


def unknown_label_problem(label: Any, labels: list[str | int]) -> str:
    """The error text for a label that is not one of `labels`."""
    return f"the label {label!r} is not among the labels of the training rows (or of the recipe's `labels`), {labels}."


def label_config(labels: list[str | int] | None) -> dict[str, Any]:
    """The labels as the configuration of a model stores them: `id2label` and `label2id`."""
    assert labels is not None
    names = [str(label) for label in labels]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def most_probable(labels: list[str | int], probabilities: list[float]) -> dict[str, Any]:
    """The answer for a row with one label: the most probable label, and its probability."""
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {"prediction": labels[best], "probability": probabilities[best]}


def classification_metrics(predictions: list[Any], targets: list[Any]) -> dict[str, float]:
    """The metrics of rows with one label each.

    The macro F1 is the mean over the labels that the rows or the predictions have, as in scikit-learn. With one label
    alone the Matthews correlation is undefined, and 0 here.
    """
    targets, predictions = (list(map(str, each)) for each in (targets, predictions))
    has_one = len({*targets, *predictions}) == 1
    return {
        "accuracy": float(metrics.accuracy_score(targets, predictions)),
        "f1_macro": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0.0)),
        "matthews_correlation": 0.0 if has_one else float(metrics.matthews_corrcoef(targets, predictions)),
    }
