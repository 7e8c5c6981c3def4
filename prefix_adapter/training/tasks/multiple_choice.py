"""One of several endings, answers or causes for a text (SWAG, RACE, COPA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.nn import functional as F

from ..data import DataError, rows_of
from .task import Columns, Row, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_COLUMNS = [f"choice{number}" for number in range(10)]


class MultipleChoice(Task):
    """Choose one of several texts that may go with a text.

    Each choice is read together with the text, and the choice with the highest logit is taken (Devlin et al. 2019,
    section 4.4). The choices are a list in the column `choices`, or in columns of their own, `choice0` to `choice9`;
    the first of these may be missing. Rows may have different numbers of choices: the last columns are then empty.

    The solution is the number of the right choice, counted from 0, or its text.
    """

    auto_class = "AutoModelForMultipleChoice"
    peft_task_type = None
    modules_to_save = ["classifier", "logits_proj", "sequence_summary"]
    columns = {"text": "the text"}
    optional_columns = {
        "choices": "the choices, a list of strings",
        **dict.fromkeys(_COLUMNS, "a choice, if they are not in a list"),
        "question": "what is asked about the text; put in front of every choice",
    }
    target = "label"
    default_metric = "accuracy"

    def check(self, rows: Dataset, source: str, solved: bool = True) -> None:
        if not {"choices", *_COLUMNS} & set(rows.column_names):
            raise DataError(
                f"{source} has no column 'choices' (a list of strings), nor 'choice1', 'choice2' and so on; it has "
                f"{rows.column_names}. If they are called otherwise, say so: `data.columns: {{choices: ...}}`."
            )
        super().check(rows, source, solved)

    def problem(self, row: Row, solved: bool) -> str | None:
        for name in ("text", "question"):
            if name in row and not isinstance(row[name], str):
                return f"{name!r} must be a text, it is {row[name]!r}."
        if not row["text"].strip():
            return "'text' is empty."
        if "choices" not in row and "choice10" in row:
            return "more than ten choices must be a list in one column, 'choices'."
        choices = choices_of(row)
        if not isinstance(choices, list) or len(choices) < 2:
            return f"there must be two choices or more, there are {choices!r}."
        for choice in choices:
            if not isinstance(choice, str) or not choice.strip():
                return f"a choice must be a text, it is {choice!r}."
        return _problem_of(row[self.target], choices) if solved else None

    def features(self, rows: Columns, indices: list[int], solved: bool) -> Columns:
        each = rows_of(rows)
        choices = [choices_of(row) for row in each]
        texts = [row["text"] for row, own in zip(each, choices, strict=True) for _ in own]
        pairs = [
            f"{row['question']} {choice}" if "question" in row else choice
            for row, own in zip(each, choices, strict=True)
            for choice in own
        ]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, verbose=False)
        result: Columns = {"row": indices}
        for key, values in encoded.items():
            rest = iter(values)
            result[key] = [[next(rest) for _ in own] for own in choices]
        if solved:
            result["labels"] = [meant(row[self.target], own)[0] for row, own in zip(each, choices, strict=True)]
        return result

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        """The choices of all rows beside each other, as those of one: `[1, choices of all rows, longest]`.

        Returns:
            The model's inputs, `labels`, and `choices` `[batch, most choices of a row]`, the places of each row's
            choices among them all, -1 where a row has fewer.
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
        """The logits of the choices `[batch, most choices of a row]`, minus infinity where a row has fewer."""
        (logits,) = model(**{key: value for key, value in batch.items() if key in self.padded}).logits.float()
        return F.pad(logits, (0, 1), value=-math.inf)[batch["choices"]]  # -1 is the last one

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

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        guesses = [_guess(answer, solution) for answer, solution in zip(answers, solutions, strict=True)]
        return {"accuracy": float(accuracy_score(solutions, guesses))}


def choices_of(row: Row) -> Any:
    """The choices of a row: its list, or its columns without those that are missing at the end."""
    if "choices" in row:
        return row["choices"]
    choices = [row[name] for name in _COLUMNS if name in row]
    while choices and choices[-1] is None:
        choices.pop()
    return choices


def meant(label: Any, choices: list[str]) -> list[int]:
    """The numbers of the choices that a label can mean: one, if the label is a good one."""
    return [
        number
        for number, choice in enumerate(choices)
        if (label in (str(number), choice) if isinstance(label, str) else label == number)
    ]


def _guess(answer: Row, solution: Any) -> Any:
    """An answer in the solution's words: a number, a number that is written as a text, or the choice's text."""
    if isinstance(solution, str):
        return solution if solution == str(answer["prediction"]) else answer["choice"]
    return answer["prediction"]


def _problem_of(label: Any, choices: list[str]) -> str | None:
    numbers = meant(label, choices)
    if not numbers:
        return f"'label' must be the number of a choice, from 0 to {len(choices) - 1}, or its text, it is {label!r}."
    if len(numbers) > 1:
        return (
            f"'label' {label!r} can mean each of the choices {numbers}: give the number of the right one, as a number "
            "(in JSON or Parquet: a table of text has none)."
        )
    return None
