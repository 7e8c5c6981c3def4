"""Sequence classification: one label, several labels, or a number (regression) for a text or a pair of texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sklearn import metrics

from ..data import DataError
from ..recipe import RecipeError
from ..settings import KINDS, TASK_SETTINGS
from .labels import (
    WeightedLabels,
    classification_metrics,
    distinct_labels,
    label_config,
    most_probable,
    sort_labels,
    unknown_label_problem,
)
from .task import Columns, Row, text_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel


class SequenceClassification(WeightedLabels):
    """Classify a text or a pair of texts, or predict a number for it.

    The values in the column `label` determine the `problem_type`, as transformers calls it:

    - strings or integers: one label per row (single_label_classification);
    - lists of strings or integers: any number of labels per row (multi_label_classification);
    - floats, some of them not whole: a number (regression).

    If the values could be labels or numbers, `task_kwargs.problem_type` must be set. A string is a label as written,
    in CSV too.

    A row: `{"text": "a text", "text_pair": "a second one, if there are pairs", "label": "a label"}`.
    """

    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    columns = {"text": "the text"}
    optional_columns = {"text_pair": "a second text"}
    target = "label"
    settings = TASK_SETTINGS["sequence-classification"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.problem_type: str | None = self.kwargs["problem_type"]
        if self.problem_type not in (None, *KINDS):
            raise RecipeError(f"`task_kwargs.problem_type` must be one of {KINDS}, got {self.problem_type!r}.")

    def learn_labels(self, rows: Dataset, source: str) -> None:
        targets = rows[self.target]
        if self.problem_type is None:
            self.problem_type = self.recipe.task_kwargs["problem_type"] = _infer_problem_type(targets, source)
        if self.kwargs["class_weights"] is not None and self.problem_type != "single_label_classification":
            raise RecipeError(f"`task_kwargs.class_weights` is for rows with one label each, not {self.problem_type}.")
        if self.problem_type == "regression":
            return
        if self.labels is None:
            found = distinct_labels(targets, source)
            if len(found) < (1 if self.problem_type == "multi_label_classification" else 2):
                raise DataError(
                    f"{source}: all rows have the same label, {found or 'none'}: there is nothing to learn."
                )
            self.labels = sort_labels(found)
        self.learn_weights(rows)

    def problem(self, row: Row, with_targets: bool) -> str | None:
        problem = text_problem(row, "text")
        if problem is None and "text_pair" in row:
            problem = text_problem(row, "text_pair", may_be_empty=True)
        return self._label_problem(row[self.target]) if with_targets and problem is None else problem

    def _label_problem(self, target: Any) -> str | None:
        if target is None:
            return f"{self.target!r} is missing."
        if self.problem_type == "regression":
            is_finite = math.isfinite(number_of(target))
            return None if is_finite else f"{self.target!r} must be a finite number, got {target!r}."
        labels = target if isinstance(target, list) else [target]
        needs_list = self.problem_type == "multi_label_classification"
        if self.problem_type is not None and isinstance(target, list) != needs_list:
            expected = "a list of labels" if needs_list else "one label"
            return f"{self.target!r} must be {expected}, got {target!r}."
        for label in labels:
            if self.labels is not None and self.label_number(label) is None:
                return unknown_label_problem(label, self.labels)
        return None

    def model_kwargs(self) -> dict[str, Any]:
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": self.problem_type}
        return {"problem_type": self.problem_type, **label_config(self.labels)}

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        encoded = self.tokenizer(
            rows["text"], rows.get("text_pair"), truncation=True, max_length=self.max_length, verbose=False
        )
        result = {**encoded, "row": indices}
        if with_targets:
            result["labels"] = [self._label(target) for target in rows[self.target]]
        return result

    def _label(self, target: Any) -> Any:
        if self.problem_type == "regression":
            return number_of(target)
        assert self.labels is not None
        if self.problem_type == "multi_label_classification":
            return [float(present) for present in self._multi_hot(target)]
        return self.label_number(target)

    def _multi_hot(self, labels: list[Any]) -> list[bool]:
        """For each label of the task whether it is in `labels`."""
        numbers = set(map(self.label_number, labels))
        return [number in numbers for number in range(len(self.labels or ()))]

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        logits = (output or model(**batch)).logits.float()
        if self.problem_type == "regression":
            return logits[:, 0].tolist()
        return (logits.sigmoid() if self.problem_type == "multi_label_classification" else logits.softmax(-1)).tolist()

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        (scores,) = records
        if self.problem_type == "regression":
            return {"prediction": scores}
        assert self.labels is not None
        if self.problem_type == "multi_label_classification":
            chosen = [
                label for label, score in zip(self.labels, scores, strict=True) if score >= self.kwargs["threshold"]
            ]
            return {"prediction": chosen, "probabilities": dict(zip(map(str, self.labels), scores, strict=True))}
        return most_probable(self.labels, scores)

    def constant_answers(self, rows: Sequence[Row]) -> list[Row]:
        # No answer is clearly best of several labels, or of numbers: a constant has no correlation with them.
        is_single = self.problem_type == "single_label_classification"
        return super().constant_answers(rows) if is_single else []

    @property
    def default_metric(self) -> str:
        defaults = {"regression": "pearson", "multi_label_classification": "f1_micro"}
        return defaults.get(self.problem_type or "", "accuracy")

    lower_is_better = ("loss", "mean_squared_error")

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        predictions = [answer["prediction"] for answer in answers]
        if self.problem_type == "regression":
            targets = [number_of(target) for target in targets]
            return {
                "mean_squared_error": float(metrics.mean_squared_error(targets, predictions)),
                "pearson": _correlation("pearsonr", targets, predictions),
                "spearman": _correlation("spearmanr", targets, predictions),
            }
        assert self.labels is not None
        if self.problem_type == "multi_label_classification":
            true, guess = ([self._multi_hot(each) for each in part] for part in (targets, predictions))
            return {
                "accuracy": float(metrics.accuracy_score(true, guess)),
                "f1_macro": float(metrics.f1_score(true, guess, average="macro", zero_division=0.0)),
                "f1_micro": float(metrics.f1_score(true, guess, average="micro", zero_division=0.0)),
            }
        return classification_metrics(predictions, targets)


def _correlation(name: str, targets: list[float], predictions: list[float]) -> float:
    """A correlation from `scipy.stats`. If all values are the same it is undefined, and 0 here."""
    from scipy import stats

    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return float(getattr(stats, name)(targets, predictions).statistic)


def number_of(target: Any) -> float:
    """Convert a number, or a text that is a number, to float; anything else to NaN."""
    if isinstance(target, bool) or not isinstance(target, (int, float, str)):
        return math.nan
    try:
        return float(target)
    except (ValueError, OverflowError):
        return math.nan


def _infer_problem_type(targets: Sequence[Any], source: str) -> str:
    """Infer the problem type from the values of the column `label`.

    Raises:
        DataError: If the values could be labels as well as numbers.
    """
    if isinstance(targets[0], list):
        return "multi_label_classification"
    found = [target for target in targets if not isinstance(target, (list, dict))]
    has_floats, has_texts = (any(isinstance(each, kind) for each in found) for kind in (float, str))
    numbers = [number_of(each) for each in found]
    has_fractions = any(each % 1 for each in numbers)
    if has_floats and has_fractions:
        return "regression"
    if has_floats or (has_texts and has_fractions and all(map(math.isfinite, numbers))):
        raise DataError(
            f"{source}: the values of 'label', such as {found[0]!r}, could be labels or numbers to predict. Set "
            "`task_kwargs.problem_type: single_label_classification` or `regression`"
            + (" (and write labels as texts or integers)." if has_floats else ".")
        )
    return "single_label_classification"
