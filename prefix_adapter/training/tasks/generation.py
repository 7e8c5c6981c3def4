"""The base class of the tasks whose predictions are generated texts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import GenerationConfig

from ..recipe import RecipeError
from .task import Row, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FIXED_KWARGS = ("max_length", "num_return_sequences", "return_dict_in_generate")
"""Arguments of `generate` that a recipe cannot set."""


class TextGeneration(Task):
    """A task whose predictions come from `generate`: greedy search, unless `generation_kwargs` sets another method.

    Raises:
        RecipeError: As for `Task`, and if `generation_kwargs` has a key or a value that transformers does not know.
    """

    has_head = False
    default_max_length = 512
    answers_with_labels = False
    labels_per_token = True
    rouge: ClassVar[tuple[str, ...]]
    """The variants of ROUGE to report."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for key in self.kwargs["generation_kwargs"]:
            where = f"`task_kwargs.generation_kwargs.{key}`"
            if key in self.settings:
                raise RecipeError(f"{where} is a setting of the task; set `task_kwargs.{key}` instead.")
            if key in _FIXED_KWARGS:
                raise RecipeError(f"{where} cannot be set: its value is fixed.")
            if key not in vars(GenerationConfig()):
                raise RecipeError(f"{where}: transformers' GenerationConfig has no such setting.")
        try:
            GenerationConfig(**self.kwargs["generation_kwargs"])
        except (ValueError, TypeError) as error:
            raise RecipeError(f"`task_kwargs.generation_kwargs`: {error}") from error

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        if output is not None:  # the output that computed the loss has no generated text
            return [None] * len(batch["input_ids"])
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **self.generate_kwargs()}
        sequences = model.generate(**batch, **{**options, **self.kwargs["generation_kwargs"]})  # type: ignore[operator]
        return self.tokenizer.batch_decode(self.generated_tokens(sequences, batch), skip_special_tokens=True)

    def generate_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `generate` that the settings of the task determine."""
        raise NotImplementedError

    def generated_tokens(self, sequences: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return the new tokens in the output of `generate`, `[batch, tokens]`."""
        return sequences

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        return {} if records[0] is None else {"prediction": records[0]}

    @property
    def default_metric(self) -> str:
        return "rougeL"

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        """Exact match (spaces around the texts ignored) and F-measures of ROUGE (Lin 2004), as means over the rows."""
        from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, which takes two seconds

        pairs = [(target, answer["prediction"]) for target, answer in zip(targets, answers, strict=True)]
        scorer = RougeScorer(list(self.rouge), tokenizer=_Words())
        scores = [scorer.score(*pair) for pair in pairs]
        return {
            "exact_match": sum(target.strip() == guess.strip() for target, guess in pairs) / len(pairs),
            **{kind: float(sum(each[kind].fmeasure for each in scores)) / len(pairs) for kind in self.rouge},
        }


class _Words:
    """A tokenizer for rouge_score that keeps the letters of every script; the default keeps only a to z and digits.

    Both give the same words for ASCII text. In a script without spaces a word is as long as the text between
    punctuation.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
