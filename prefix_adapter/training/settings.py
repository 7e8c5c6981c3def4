"""Settings outside of a recipe's keys. This file does not import torch, so that the command line help is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from .recipe import RecipeError

KINDS = ("single_label_classification", "multi_label_classification", "regression")
"""The kinds of sequence classification; transformers calls them `problem_type`."""
LANGUAGE_MODELS = ("masked", "causal", "seq2seq")
"""The kinds of language models of a task with a template."""

_GENERATION_KWARGS: dict[str, tuple[Any, str]] = {
    "generation_kwargs": ({}, "Further settings of transformers' GenerationConfig (`no_repeat_ngram_size`, ...)."),
}
_CLASS_WEIGHTS: dict[str, tuple[Any, str]] = {
    "class_weights": (
        None,
        "Weights of the labels in the training loss: `balanced` (inverse to their number in the training rows), or "
        "`{label: weight}`.",
    ),
}
_TEXT_AFTER_PROMPT: dict[str, tuple[Any, str]] = {
    **_GENERATION_KWARGS,
    "max_new_tokens": (None, "Maximum tokens to generate; by default 64, or half of `max_length` if less."),
}
TASK_SETTINGS: dict[str, dict[str, tuple[Any, str]]] = {
    "sequence-classification": {
        "problem_type": (None, f"One of {', '.join(KINDS)}; by default inferred from the labels."),
        "threshold": (0.5, "Minimum probability of a predicted label, if a row may have several labels."),
        **_CLASS_WEIGHTS,
    },
    "token-classification": {
        "stride": (32, "Tokens that two windows of a long sentence share; at most half of a window."),
        **_CLASS_WEIGHTS,
    },
    "question-answering": {
        "stride": (128, "Context tokens that two windows share; at most half of the context tokens of a window."),
        "max_question_length": (64, "Maximum tokens of a question, which is truncated; at most half of `max_length`."),
        "max_answer_length": (30, "Maximum tokens of an answer."),
        "n_best": (20, "Candidate passages among which the score of an answer is a probability."),
        "null_score_threshold": (
            None,
            "Predict no answer if its score is higher than that of the best passage by more than this; higher means "
            "more answers. By default 0 if some training rows have no answer.",
        ),
    },
    "multiple-choice": {},
    "causal-lm": {
        "packing": (False, "Join texts without prompts and train on blocks of `max_length` tokens."),
        "generate": (False, "Also evaluate the text generated after the prompts: exact_match and rougeL."),
        **_TEXT_AFTER_PROMPT,
    },
    "chat": {
        "generate": (False, "Also evaluate the generated last answers: exact_match and rougeL."),
        **_TEXT_AFTER_PROMPT,
    },
    "distil": {
        "generate": (False, "Also evaluate the text generated after the prompts: exact_match and rougeL."),
        **_TEXT_AFTER_PROMPT,
    },
    "seq2seq-lm": {
        "max_target_length": (128, "Maximum tokens of a target."),
        "num_beams": (1, "Beams of beam search; 1 is greedy search."),
        **_GENERATION_KWARGS,
        "max_new_tokens": (None, "Maximum tokens to generate; by default `max_target_length`."),
    },
    "cloze": {
        "template": (None, "The text of a row, with columns in braces: `{premise} Question: {hypothesis}? {mask}.`"),
        "verbalizer": (
            None,
            "The word of each label, or a list of words: `{entailment: 'Yes', contradiction: 'No'}`; by default the "
            "names of the labels.",
        ),
        "language_model": (None, f"One of {', '.join(LANGUAGE_MODELS)}; by default inferred from the base model."),
        "score": ("sum", "Score of a word of several tokens: the sum or the mean of their log-probabilities."),
        **_CLASS_WEIGHTS,
    },
    "fill-mask": {
        "template": (None, "The text of a row, with columns in braces: `{subject} was born in {mask}.`"),
        "language_model": (None, "One of masked, causal; by default inferred from the base model."),
    },
}
"""The `task_kwargs` of each task: `{name: (default, help)}`."""


@dataclass
class Search:
    """The settings of a hyper-parameter search.

    Args:
        space: The keys of the recipe to vary (dotted if nested), each with a list of choices, or with a mapping that
            has `low` and `high` and optionally `log: true` or `step`. Integers are drawn if both bounds are integers,
            unless `type: float`. `when: {<another key>: <one of its choices>}` in a mapping limits the key to trials
            with that value (a list of choices then goes under `choices`). A list of such mappings gives one key
            several ranges. In a trial to which none of them applies the key has its default, not the recipe's value.
            By default the search varies table or MLP, each with its range of learning rates, and the length of the
            prefix, except for the keys in `fixed`.
        n_trials: Finished trials at the end, including earlier trials of a resumed search. A pruned trial counts, and
            so does one that diverged. An interrupted trial is repeated and does not count.
        timeout: Start no further trial after this many seconds.
        sampler: The method that chooses the values: tpe (Optuna's default, which learns from earlier trials), random,
            or grid (all combinations in random order, at most n_trials).
        pruner: The method that stops poor trials early: median (worse than half of the others after as many
            evaluations), hyperband, or none.
        seed: The seed of the sampler. A search in one process can be repeated with it.
        storage: Optuna's storage, as a URL for SQLAlchemy; by default `study.db` in the output folder. Only one search
            may use a study at a time.
        study_name: The name of the study in the storage.
        n_jobs: Processes that train at the same time; they share the GPUs, or the threads of the CPU.
        keep_trials: Whether to keep the trials' folders.
        fixed: Keys of the recipe that keep the recipe's value. Options on the command line are added to them.

    Raises:
        RecipeError: if a value is invalid.
    """

    space: Optional[dict[str, Any]] = None
    n_trials: int = 30
    timeout: Optional[float] = None
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    seed: int = 0
    storage: Optional[str] = None
    study_name: str = "prefix-adapter"
    n_jobs: int = 1
    keep_trials: bool = True
    fixed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("n_trials", "n_jobs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.timeout is not None and not self.timeout > 0:
            raise RecipeError(f"`timeout` must be above 0, got {self.timeout}.")
        for name, known in (("sampler", ("tpe", "random", "grid")), ("pruner", ("median", "hyperband", "none"))):
            if getattr(self, name) not in known:
                raise RecipeError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}.")


@dataclass
class SelfStudy:
    """How questions and answers are made.

    Args:
        questions: Number of rows.
        question_tokens: Maximum tokens of a question.
        answer_tokens: Maximum tokens of an answer.
        temperature: Temperature of the sampling.
        batch_size: Rows that are made at the same time.
        seed: The seed of the passages, the requests and the sampling.

    Raises:
        RecipeError: If a value is invalid.
    """

    questions: int = 500
    question_tokens: int = 48
    answer_tokens: int = 96
    temperature: float = 0.7
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "question_tokens", "answer_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"`study.{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.temperature > 0:
            raise RecipeError(f"`study.temperature` must be above 0, got {self.temperature}.")
