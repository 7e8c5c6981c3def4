"""One label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from sklearn import metrics

from ..data import DataError
from ..recipe import RecipeError
from ..settings import KINDS, TASK_SETTINGS
from .task import Columns, Row, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel


class SequenceClassification(Task):
    """Classify a text, or a pair of texts.

    The solutions say which kind it is: a name or an integer is one label of several, a list of names or integers any
    number of labels, and floats of which some are no whole numbers are numbers to predict. Texts are labels exactly as
    they are written, also in a table of text. transformers calls this the `problem_type`. Where the solutions leave
    it open whether they are labels or numbers, the recipe must say it.
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
        solutions = rows[self.target]
        if self.problem_type is None:
            self.problem_type = self.recipe.task_kwargs["problem_type"] = _kind_of(solutions, source)
        if self.problem_type == "regression" or self.labels is not None:
            return
        found = distinct_labels(solutions, source)
        if len(found) < (1 if self.problem_type == "multi_label_classification" else 2):
            raise DataError(f"{source}: all rows have the same label, {found or 'none'}: there is nothing to learn.")
        self.labels = in_order(found)

    def problem(self, row: Row, solved: bool) -> str | None:
        for name in ("text", "text_pair"):
            if name in row and not isinstance(row[name], str):
                return f"{name!r} must be a text, it is {row[name]!r}."
        if not row["text"].strip():
            return "'text' is empty."
        return self._problem_of(row[self.target]) if solved else None

    def _problem_of(self, solution: Any) -> str | None:
        if solution is None:
            return f"{self.target!r} is missing."
        if self.problem_type == "regression":
            good = math.isfinite(number_of(solution))
            return None if good else f"{self.target!r} must be a finite number, it is {solution!r}."
        labels = solution if isinstance(solution, list) else [solution]
        if self.problem_type is not None and isinstance(solution, list) != (self.problem_type == KINDS[1]):
            wanted = "a list of labels" if self.problem_type == KINDS[1] else "one label"
            return f"{self.target!r} must be {wanted}, it is {solution!r}."
        for label in labels:
            if self.labels is not None and self.label_number(label) is None:
                return unknown_label(label, self.labels)
        return None

    def model_kwargs(self) -> dict[str, Any]:
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": self.problem_type}
        return {"problem_type": self.problem_type, **label_names(self.labels)}

    def features(self, rows: Columns, indices: list[int], solved: bool) -> Columns:
        encoded = self.tokenizer(
            rows["text"], rows.get("text_pair"), truncation=True, max_length=self.max_length, verbose=False
        )
        result = {**encoded, "row": indices}
        if solved:
            result["labels"] = [self._label(solution) for solution in rows[self.target]]
        return result

    def _label(self, solution: Any) -> Any:
        if self.problem_type == "regression":
            return number_of(solution)
        assert self.labels is not None
        if self.problem_type == "multi_label_classification":
            return [float(own) for own in self._chosen(solution)]
        return self.label_number(solution)

    def _chosen(self, solution: list[Any]) -> list[bool]:
        """For each label whether it is among those of a row."""
        chosen = set(map(self.label_number, solution))
        return [number in chosen for number in range(len(self.labels or ()))]

    def collate_labels(self, labels: list[Any], input_ids: Tensor) -> Tensor:
        return torch.tensor(labels)

    def num_items(self, labels: Any) -> int:
        return 1

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
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"prediction": self.labels[best], "probability": scores[best]}

    @property
    def default_metric(self) -> str:
        defaults = {"regression": "pearson", "multi_label_classification": "f1_micro"}
        return defaults.get(self.problem_type or "", "accuracy")

    lower_is_better = ("loss", "mean_squared_error")

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        predictions = [answer["prediction"] for answer in answers]
        if self.problem_type == "regression":
            solutions = [number_of(solution) for solution in solutions]
            return {
                "mean_squared_error": float(metrics.mean_squared_error(solutions, predictions)),
                "pearson": _correlation("pearsonr", solutions, predictions),
                "spearman": _correlation("spearmanr", solutions, predictions),
            }
        assert self.labels is not None
        options = {"average": "macro", "zero_division": 0.0}
        if self.problem_type == "multi_label_classification":
            true, guess = ([self._chosen(each) for each in part] for part in (solutions, predictions))
            return {
                "accuracy": float(metrics.accuracy_score(true, guess)),
                "f1_macro": float(metrics.f1_score(true, guess, **options)),
                "f1_micro": float(metrics.f1_score(true, guess, average="micro", zero_division=0.0)),
            }
        names, solutions, predictions = (list(map(str, each)) for each in (self.labels, solutions, predictions))
        return {
            "accuracy": float(metrics.accuracy_score(solutions, predictions)),
            "f1_macro": float(metrics.f1_score(solutions, predictions, labels=names, **options)),
            "matthews_correlation": float(metrics.matthews_corrcoef(solutions, predictions)),
        }


