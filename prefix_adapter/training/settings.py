"""Settings that are no keys of a recipe. Nothing here imports torch: the command line lists them all in its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from .recipe import RecipeError

KINDS = ("single_label_classification", "multi_label_classification", "regression")
"""What a sequence can be classified by; transformers calls this the `problem_type`."""

_GENERATION_KWARGS: dict[str, tuple[Any, str]] = {
    "generation_kwargs": ({}, "Further settings of transformers' GenerationConfig (`no_repeat_ngram_size`, ...)."),
}
TASK_SETTINGS: dict[str, dict[str, tuple[Any, str]]] = {
    "sequence-classification": {
        "problem_type": (None, f"One of {', '.join(KINDS)}; the labels tell if it is not given."),
        "threshold": (0.5, "Probability from which on a label is predicted, of several."),
    },
    "token-classification": {
        "stride": (32, "Pieces that two windows of a long sentence share, half of a window at most."),
    },
    "question-answering": {
        "stride": (128, "Tokens of the context that two windows share, at most half of what one holds."),
        "max_question_length": (64, "Tokens of a question that are read, at most half of `max_length`."),
        "max_answer_length": (30, "Tokens of an answer at most."),
        "n_best": (20, "Passages that the score of an answer, a probability, is spread over."),
        "null_score_threshold": (
            None,
            "By how much the score of no answer must be above that of the best passage; 0 if not given and some "
            "training rows have no answer. Higher means more answers.",
        ),
    },
    "multiple-choice": {},
    "causal-lm": {
        "packing": (False, "Join texts without prompts and train on blocks of `max_length` tokens."),
        "generate": (False, "Evaluate by what is generated after the prompts too: exact_match and rougeL."),
        **_GENERATION_KWARGS,
        "max_new_tokens": (None, "Tokens to generate at most; by default 64, or half of `max_length` if less."),
    },
    "seq2seq-lm": {
        "max_target_length": (128, "Tokens of a target at most."),
        "num_beams": (1, "Beams of the search; 1 is greedy."),
        **_GENERATION_KWARGS,
        "max_new_tokens": (None, "Tokens to generate at most; by default `max_target_length`."),
    },
}
"""For each task what `task_kwargs` may say: `{name: (default, help)}`."""


@dataclass
class Search:
    """The settings of a search.

    Args:
        space: The keys of the recipe that are varied, dotted where nested, and how: a list of choices, or a mapping
            with `low` and `high` (whole numbers are drawn if both are whole, unless `type: float`) and perhaps
            `log: true` or `step`. `when: {<another key>: <one of its choices>}` in a mapping limits it to trials with
            that value (a list then goes under `choices`), and a list of such mappings gives one key several ranges;
            where none applies the key has its default, whatever the recipe says. By default table or MLP, each with
            its range of learning rates, and length and dropout of the prefix, but for the keys in `fixed`.
        n_trials: Trials that are finished in the end, earlier ones of a resumed search included. A pruned trial
            counts, and one that diverged; one that was cut off is done again and does not.
        timeout: Begin no further trial after so many seconds.
        sampler: What chooses the values: tpe (Optuna's default, which learns from the trials before), random, or grid
            (all combinations in random order, n_trials at most).
        pruner: What ends poor trials early: median (worse than half of the others after as many evaluations),
            hyperband, or none.
        seed: Of the sampler. With it a search in one process can be repeated.
        storage: Optuna's storage, as a URL that SQLAlchemy knows; `study.db` in the output folder by default. A study
            belongs to one search at a time.
        study_name: The name of the study in the storage.
        n_jobs: Processes that train at the same time; they share out the GPUs, or the threads of the CPU.
        keep_trials: Whether the trials' folders stay.
        fixed: Keys of the recipe that stay as the recipe says. Options of the command line are among them.

    Raises:
        RecipeError: if a value is impossible.
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
