"""What a task is: its columns, its head, how its rows become batches, and how outputs become answers and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow
import torch
from pyarrow import compute
from torch import Tensor

from ..data import DataError
from ..recipe import RecipeError, say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

_UNKNOWN = 0.5
"""The share of unknown tokens above which training is refused; the user is told from a fifth of it."""
Row = dict[str, Any]
"""A row of the data, or one feature: what the tokenizer made of it."""
Columns = dict[str, list[Any]]
"""Several of them, column by column."""


class Task:
    """One task. Subclasses give the class attributes and override what differs.

    `check` says what is wrong with the data, `features` tokenizes, `collate` makes a batch, the model's own loss is
    minimised. In evaluation `outputs` gives a small record per feature, `answers` turns the records of one row
    (one, or many where a long context is cut up) into what a user wants to read, and `metrics` compares answers.

    Args:
        recipe: the recipe; `recipe.labels` is used where it is given.
        tokenizer: the base model's.

    Raises:
        RecipeError: if `task_kwargs` has a key that the task does not know, or a value that it cannot have.
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads the base model with this task's head."""
    peft_task_type: ClassVar[str | None]
    """PEFT's `task_type`; `None` where it has none."""
    has_head: ClassVar[bool] = True
    """Whether what the model has beside its backbone is the task's own, and not a language model's."""
    modules_to_save: ClassVar[list[str] | None] = None
    """Names of the head's modules, where PEFT does not know them by the task type."""
    columns: ClassVar[dict[str, str]]
    """The columns that a row must have to be answered, and what they hold."""
    target: ClassVar[str]
    """The column that holds the solution."""
    optional_columns: ClassVar[dict[str, str]] = {}
    """Columns that are used if they are there."""
    settings: ClassVar[dict[str, tuple[Any, str]]] = {}
    """What `task_kwargs` may say: `{name: (default, help)}`."""
    default_max_length: ClassVar[int] = 128
    answers_with_labels: bool = True
    """Whether the answers can be read from the output that the loss came from. Where they are generated they cannot,
    and evaluation answers the rows once more, as if they were not solved."""
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics of which less is more."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.max_length: int = recipe.max_length or self.default_max_length
        self.labels = recipe.labels
        self.kwargs = {name: default for name, (default, _) in self.settings.items()}
        for name, value in recipe.task_kwargs.items():
            if name not in self.settings:
                known = ", ".join(self.settings) or "no settings"
                raise RecipeError(f"`task_kwargs.{name}`: {recipe.task} has no such setting; it has {known}.")
            self.kwargs[name] = value
        if not tokenizer.is_fast:
            raise RecipeError(f"`model`: {recipe.model} has no fast tokenizer, which training needs.")
        special = tokenizer.num_special_tokens_to_add(pair=bool(self.optional_columns))
        if self.max_length <= special:
            raise RecipeError(f"`max_length` must be above {special}, the special tokens, got {self.max_length}.")
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise RecipeError(
                    f"`model`: the tokenizer of {recipe.model} has neither a padding nor an end-of-sequence token."
                )
            tokenizer.pad_token = tokenizer.eos_token  # GPT-like models have none; padding is masked in any case
        self.embeddings: int | None = None
        """How many tokens the model has embeddings for; set when it is loaded."""

    # The data

    @property
    def labels(self) -> list[str | int] | None:
        """What there is to choose from, in the order of the head's outputs; `None` if nothing is."""
        return self._labels

    @labels.setter
    def labels(self, labels: list[str | int] | None) -> None:
        self._labels = labels
        self._numbers = {str(label): number for number, label in enumerate(labels or ())}

    def label_number(self, label: Any) -> int | None:
        """The place among `labels` of the one that is written like `label`; `None` if there is none.

        A table of text has '1' where JSON has 1, and a model's configuration, too, has names only.
        """
        return None if isinstance(label, bool) else self._numbers.get(str(label))

    def check(self, rows: Dataset, source: str, solved: bool = True) -> None:
        """Look at every row, before anything is computed.

        Args:
            rows: the rows.
            source: what they are called in error messages.
            solved: whether the rows must hold solutions.

        Raises:
            DataError: for the first row with which something is wrong; the message names it.
        """
        for name, meaning in {**self.columns, **({self.target: "the solution"} if solved else {})}.items():
            if name not in rows.column_names:
                raise DataError(
                    f"{source} has no column {name!r} ({meaning}); it has {rows.column_names}. "
                    f"If it is called otherwise, say so: `data.columns: {{{name}: ...}}`."
                )
        for number, row in enumerate(rows, start=1):
            problem = self.problem(row, solved)
            if problem:
                raise DataError(f"{source}, row {number}: {problem}")

    def problem(self, row: Row, solved: bool) -> str | None:
        """What is wrong with a row, in words; `None` if nothing is."""
        raise NotImplementedError

    def learn_labels(self, rows: Dataset, source: str) -> None:
        """Note in `self.labels` what there is to choose from, where the recipe does not say."""

    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` of the base model is told about the head."""
        return {}

    def features(self, rows: Columns, indices: list[int], solved: bool) -> Columns:
        """Tokenize a batch of rows; `datasets.Dataset.map` calls it.

        Args:
            rows: the columns of the rows.
            indices: the rows' numbers in the data set, from 0.
            solved: whether to make labels from the solutions.

        Returns:
            The columns of the features, in the order of the rows: the model's inputs and `row`, the number of the row
            that a feature is of. A row may have several features, one after the other.
        """
        raise NotImplementedError

    def training_features(self, rows: Columns, indices: list[int], solved: bool = True) -> Columns:
        """As `features`, for rows that are only learnt from: a feature may be of several rows."""
        return self.features(rows, indices, solved)

    def check_tokens(self, features: Dataset, source: str) -> None:
        """See that the tokenizer knows the rows' words, and the model the tokenizer's tokens.

        Args:
            features: what the tokenizer made of the rows.
            source: what the rows are called in error messages.

        Raises:
            DataError: if most tokens are unknown ones, or the model has no embedding for one.
        """
        column = features.data.column("input_ids")
        while hasattr(column.type, "value_type"):  # lists, for several choices lists of lists
            column = compute.list_flatten(column)
        largest = compute.max(column).as_py()
        if self.embeddings is not None and largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{source}: the tokenizer makes token {largest} ({token!r}) of a text, and {self.recipe.model} has "
                f"embeddings for {self.embeddings:,} tokens only."
            )
        tokenizer = self.tokenizer
        unknown = tokenizer.unk_token_id
        others = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
        others = [each for each in (*others, tokenizer.pad_token_id) if each is not None]
        if unknown is None or unknown in others:  # tokenizers of bytes know every text
            return
        words = compute.sum(compute.invert(compute.is_in(column, pyarrow.array(others, column.type)))).as_py()
        share = compute.sum(compute.equal(column, unknown)).as_py() / max(words, 1)
        text = f"{source}: {share:.0%} of the tokens are unknown to the tokenizer of {self.recipe.model}"
        if share > _UNKNOWN:
            raise DataError(f"{text}. Choose a model that knows the texts' language and script.")
        if share > _UNKNOWN / 5:
            say(f"{text}: the model cannot tell them apart.")

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        """Pad features to one batch of tensors `[batch, longest]`; `labels` are padded with -100."""
        rest = [{key: value for key, value in each.items() if key in self.padded} for each in features]
        batch = dict(self.tokenizer.pad(rest, return_tensors="pt"))
        if "labels" in features[0]:
            batch["labels"] = self.collate_labels([each["labels"] for each in features], batch["input_ids"])
        return batch

    padded: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    """The features' keys that the tokenizer pads."""

    def collate_labels(self, labels: list[Any], input_ids: Tensor) -> Tensor:
        """The labels of a batch: one per row, or a list per row padded like `input_ids` with -100."""
        if not isinstance(labels[0], list):
            return torch.tensor(labels)
        result = torch.full_like(input_ids, -100)
        for row, (each, own) in enumerate(zip(result, labels, strict=True)):
            if self.tokenizer.padding_side == "left":
                result[row, each.shape[0] - len(own) :] = torch.tensor(own)
            else:
                result[row, : len(own)] = torch.tensor(own)
        return result

    # The model

    def num_items(self, labels: Any) -> int:
        """Of how many items the model's loss on one feature with these labels is the mean."""
        return sum(label != -100 for label in labels) if isinstance(labels, list) else 1

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The mean loss of a batch, and the model's output. `batch` has labels."""
        output = model(**batch)
        return output.loss, output

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        """What of the model's output is needed for the answers: a small Python value per feature.

        Args:
            model: the model, in eval mode.
            batch: the batch, perhaps without labels.
            output: what the model gave for this batch if it was already called, as for the loss.
        """
        raise NotImplementedError

    # The results

    @property
    def default_metric(self) -> str:
        """The metric that says which checkpoint is best, unless the recipe does."""
        raise NotImplementedError

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        """What a user reads: a mapping with `prediction`, and more where there is more to say.

        Args:
            row: the row.
            features: the features of the row.
            records: what `outputs` gave for each of them.
        """
        raise NotImplementedError

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """What else to report that the mean loss tells."""
        return {}

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        """Compare answers with the rows' solutions, the values of the column `target`."""
        raise NotImplementedError