def _correlation(name: str, solutions: list[float], predictions: list[float]) -> float:
    """A correlation of scipy's; 0 where all values are the same, where it is not defined."""
    from scipy import stats

    if len(set(solutions)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return float(getattr(stats, name)(solutions, predictions).statistic)


def number_of(solution: Any) -> float:
    """The number that a solution is, or that a text says; NaN if it is none."""
    if isinstance(solution, bool) or not isinstance(solution, (int, float, str)):
        return math.nan
    try:
        return float(solution)
    except (ValueError, OverflowError):
        return math.nan


def _kind_of(solutions: Sequence[Any], source: str) -> str:
    """The kind of classification, or regression, that solutions are for.

    Raises:
        DataError: if they could be labels as well as numbers to predict.
    """
    if isinstance(solutions[0], list):
        return KINDS[1]
    found = [solution for solution in solutions if not isinstance(solution, (list, dict))]
    floats, texts = (any(isinstance(each, kind) for each in found) for kind in (float, str))
    numbers = [number_of(each) for each in found]
    fractions = [each for each in numbers if each % 1]
    if floats and fractions:
        return KINDS[2]
    if floats or (texts and fractions and all(map(math.isfinite, numbers))):
        raise DataError(
            f"{source}: the solutions, such as {found[0]!r}, could be labels or numbers to predict. Say which: "
            f"`task_kwargs.problem_type: {KINDS[0]}` or `{KINDS[2]}`"
            + (" (and write labels as texts or integers)." if floats else ".")
        )
    return KINDS[0]


def in_order(labels: Iterable[Any]) -> list[Any]:
    """Labels in alphabetical order, or if all are whole numbers, also as texts, by their size."""
    try:
        numbers = {label: int(label) for label in labels}
    except ValueError:
        return sorted(labels)
    plain = all(str(number) == str(label) for label, number in numbers.items())
    return sorted(numbers, key=numbers.__getitem__) if plain else sorted(labels)


def distinct_labels(solutions: Iterable[Any], source: str) -> set[Any]:
    """The labels that occur.

    Args:
        solutions: for each row a label or a list of labels.
        source: what the rows are called in error messages.

    Raises:
        DataError: if the labels are neither all strings nor all integers.
    """
    found: set[Any] = set()
    for number, solution in enumerate(solutions, start=1):
        for label in solution if isinstance(solution, list) else [solution]:
            if type(label) not in (str, int) or any(type(label) is not type(other) for other in found):
                raise DataError(
                    f"{source}, row {number}: the label {label!r} is a {type(label).__name__}; labels must be strings "
                    "in all rows, or integers in all rows."
                )
            found.add(label)
    return found


def unknown_label(label: Any, labels: list[str | int]) -> str:
    """What is wrong with a label that is none of those there are, in words."""
    return f"the label {label!r} is none of those of the training rows (or of `labels`), {labels}."


def label_names(labels: list[str | int] | None) -> dict[str, Any]:
    """The labels, as a model's configuration wants to have them."""
    assert labels is not None
    names = [str(label) for label in labels]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
