"""Multiple choice: select one of several endings, answers or causes for a text (SWAG, RACE, COPA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.nn import functional as F

from ..data import DataError, columns_found, rows_of
from .task import Columns, Row, Task, text_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_COLUMNS = [f"choice{number}" for number in range(10)]


class MultipleChoice(Task):
    """Select one of several choices for a text.

    The model reads each choice together with the text; the prediction is the choice with the highest logit (Devlin et
    al. 2019, section 4.4). The choices are a list in the column `choices`, or one column each, `choice0` to `choice9`
    or from `choice1` on. Rows can have different numbers of choices; with one column each, the last ones are then
    empty.

    The column `label` is the number of the right choice, counted from 0, or its text.

    A row: `{"text": "a text", "choices": ["one ending", "another ending"], "label": 0}`.
    """

    auto_class = "AutoModelForMultipleChoice"
    peft_task_type = None
    modules_to_save = ["classifier", "logits_proj", "sequence_summary"]
    columns = {"text": "the text"}
    optional_columns = {
        "choices": "the choices, a list of strings",
        **dict.fromkeys(_COLUMNS, "a choice, if there is no list of choices"),
        "question": "a question about the text, inserted before every choice",
    }
    target = "label"
    default_metric = "accuracy"

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        if not {"choices", *_COLUMNS} & set(rows.column_names):
            raise DataError(
                f"{source} has no column 'choices' (a list of strings), nor 'choice1', 'choice2' and so on; "
                f"{columns_found(rows.column_names)} If the column has another name, set `data.columns: {{choices: "
                "...}`."
            )
        super().check(rows, source, with_targets)

    def problem(self, row: Row, with_targets: bool) -> str | None:
        for name in ("text", "question"):
            if name in row and (problem := text_problem(row, name, may_be_empty=name != "text")):
                return problem
        if "choices" not in row and "choice10" in row:
            return "more than ten choices must be a list in one column, 'choices'."
        choices = choices_of(row)
        if not isinstance(choices, list) or len(choices) < 2:
            return f"there must be at least two choices, got {choices!r}."
        for choice in choices:
            if not isinstance(choice, str) or not choice.strip():
                return f"a choice must be a text that is not empty, got {choice!r}."
        return _label_problem(row[self.target], choices) if with_targets else None

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        rows_with_choices = [(row, choices_of(row)) for row in rows_of(rows)]
        texts = [row["text"] for row, choices in rows_with_choices for _ in choices]
        pairs = [
            f"{row['question']} {choice}" if "question" in row else choice
            for row, choices in rows_with_choices
            for choice in choices
        ]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, verbose=False)
        result: Columns = {"row": indices}
        for key, values in encoded.items():
            remaining = iter(values)
            result[key] = [[next(remaining) for _ in choices] for _, choices in rows_with_choices]
        if with_targets:
            result["labels"] = [matching_choices(row[self.target], choices)[0] for row, choices in rows_with_choices]
        return result

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch in which the choices of all rows are the choices of one row, so that none need padding.

        Returns:
            The inputs of the model, `[1, choices of all rows, longest]`; `choices`, `[batch, most choices of a row]`,
            the index of each choice among the choices of all rows, -1 where a row has fewer; and `labels`, `[batch]`.
        """
        flat = [
            {key: feature[key][i] for key in self.padded if key in feature}
            for feature in features
            for i in range(len(feature["input_ids"]))
        ]
        batch = {key: value[None] for key, value in self.tokenizer.pad(flat, return_tensors="pt").items()}
        counts = torch.tensor([len(feature["input_ids"]) for feature in features])
        places = torch.arange(int(counts.max())).expand(len(features), -1)
        first = (counts.cumsum(0) - counts)[:, None]
        batch["choices"] = torch.where(places < counts[:, None], first + places, -1)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def _logits(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """The logits, `[batch, most choices of a row]`; minus infinity where a row has fewer choices."""
        (logits,) = model(**{key: value for key, value in batch.items() if key in self.padded}).logits.float()
        return F.pad(logits, (0, 1), value=-math.inf)[batch["choices"]]  # -1 selects the added column

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        logits = self._logits(model, batch)
        return F.cross_entropy(logits, batch["labels"]), logits

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        logits = self._logits(model, batch) if output is None else output
        return logits.softmax(-1).tolist()

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        choices = choices_of(row)
        probabilities = records[0][: len(choices)]
        best = max(range(len(choices)), key=probabilities.__getitem__)
        return {"prediction": best, "choice": choices[best], "probabilities": probabilities}

    def constant_answers(self, rows: Sequence[Row]) -> list[Row]:
        choices = [choices_of(row) for row in rows]
        numbers = [matching_choices(row[self.target], own)[0] for row, own in zip(rows, choices, strict=True)]
        # The same number for every row; where there are fewer choices, the last one.
        options = ([min(option, len(own) - 1) for own in choices] for option in range(max(map(len, choices))))
        chosen = max(options, key=lambda option: sum(map(eq, option, numbers)))
        return [{"prediction": each, "choice": own[each]} for each, own in zip(chosen, choices, strict=True)]

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        guesses = [_as_target(answer, target) for answer, target in zip(answers, targets, strict=True)]
        return {"accuracy": float(accuracy_score(targets, guesses))}


def choices_of(row: Row) -> Any:
    """The choices of a row: its list, or its columns without missing ones at the end."""
    if "choices" in row:
        return row["choices"]
    choices = [row[name] for name in _COLUMNS if name in row]
    while choices and choices[-1] is None:
        choices.pop()
    return choices


def matching_choices(label: Any, choices: list[str]) -> list[int]:
    """The numbers of the choices that a label can refer to: exactly one if the label is valid."""
    return [
        number
        for number, choice in enumerate(choices)
        if (label in (str(number), choice) if isinstance(label, str) else label == number)
    ]


def _as_target(answer: Row, target: Any) -> Any:
    """A prediction in the form of the target: an integer, a text with a number, or the text of the choice."""
    if isinstance(target, str):
        return target if target == str(answer["prediction"]) else answer["choice"]
    return answer["prediction"]


def _label_problem(label: Any, choices: list[str]) -> str | None:
    numbers = matching_choices(label, choices)
    if not numbers:
        return f"'label' must be the number of a choice, from 0 to {len(choices) - 1}, or its text, got {label!r}."
    if len(numbers) > 1:
        return (
            f"'label' {label!r} can mean each of the choices {numbers}. Give the number of the right choice as a "
            "number (in JSON or Parquet; CSV has texts only)."
        )
    return None
