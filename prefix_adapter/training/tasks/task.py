"""The base class of the tasks: from rows to features, batches, answers and metrics."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow
import torch
from pyarrow import compute
from torch import Tensor

from ..data import DataError, columns_found
from ..recipe import RecipeError, say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

_MAX_UNKNOWN = 0.5
"""The share of unknown tokens above which training is an error. There is a warning above a fifth of it."""
Row = dict[str, Any]
"""A row of the data, or a feature (the output of the tokenizer for a row or a part of one)."""
Columns = dict[str, list[Any]]
"""Several rows or features, column by column."""


class Task:
    """A task: its columns, head, loss, predictions and metrics.

    Subclasses set the class attributes and override the methods that differ. The methods are called in this order:

    1. `check` validates the rows, `learn_labels` collects the labels of the training rows.
    2. `features` tokenizes rows, `collate` makes a batch of features, `loss` computes the loss.
    3. In evaluation `outputs` makes a record of the model's output for each feature, `answer` turns the records of one
       row into its prediction (a long context has several features), and `metrics` compares predictions and targets.

    Args:
        recipe: The recipe. Its `labels` are used if it sets them.
        tokenizer: The tokenizer of the base model; it must be a fast one.

    Raises:
        RecipeError: If `task_kwargs` has an unknown key or an invalid value, if `max_length` leaves no room for text,
            or if the tokenizer cannot be used.

    Example:
        >>> task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
        >>> features = task.features({"text": ["a text"]}, [0], with_targets=False)
    """

    auto_class: str
    """The class of transformers that loads the base model with the head of this task."""
    peft_task_type: str | None
    """PEFT's `task_type`; `None` if there is none for this task."""
    has_head: ClassVar[bool] = True
    """Whether the task has a head of its own. Generation uses the language model's."""
    modules_to_save: ClassVar[list[str] | None] = None
    """Names of the head's modules, if PEFT does not derive them from the task type."""
    trains_new_modules: ClassVar[bool] = True
    """Whether modules that the base model's checkpoint has no weights for are trained. They are an error otherwise."""
    columns: dict[str, str]
    """The columns that a row needs for a prediction, `{name: description}`."""
    target: ClassVar[str]
    """The column with the target of a row: its label, labels or target text."""
    optional_columns: ClassVar[dict[str, str]] = {}
    """Columns that are used if they exist, `{name: description}`."""
    settings: ClassVar[dict[str, tuple[Any, str]]] = {}
    """The keys of `task_kwargs`, `{name: (default, help)}`."""
    default_max_length: ClassVar[int] = 128
    answer_types: ClassVar[dict[str, str]] = {}
    """Arrow types of the parts of an answer that may be missing in many rows, `{name: type}`."""
    labels_per_token: ClassVar[bool] = False
    """Whether a feature has one label per token, -100 for tokens that are not in the loss."""
    answers_with_labels: bool = True
    """Whether the predictions can be read from the output of the forward pass that computes the loss. If they are
    generated they cannot, and evaluation runs the rows a second time, without labels."""
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics for which lower is better."""
    padded: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    """The keys of the features that the tokenizer pads."""

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
            raise RecipeError(
                f"`max_length` must be above {special}, the number of special tokens, got {self.max_length}."
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise RecipeError(
                    f"`model`: the tokenizer of {recipe.model} has neither a padding nor an end-of-sequence token."
                )
            tokenizer.pad_token = tokenizer.eos_token  # GPT-like models have no padding token; padding is masked
        self.placeholder_token_ids: list[int] = []
        """The token ids of virtual tokens in the inputs. The adapter replaces them before they are looked up."""
        self.start_token_ids: list[int | None] = []
        """The token id of the word that each of them starts from; `None` for a random start."""
        self.embeddings: int | None = None
        """The number of tokens that the model has embeddings for; set when the model is loaded."""

    def integer_setting(self, name: str, least: int = 1) -> int:
        """Return a setting that must be an integer of at least `least`.

        Raises:
            RecipeError: If it is not.
        """
        value = self.kwargs[name]
        if not isinstance(value, int) or value < least:
            raise RecipeError(f"`task_kwargs.{name}` must be an integer of at least {least}, got {value!r}.")
        return value

    # ---- The data

    @property
    def labels(self) -> list[str | int] | None:
        """The labels in the order of the head's outputs; `None` for tasks without labels."""
        return self._labels

    @labels.setter
    def labels(self, labels: list[str | int] | None) -> None:
        self._labels = labels
        self._numbers = {str(label): number for number, label in enumerate(labels or ())}

    def label_number(self, label: Any) -> int | None:
        """The index in `labels` of the label that has the same text as `label`; `None` if there is none.

        CSV has '1' where JSON has 1, and the configuration of a model has texts only.
        """
        return None if isinstance(label, bool) else self._numbers.get(str(label))

    def input_columns(self, names: Collection[str]) -> dict[str, str]:
        """The columns that a row needs for a prediction, `{name: description}`, if the data has these columns."""
        return self.columns

    def target_column(self, names: Collection[str]) -> str:
        """The column with the targets, if the data has these columns."""
        return self.target

    def column_names(self, names: Collection[str]) -> list[str]:
        """The columns that the task uses in training, if the data has these columns."""
        own = [*self.input_columns(names), *self.optional_columns, self.target_column(names)]
        return [name for name in dict.fromkeys(own) if name in names]

    def check(self, rows: Dataset, source: str, with_targets: bool = True) -> None:
        """Validate all rows, before anything is computed.

        Args:
            rows: The rows.
            source: The name of the rows in error messages.
            with_targets: Whether the rows must have targets.

        Raises:
            DataError: For a missing column or the first invalid row. The message names it.
        """
        names = rows.column_names
        target = {self.target_column(names): "the target"} if with_targets else {}
        for name, meaning in {**self.input_columns(names), **target}.items():
            if name not in names:
                raise DataError(
                    f"{source} has no column {name!r} ({meaning}); {columns_found(names)} "
                    f"If the column has another name, set `data.columns: {{{name}: ...}}`."
                )
        for number, row in enumerate(rows, start=1):
            problem = self.problem(row, with_targets)
            if problem:
                raise DataError(f"{source}, row {number}: {problem}")

    def problem(self, row: Row, with_targets: bool) -> str | None:
        """Describe what is wrong with a row; `None` if it is valid.

        Args:
            row: The row.
            with_targets: Whether the row must have a target.
        """
        raise NotImplementedError

    def learn_labels(self, rows: Dataset, source: str) -> None:
        """Set `self.labels` from the training rows if the recipe does not set them.

        Args:
            rows: The training rows.
            source: The name of the rows in error messages.

        Raises:
            DataError: If the labels leave nothing to learn, or cannot be used.
        """

    def model_kwargs(self) -> dict[str, Any]:
        """Return the arguments for `from_pretrained` of the base model that the head needs."""
        return {}

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        """Tokenize a batch of rows, for `datasets.Dataset.map`.

        Args:
            rows: The columns of the rows.
            indices: The indices of the rows in the data set.
            with_targets: Whether the rows have targets, from which `labels` are made.

        Returns:
            The columns of the features, in the order of the rows: the inputs of the model, and `row`, the index of the
            row of each feature. A row can have several features, one after the other.
        """
        raise NotImplementedError

    def training_features(self, rows: Columns, indices: list[int], with_targets: bool = True) -> Columns:
        """Tokenize rows for training only. Unlike in `features`, one feature can combine several rows."""
        return self.features(rows, indices, with_targets)

    def start_tokens(self, features: Dataset, count: int, seed: int) -> list[int]:
        """Return the token ids that a prefix can start from: the last ones of training rows drawn at random.

        Args:
            features: The features of the training rows.
            count: The number of token ids.
            seed: The seed of the draw.

        Raises:
            ValueError: If there are too few.
        """
        tokens: list[int] = []
        for index in itertools.cycle(random.Random(seed).sample(range(len(features)), len(features))):
            tokens = self.real_tokens(features[index]) + tokens
            if len(tokens) >= count:
                return tokens[-count:]
        raise AssertionError

    def real_tokens(self, feature: Row) -> list[int]:
        """Return the token ids of a feature, without virtual tokens."""
        ids: list[int] = feature["input_ids"]
        return ids

    def check_tokens(self, features: Dataset, source: str) -> None:
        """Check that the tokenizer knows the words of the rows, and that the model has an embedding for every token.

        Args:
            features: The features of the rows.
            source: The name of the rows in error messages.

        Raises:
            DataError: If most tokens are unknown, or if the model has no embedding for a token.
        """
        column = features.data.column("input_ids")
        while hasattr(column.type, "value_type"):  # a list of tokens, or a list of such lists for multiple choice
            column = compute.list_flatten(column)
        if self.placeholder_token_ids:
            placeholders = pyarrow.array(self.placeholder_token_ids, column.type)
            column = column.filter(compute.invert(compute.is_in(column, placeholders)))
        largest = compute.max(column).as_py()
        if self.embeddings is not None and largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{source}: the tokenizer makes token {largest} ({token!r}) of a text, but {self.recipe.model} has "
                f"embeddings for {self.embeddings:,} tokens only."
            )
        tokenizer = self.tokenizer
        unknown = tokenizer.unk_token_id
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
        special = [each for each in (*special, tokenizer.pad_token_id) if each is not None]
        if unknown is None or unknown in special:  # byte-level tokenizers know every text
            return
        count = compute.sum(compute.invert(compute.is_in(column, pyarrow.array(special, column.type)))).as_py()
        share = compute.sum(compute.equal(column, unknown)).as_py() / max(count, 1)
        text = f"{source}: {share:.0%} of the tokens are unknown to the tokenizer of {self.recipe.model}"
        if share > _MAX_UNKNOWN:
            raise DataError(f"{text}. Choose a model that knows the language and script of the texts.")
        if share > _MAX_UNKNOWN / 5:
            say(f"Warning: {text}. The model cannot tell them apart.")

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        """Pad features to a batch of tensors `[batch, longest]`, with `labels` if the features have labels."""
        inputs = [{key: value for key, value in each.items() if key in self.padded} for each in features]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if "labels" in features[0]:
            batch["labels"] = self.collate_labels([each["labels"] for each in features], batch["input_ids"])
        return batch

    def collate_labels(self, labels: list[Any], input_ids: Tensor) -> Tensor:
        """Make a tensor of the labels of a batch.

        Args:
            labels: The labels of each feature.
            input_ids: The padded tokens, `[batch, longest]`.

        Returns:
            `[batch, ...]`; with one label per token `[batch, longest]`, padded with -100 on the side of the padding.
        """
        if not self.labels_per_token:
            return torch.tensor(labels)
        result = torch.full_like(input_ids, -100)
        for row, own in zip(result, labels, strict=True):
            start = len(row) - len(own) if self.tokenizer.padding_side == "left" else 0
            row[start : start + len(own)] = torch.tensor(own)
        return result

    # ---- The model

    def num_items(self, labels: Any) -> int:
        """The number of items whose mean is the loss of a feature with these labels: its labelled tokens, or 1."""
        return sum(label != -100 for label in labels) if self.labels_per_token else 1

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Compute the mean loss of a batch with labels.

        Returns:
            The loss, a scalar, and the output of the model, for `outputs`.
        """
        output = model(**batch)
        return output.loss, output

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        """Make a record for each feature: the part of the model's output that `answer` needs, as a small value.

        Args:
            model: The model, in eval mode.
            batch: The batch, with or without labels.
            output: The output for this batch that `loss` returned; `None` if the model was not called yet.
        """
        raise NotImplementedError

    # ---- The results

    @property
    def default_metric(self) -> str:
        """The metric that selects the best checkpoint, if the recipe does not set one."""
        raise NotImplementedError

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        """Return the prediction for a row: a mapping with `prediction` and, for some tasks, more.

        Args:
            row: The row.
            features: The features of the row.
            records: The record of each feature, from `outputs`.
        """
        raise NotImplementedError

    def constant_answers(self, rows: Sequence[Row]) -> list[Row]:
        """Return an answer for each row as a model gives it that does not read the text: the same for all rows.

        Of all such answers it is the one that is right most often. Empty if the task has none that is clearly best.

        Args:
            rows: The rows, with targets.
        """
        return []

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """Return metrics that follow from the mean loss."""
        return {}

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        """Compare predictions with targets.

        Args:
            answers: For each row what `answer` returned.
            targets: For each row the value of its target column.
        """
        raise NotImplementedError


def text_problem(row: Row, name: str, may_be_empty: bool = False) -> str | None:
    """Describe what is wrong with a column that must hold a text; `None` if it is valid."""
    text = row[name]
    if not isinstance(text, str):
        return f"{name!r} must be a text, got {text!r}."
    return None if may_be_empty or text.strip() else f"{name!r} is empty."


def input_length(ids: list[Any]) -> int:
    """The number of tokens of a feature; of the longest of its inputs, if it has several."""
    return max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
