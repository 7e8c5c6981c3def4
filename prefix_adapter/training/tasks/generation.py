"""What the tasks share whose answers are generated."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from rouge_score.rouge_scorer import RougeScorer
from transformers import GenerationConfig

from ..recipe import RecipeError
from .task import Row, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FIXED = ("max_length", "num_return_sequences", "return_dict_in_generate")


class TextGeneration(Task):
    """A task that is answered by `generate`: greedily, unless `generation_kwargs` say otherwise.

    Raises:
        RecipeError: also if `generation_kwargs` has a key or a value that generation does not know.
    """

    has_head = False
    default_max_length = 512
    answers_with_labels = False
    rouge: ClassVar[tuple[str, ...]]
    """The kinds of ROUGE to report."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for key in self.kwargs["generation_kwargs"]:
            where = f"`task_kwargs.generation_kwargs.{key}`"
            if key in self.settings:
                raise RecipeError(f"{where} is a setting of its own: `task_kwargs.{key}`.")
            if key not in vars(GenerationConfig()) or key in _FIXED:
                raise RecipeError(f"{where}: there is no such setting of generation.")
        try:
            GenerationConfig(**self.kwargs["generation_kwargs"])
        except (ValueError, TypeError) as error:
            raise RecipeError(f"`task_kwargs.generation_kwargs`: {error}") from error

    def at_least_one(self, name: str) -> int:
        """The value of a setting that must be a positive integer.

        Raises:
            RecipeError: if it is not.
        """
        value = self.kwargs[name]
        if not isinstance(value, int) or value < 1:
            raise RecipeError(f"`task_kwargs.{name}` must be an integer of at least 1, got {value!r}.")
        return value

    def problem_of(self, row: Row, name: str) -> str | None:
        """What is wrong with a column that must hold a text."""
        if not isinstance(row[name], str):
            return f"{name!r} must be a text, it is {row[name]!r}."
        return None if row[name].strip() else f"{name!r} is empty."

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        if output is not None:  # called for the loss alone
            return [None] * len(batch["input_ids"])
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **self.generation()}
        sequences = model.generate(**batch, **{**options, **self.kwargs["generation_kwargs"]})  # type: ignore[operator]
        return self.tokenizer.batch_decode(self.generated(sequences, batch), skip_special_tokens=True)

    def generation(self) -> dict[str, Any]:
        """The task's own arguments of `generate`."""
        raise NotImplementedError

    def generated(self, sequences: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What is new in the sequences that `generate` gave for a batch."""
        return sequences

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        return {} if records[0] is None else {"prediction": records[0]}

    @property
    def default_metric(self) -> str:
        return "rougeL"

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        """Exact match (but for spaces around) and the F-measures of ROUGE (Lin 2004), means over the rows."""
        pairs = [(solution, answer["prediction"]) for solution, answer in zip(solutions, answers, strict=True)]
        scorer = RougeScorer(list(self.rouge), tokenizer=_Words())
        scores = [scorer.score(*pair) for pair in pairs]
        return {
            "exact_match": sum(solution.strip() == guess.strip() for solution, guess in pairs) / len(pairs),
            **{kind: float(sum(each[kind].fmeasure for each in scores)) / len(pairs) for kind in self.rouge},
        }


class _Words:
    """rouge_score's words, with the letters of every script: its own tokenizer drops all but a to z and digits.

    On ASCII text the two agree. A script that writes no spaces gives long words.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
