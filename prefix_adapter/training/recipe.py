"""The recipe: all settings of a training run, read from YAML, from the command line or from Python."""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field
from importlib import resources
from inspect import formatannotation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from ..messages import did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "causal-lm",
    "chat",
    "seq2seq-lm",
    "cloze",
    "distil",
    "fill-mask",
)
STREAMING_TASKS = ("causal-lm", "chat", "seq2seq-lm")
"""The tasks whose training rows may be a stream: they learn nothing from the rows before training."""
TEMPLATE_TASKS = ("cloze", "fill-mask")
"""The tasks whose rows become texts by a template, which may have virtual tokens."""
NO_ADAPTER = ("FULL", "HEAD", "NONE")
"""Values of `adapter.peft_type` that are no PEFT methods: full fine-tuning, the task head alone, or no training."""
_KERNEL_KWARGS = ("allow_all_kernels", "use_kernels", "kernel_config")
"""Arguments of `from_pretrained` that make transformers download and run kernels."""
_HOW_TO_TRUST = (
    "If you trust the code of the base model's repository, set --trust_remote_code, or in Python "
    "`trust_remote_code=True`."
)


class RecipeError(ValueError):
    """A recipe is invalid or cannot be run. The message names the key."""


_MIXTURE_KEYS = ("train", "path", "name", "revision", "columns", "weight")


@dataclass
class Data:
    """The source of the rows: a data set of the Hub, a folder, or files.

    Args:
        path: A data set of the Hub, or a folder that `datasets.load_dataset` reads. Without it `train`, `validation`
            and `test` are files: .jsonl, .json, .csv, .tsv or .parquet (all but .parquet also as .gz).
        name: The configuration of a data set of the Hub.
        revision: The revision of a data set of the Hub: a branch, tag or commit.
        train: The split or file to train on.
        validation: The split or file that selects the best checkpoint. Without it `validation_fraction` of the
            training rows are held out.
        test: The split or file on which the finished adapter is evaluated, once.
        validation_fraction: Share of the training rows to hold out if there is no `validation`; between 0 and 1.
        columns: The names of the task's columns in the data, `{name of the task: name in the data}`, for instance
            `{text: premise}`.
        max_train_rows: Maximum number of training rows. They are drawn at random with the recipe's `seed`.
        max_validation_rows: Maximum number of validation rows, drawn like the training rows.
        max_test_rows: Maximum number of test rows, drawn like the training rows.
        num_proc: Number of processes for tokenization.
        mixture: Several sources of training rows in the place of `train`. Each is a mapping with `train`, and
            optionally `path`, `name`, `revision`, `columns` and `weight`; all but `weight` mean the same as here. With
            weights, rows are drawn at random from the sources, in proportion to the weights; without, all rows of all
            sources are used once. `path`, `name` and `revision` beside it are those of `validation` and `test`.
        stopping_strategy: When an epoch of a mixture with weights ends, as in `datasets.interleave_datasets`:
            first_exhausted, when all rows of one source are used, or all_exhausted, when all rows of all sources are.
            Until then the smaller sources are repeated.
        streaming: Read the training rows while training, and never all of them. Needs `max_steps`, and `validation` or
            `max_validation_rows`: without `validation` that many rows at the beginning are held out. Only for
            causal-lm, chat and seq2seq-lm.
        shuffle_buffer: Number of rows that are read at once from a stream, and whose order is random.

    Raises:
        RecipeError: If a value has the wrong type or is out of range.

    Example:
        >>> Data(path="rajpurkar/squad", train="train", validation="validation")
        >>> Data(train="train.jsonl", columns={"text": "review", "label": "stars"})
    """

    path: Optional[str] = None
    name: Optional[str] = None
    revision: Optional[str] = None
    train: str = "train"
    validation: Optional[str] = None
    test: Optional[str] = None
    validation_fraction: float = 0.1
    columns: dict[str, str] = field(default_factory=dict)
    max_train_rows: Optional[int] = None
    max_validation_rows: Optional[int] = None
    max_test_rows: Optional[int] = None
    num_proc: Optional[int] = None
    mixture: Optional[list[dict[str, Any]]] = None
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        _check_range("data.shuffle_buffer", self.shuffle_buffer, least=1)
        self._check_mixture()
        if self.streaming:
            self._check_streaming()
        for name in ("max_train_rows", "max_validation_rows", "max_test_rows", "num_proc"):
            _check_range(f"data.{name}", getattr(self, name), least=1)
        _check_range("data.validation_fraction", self.validation_fraction, above=0, below=1)

    @property
    def sources(self) -> list[Data]:
        """The sources of the training rows: those of `mixture`, or this one."""
        if self.mixture is None:
            return [self]
        own = [{key: value for key, value in each.items() if key != "weight"} for each in self.mixture]
        return [Data(**{"columns": self.columns, "streaming": False, **each}) for each in own]

    @property
    def weights(self) -> list[float] | None:
        """The shares of the sources, which sum to 1; `None` if the mixture has no weights."""
        weights = [each["weight"] for each in self.mixture or () if "weight" in each]
        return [weight / sum(weights) for weight in weights] or None

    def source_of(self, split: str) -> str:
        """The name of the rows of `train`, `validation` or `test` in messages: a file, or a data set and its split."""
        if split == "train" and self.mixture is not None:
            return "data.mixture"
        if self.path is None:
            return getattr(self, split)
        name = f" ({self.name})" if self.name else ""
        return f"{self.path}{name}, split {getattr(self, split)}"

    def _check_mixture(self) -> None:
        if self.mixture is None:
            return
        if self.train != "train":
            raise RecipeError("`data.train` and `data.mixture` are both set; set only one of them.")
        if len(self.mixture) < 2:
            raise RecipeError("`data.mixture` must have at least two sources.")
        for number, each in enumerate(self.mixture):
            key = f"data.mixture[{number}]"
            for name in each:
                if name not in _MIXTURE_KEYS:
                    known = ", ".join(_MIXTURE_KEYS)
                    hint = did_you_mean(name, _MIXTURE_KEYS)
                    raise RecipeError(f"`{key}.{name}`: there is no such key; there are {known}.{hint}")
            if "train" not in each:
                raise RecipeError(f"`{key}.train`: there must be a file, or a split of `{key}.path`.")
            weight = each.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise RecipeError(f"`{key}.weight` must be a number above 0, got {weight!r}.")
        count = sum("weight" in each for each in self.mixture)
        if 0 < count < len(self.mixture):
            raise RecipeError("`data.mixture`: either all sources have a `weight`, or none.")
        if count and self.validation is None and not self.streaming:
            raise RecipeError(
                "`data.validation` must be set with the weights of `data.mixture`: a row that is repeated could be "
                "held out and trained on."
            )
        try:
            _ = self.sources
        except RecipeError as error:
            raise RecipeError(f"`data.mixture`: in a source, {error}") from error

    def _check_streaming(self) -> None:
        if self.max_train_rows is not None:
            raise RecipeError("`data.max_train_rows` cannot be drawn from a stream; `max_steps` limits the training.")
        if self.validation is None and self.max_validation_rows is None:
            raise RecipeError(
                "`data.streaming`: set `data.validation`, or `data.max_validation_rows` to hold out that many rows at "
                "the beginning of the stream."
            )
        if self.mixture is not None and self.weights is None:
            raise RecipeError("`data.streaming`: the sources of `data.mixture` need weights.")


@dataclass
class Recipe:
    """All settings of a training run. Keys have the names of transformers' `TrainingArguments` where there is one.

    Args:
        task: The task. Each task has its own columns, head, loss and metrics.
        model: The base model: a name on the Hub or a folder.
        output_dir: The folder for the adapter, its model card, curve, metrics and checkpoints.
        data: The source of the rows.
        adapter: A PEFT configuration as a mapping. The default `peft_type` is PREFIX_TUNING_V2. The other keys are
            fields of the configuration (`num_virtual_tokens`, `prefix_projection`, ...) and have its defaults, except
            that a table next to a new task head starts at `init_std: 0.5`. For comparison, `peft_type` can be any
            other PEFT method, FULL (full fine-tuning) or HEAD (the task head alone). With NONE the run trains nothing
            and only evaluates the base model, in a task without a new head.
        second_adapter: A second PEFT configuration, trained and saved beside `adapter`, for cloze and fill-mask. Its
            `peft_type` is PTUNING_V1: the virtual tokens of the template (`{p}`). `adapter` is then a prefix, LoRA or
            another PEFT method without virtual tokens of its own, or FULL.
        init_from: A saved adapter (folder or name on the Hub). The prefix starts as a copy of its prefix, so `adapter`
            must set the same `num_virtual_tokens` and other settings of its shape. The task head starts from random
            weights.
        init_text: A text, for causal-lm, chat and distil only. The prefix starts as the keys and values of its tokens,
            so `num_virtual_tokens` is their number and can be left out. If it is smaller, its first tokens count.
        init_rows: Whether the prefix starts as the keys and values of the last tokens of some training rows. Default:
            true for a table on a decoder that can start from a text, unless `init_from` or `init_text` is set.
        model_kwargs: Arguments for `from_pretrained` of the base model (`dtype`, `attn_implementation`, `revision`,
            `hidden_dropout_prob` of a BERT, ...).
        load_in_4bit: Load the frozen base model with its linear layers in 4 bits (bitsandbytes: NF4, double
            quantization). Its head, and the weights that are trained, are not quantized. `evaluate` and `predict` load
            it in the same way.
        backbone_dropout: Whether the dropout of a frozen base model is active in training. It is off by default: the
            base model does not learn, and its noise slows the prefix down. With FULL, and in the task head, dropout
            is always as the base model's config sets it.
        task_kwargs: Settings of the task. `prefix-adapter train --help` lists them.
        max_length: Maximum number of tokens of an input. The default depends on the task.
        batch_size: Rows per optimizer step, summed over all processes and accumulation steps. So a recipe means the
            same on one GPU and on eight.
        gradient_accumulation_steps: Number of parts in which each process computes its share of a batch.
        eval_batch_size: Rows per forward pass and process in evaluation.
        num_train_epochs: Number of passes over the training rows. A stream needs `max_steps` instead.
        max_steps: Maximum number of optimizer steps; takes precedence over `num_train_epochs`.
        group_by_length: Batch rows of similar length, to save padding.
        learning_rate: Learning rate of the adapter. Default: 3e-2 for a table (1e-1 with up to 40 tokens for
            tags, and on a decoder that learns to write: causal-lm, chat, distil; 1e-2 on a decoder with a new task
            head), 1e-3 for an MLP, 2e-3 for LoRA, 3e-5 for FULL, 1e-2 for other PEFT methods.
        head_learning_rate: Learning rate of the task head. Default: 2e-2; on a decoder 3 divided by the size of the
            head's inputs, if that is less; with FULL, `learning_rate`.
        second_learning_rate: Learning rate of `second_adapter`. Default: that of `adapter`; beside FULL, 1e-3.
        weight_decay: Weight decay of AdamW, for adapter and head.
        max_grad_norm: Maximum norm of the gradients, which are clipped to it; 0 for no clipping.
        lr_scheduler_type: A name that `transformers.get_scheduler` knows, or `exponential`, which multiplies the
            learning rates after every epoch by `gamma` in `lr_scheduler_kwargs`.
        lr_scheduler_kwargs: Further arguments of the scheduler.
        warmup_ratio: Share of the steps in which the learning rates rise from 0; from 0 to 1.
        seed: Seed of the initial weights, the order of the rows and dropout.
        mixed_precision: Accelerate's `mixed_precision`: no, fp16 or bf16. Default: the setting of `accelerate launch`.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        eval_steps: Evaluate and write a checkpoint every `eval_steps` steps. Default: after every epoch; after a tenth
            of the steps if the training rows are a stream.
        save_steps: Write an additional checkpoint every `save_steps` steps.
        logging_steps: Record the loss every `logging_steps` steps.
        metric_for_best_model: The metric on the validation rows that selects the best checkpoint, or `loss` for the
            lowest loss. The default depends on the task.
        early_stopping_patience: Stop after this many evaluations without an improvement.
        report_to: Trackers of Accelerate, for instance `[tensorboard]`. They write to `output_dir/logs`.
        labels: The labels, in the order of the head's outputs. Default: the labels in the training rows.
        trust_remote_code: Run Python code from the base model's repository. No file can set this: it is an option of
            the command line and an argument in Python, and it is not saved with the recipe.

    Raises:
        RecipeError: If a value has the wrong type or is out of range, or if two values contradict each other.

    Example:
        >>> recipe = Recipe(
        ...     task="sequence-classification",
        ...     model="bert-base-cased",
        ...     output_dir="runs/topics",
        ...     data=Data(train="train.jsonl", validation="dev.jsonl"),
        ...     adapter={"num_virtual_tokens": 20},
        ... )
        >>> results = train(recipe)
    """

    task: Literal[TASKS]  # type: ignore[valid-type]
    model: str
    output_dir: str
    data: Data = field(default_factory=Data)
    adapter: dict[str, Any] = field(default_factory=dict)
    second_adapter: dict[str, Any] = field(default_factory=dict)
    init_from: Optional[str] = None
    init_text: Optional[str] = None
    init_rows: Optional[bool] = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    load_in_4bit: bool = False
    backbone_dropout: bool = False
    task_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: Optional[int] = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 32
    num_train_epochs: float = 10
    max_steps: Optional[int] = None
    group_by_length: bool = False
    learning_rate: Optional[float] = None
    head_learning_rate: Optional[float] = None
    second_learning_rate: Optional[float] = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_ratio: float = 0.06
    seed: int = 42
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    gradient_checkpointing: bool = False
    eval_steps: Optional[int] = None
    save_steps: Optional[int] = None
    logging_steps: int = 10
    metric_for_best_model: Optional[str] = None
    early_stopping_patience: Optional[int] = None
    report_to: list[str] = field(default_factory=list)
    labels: Optional[list[Union[str, int]]] = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        self._check_remote_code()
        self.adapter = self._with_method("adapter", "PREFIX_TUNING_V2")
        self._check_second_adapter()
        self._check_initial_prefix()
        self._check_dropout()
        if self.load_in_4bit and self.adapter["peft_type"] == "FULL":
            raise RecipeError("`load_in_4bit`: weights in 4 bits cannot be trained, and FULL trains them all.")
        if self.load_in_4bit and "quantization_config" in self.model_kwargs:
            raise RecipeError(
                "`load_in_4bit` and `model_kwargs.quantization_config` are both set; set only one of them."
            )
        for name in ("learning_rate", "head_learning_rate", "second_learning_rate", "num_train_epochs"):
            _check_range(name, getattr(self, name), above=0)
        counts = ("batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_length", "max_steps")
        for name in (*counts, "eval_steps", "save_steps", "logging_steps", "early_stopping_patience"):
            _check_range(name, getattr(self, name), least=1)
        for name in ("weight_decay", "max_grad_norm", "warmup_ratio", "seed"):
            _check_range(name, getattr(self, name), least=0)
        _check_range("warmup_ratio", self.warmup_ratio, most=1)
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), 1):
            raise RecipeError(f"`labels` must be different from each other, got {self.labels}.")
        if len({type(label) for label in self.labels or []}) > 1:
            raise RecipeError(f"`labels` must be all strings or all integers, got {self.labels}.")

    def _with_method(self, key: str, default: str) -> dict[str, Any]:
        """The configuration under `key`, with the name of its method in capitals."""
        own: dict[str, Any] = getattr(self, key)
        kind = own.get("peft_type", default)
        if not isinstance(kind, str):
            raise RecipeError(f"`{key}.peft_type` must be the name of a method, got {kind!r}.")
        return {**own, "peft_type": kind.upper()}

    def _check_second_adapter(self) -> None:
        """Check `second_adapter`, and whether it can stand beside `adapter`."""
        if not self.second_adapter:
            if self.second_learning_rate is not None:
                raise RecipeError("`second_learning_rate` is the rate of `second_adapter`, and there is none.")
            return
        self.second_adapter = self._with_method("second_adapter", "PTUNING_V1")
        first, second = self.adapter["peft_type"], self.second_adapter["peft_type"]
        if second != "PTUNING_V1":
            raise RecipeError(
                f"`second_adapter.peft_type` must be PTUNING_V1, got {second!r}. Any other method can be `adapter`."
            )
        if self.task not in TEMPLATE_TASKS:
            raise RecipeError(
                "`second_adapter` trains the virtual tokens of a template, so it is for "
                f"{' and '.join(TEMPLATE_TASKS)}, not for {self.task}. Leave it out."
            )
        if first == "PTUNING_V1":
            raise RecipeError(
                "`second_adapter`: `adapter.peft_type` is PTUNING_V1 too. Leave `second_adapter` out, or set another "
                "`adapter`: a prefix or LoRA."
            )
        if self.second_adapter.get("modules_to_save"):
            raise RecipeError(
                "`second_adapter.modules_to_save`: set `adapter.modules_to_save`; FULL trains all modules without it."
            )
        if first in ("HEAD", "NONE"):
            raise RecipeError(
                f"`second_adapter` stands beside a first one, or beside FULL, and `adapter.peft_type` is {first}. For "
                "virtual tokens alone set `adapter: {peft_type: PTUNING_V1}`."
            )

    def _check_initial_prefix(self) -> None:
        """Check `init_from`, `init_text` and `init_rows`."""
        given = [name for name in ("init_from", "init_text") if getattr(self, name) is not None]
        for name in given:
            if not getattr(self, name).strip():
                raise RecipeError(f"`{name}` is empty; leave it out for a random start.")
        if self.init_rows:
            given.append("init_rows")
        kind = self.adapter["peft_type"]
        if given and kind != "PREFIX_TUNING_V2":
            words = ' Virtual tokens start from words with `{p:"words"}` in the template.' * (kind == "PTUNING_V1")
            raise RecipeError(f"`{given[0]}` is for PREFIX_TUNING_V2, not for {kind}. Leave it out.{words}")
        if len(given) > 1:
            raise RecipeError(f"`{given[0]}` and `{given[1]}` are both set; set only one of them.")
        if self.init_text is not None and self.task not in ("causal-lm", "chat", "distil"):
            raise RecipeError(f"`init_text` is for causal-lm, chat and distil, not for {self.task}.")
        if self.init_text is not None and self.adapter.get("entry_point", "cache") != "cache":
            raise RecipeError("`adapter.entry_point`: a prefix starts from `init_text` through the cache only.")
        if self.init_text is not None and self.adapter.get("prefix_projection"):
            raise RecipeError(
                "`adapter.prefix_projection`: an MLP cannot start from `init_text`. Leave it out to train a table."
            )

    def _check_dropout(self) -> None:
        """Check that a dropout probability of the base model is used."""
        if self.adapter["peft_type"] == "FULL" or self.backbone_dropout:
            return
        for name, value in self.model_kwargs.items():
            if "drop" in name and not name.startswith("classif") and value:
                raise RecipeError(
                    f"`model_kwargs.{name}`: the dropout of a frozen base model is off in training. Set "
                    "`backbone_dropout: true` to use it."
                )

    def _check_remote_code(self) -> None:
        """Reject settings that make transformers run code from a repository, unless the caller trusts it."""
        if "trust_remote_code" in self.model_kwargs:
            raise RecipeError(f"`model_kwargs.trust_remote_code` is not allowed. {_HOW_TO_TRUST}")
        for name, value in self.model_kwargs.items():
            is_repository = name == "attn_implementation" and "/" in str(value)
            if (is_repository or name in _KERNEL_KWARGS) and not self.trust_remote_code:
                raise RecipeError(f"`model_kwargs.{name}`: {value!r} runs code from a repository. {_HOW_TO_TRUST}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Create a recipe from plain values, as `to_dict` returns them.

        Raises:
            RecipeError: If a key is unknown or missing, or has an invalid value.
        """
        _check_keys(values)
        needed = [each.name for each in dataclasses.fields(cls) if each.default is each.default_factory is MISSING]
        if missing := [f"`{name}`" for name in needed if name not in values]:
            raise RecipeError(f"There must be a value for {', '.join(missing)}.")
        return cls(**{**values, "data": Data(**values.get("data", {}))})

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, for YAML or JSON."""
        return dataclasses.asdict(self)

    def with_values(self, values: dict[str, Any], without: Iterable[str] = ()) -> Recipe:
        """Return a copy with other values.

        Args:
            values: The new values, with dots for nested keys: `{"adapter.num_virtual_tokens": 8}`.
            without: Keys that are reset to their defaults first.

        Raises:
            RecipeError: If a key is unknown, or has an invalid value.
        """
        return Recipe.from_dict(_set_nested(self.to_dict(), values, without))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        write_values(self.to_dict(), path)


def check_streaming(recipe: Recipe) -> None:
    """Check that a run whose training rows are a stream needs nothing that only all rows tell.

    Raises:
        RecipeError: If it does; the message names the key.
    """
    if not recipe.data.streaming:
        return
    if recipe.task not in STREAMING_TASKS:
        raise RecipeError(
            f"`data.streaming` is for {', '.join(STREAMING_TASKS)}. {recipe.task} needs all training rows for its "
            "labels."
        )
    if recipe.max_steps is None:
        raise RecipeError("`max_steps` must be set with `data.streaming`: the length of an epoch is not known.")
    if recipe.group_by_length:
        raise RecipeError("`group_by_length` needs the lengths of all rows, which `data.streaming` does not know.")
    if recipe.lr_scheduler_type == "exponential":
        raise RecipeError(
            "`lr_scheduler_type`: exponential needs the length of an epoch, which `data.streaming` does not know."
        )


def write_values(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the values of a recipe as YAML."""
    Path(path).write_text(values_as_yaml(values), encoding="utf-8")


def values_as_yaml(values: dict[str, Any]) -> str:
    """The values of a recipe as YAML. `trust_remote_code` is written as false, since no file can set it."""
    return yaml.dump({**values, "trust_remote_code": False}, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)


def say(text: str) -> None:
    """Print a line to standard error, only in the first of the processes that a launcher started."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


def _set_nested(contents: dict[str, Any], values: dict[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Remove the keys `without` from `contents`, then set `values`; keys have dots for nested mappings."""

    def parent_of(key: str) -> dict[str, Any]:
        mapping = contents
        for name in key.split(".")[:-1]:
            mapping = mapping.setdefault(name, {})
            if not isinstance(mapping, dict):
                raise RecipeError(f"`{key}`: `{name}` must be a mapping, got {mapping!r}.")
        return mapping

    for key in without:
        parent_of(key).pop(key.rpartition(".")[2], None)
    for key, value in values.items():
        parent_of(key)[key.rpartition(".")[2]] = dataclasses.asdict(value) if isinstance(value, Data) else value
    return contents


def _check_types(owner: Data | Recipe, prefix: str = "") -> None:
    """Check each field against its type hint, and convert paths to strings.

    Raises:
        RecipeError: If a value has another type, or is not finite.
    """
    for name, hint in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
            setattr(owner, name, value)
        number = type(value) is int and float in (hint, *get_args(hint))
        try:
            type_validator(name, float(value) if number else value, hint)
        except TypeError as error:
            # YAML reads no as false, a common mistake: `labels: [no, yes]`, `mixed_precision: no`.
            quotes = " (YAML reads no, yes, off and on as truth values: put them in quotes)"
            quotes = quotes if re.search("True|False", repr(value)) else ""
            raise RecipeError(f"`{prefix}{name}` must be {formatannotation(hint)}, got {value!r}{quotes}.") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"`{prefix}{name}` must be a finite number, got {value}.")


def _check_keys(values: dict[str, Any]) -> None:
    """Raise a RecipeError if a key of a recipe, or of its `data`, is unknown."""
    data = values.get("data", {})
    if not isinstance(data, dict):
        raise RecipeError(f"`data` must be a mapping, got {data!r}.")
    for prefix, given, kind in (("", values, Recipe), ("data.", data, Data)):
        known = [each.name for each in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                hint = did_you_mean(key, known)
                raise RecipeError(f"`{prefix}{key}`: there is no such key; there are {', '.join(known)}.{hint}")


_BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _check_range(key: str, value: float | None, **bounds: float) -> None:
    """Raise a RecipeError if a value is out of its `_BOUNDS`. `None` means that the key is not set."""
    for name, bound in bounds.items():
        fits, words = _BOUNDS[name]
        if value is not None and not fits(value, bound):
            raise RecipeError(f"`{key}` must be {words} {bound}, got {value}.")


def recipe_names() -> list[str]:
    """The names of the recipes in the package, in alphabetical order.

    Example:
        >>> "bert-large-rte" in recipe_names()
        True
    """
    folder = resources.files(__package__) / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str | os.PathLike[str]) -> str:
    """The path of a recipe.

    Args:
        name: A file, or the name of a recipe of the package.

    Raises:
        RecipeError: If there is neither.
    """
    if os.path.isfile(name):
        return str(name)
    if str(name) in recipe_names():
        return str(resources.files(__package__) / "recipes" / f"{name}.yaml")
    known = recipe_names()
    raise RecipeError(
        f"There is no file {str(name)!r} and no recipe of that name; there are {known}.{did_you_mean(name, known)}"
    )


_MAX_FILE_BYTES, _MAX_FILE_VALUES = 1_000_000, 100_000


class _YamlLoader(yaml.SafeLoader):
    """Reads YAML in which 1e-2 is a number, a date is a text, and a repeated key is an error.

    A file can have up to `_MAX_FILE_VALUES` values, aliases expanded: a few lines of nested aliases could otherwise
    expand to more values than fit into memory.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._count_values(node, {})
        return node

    def _count_values(self, node: Any, counts: dict[int, int | None]) -> int:
        """The number of values in a node, aliases expanded."""
        if id(node) not in counts:
            counts[id(node)] = None  # a node that is met again before it is counted contains itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
            counts[id(node)] = 1 + sum(self._count_values(part, counts) for part in parts)
        found = counts[id(node)]
        if found is None:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        if found > _MAX_FILE_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {_MAX_FILE_VALUES:,} values, aliases expanded", problem_mark=node.start_mark
            )
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Writes YAML without aliases, and quotes texts that `_YamlLoader` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_YamlLoader, _YamlDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_YamlLoader.add_constructor("tag:yaml.org,2002:timestamp", _YamlLoader.construct_yaml_str)


def read_values(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the values of a recipe without checking them.

    Args:
        name: A YAML file, or the name of a recipe of the package.

    Raises:
        RecipeError: If there is no such file, if it is too large or not a mapping, or if it sets `trust_remote_code`.
    """
    path = recipe_path(name)
    if os.path.getsize(path) > _MAX_FILE_BYTES:
        raise RecipeError(f"{path} is no recipe: it has more than {_MAX_FILE_BYTES:,} bytes.")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _YamlLoader)
    except RecursionError as error:
        raise RecipeError(f"{path} cannot be read: its values are nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a number of thousands of digits
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: it must be a mapping of keys to values.")
    if values.get("trust_remote_code"):
        raise RecipeError(f"{path}: `trust_remote_code` cannot be set in a file. {_HOW_TO_TRUST}")
    return values


class _ReadRecipe(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        try:
            values = read_values(value)
            _check_keys(values)
        except RecipeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        data = {f"data.{key}": each for key, each in values.pop("data", {}).items()}
        for key, each in {self.dest: value, **values, **data}.items():
            namespace[key] = each


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add the option `--config`, and one option for each key of a recipe, to a parser of jsonargparse."""
    parser.add_argument(
        "--config",
        action=_ReadRecipe,
        help="A recipe: a YAML file, or the name of a recipe of the package. Options after it override it.",
    )
    parser.add_class_arguments(Recipe)


def recipe_from(parsed: Namespace) -> Recipe:
    """Create a recipe from the parsed options of `add_recipe_arguments`.

    Raises:
        RecipeError: If a value is invalid.
    """
    values = {each.name: parsed[each.name] for each in dataclasses.fields(Recipe)}
    return Recipe.from_dict({**values, "data": dict(vars(values["data"]))})


def load_recipe(name: str | os.PathLike[str], **overrides: Any) -> Recipe:
    """Read a recipe from YAML.

    Args:
        name: A file, or the name of a recipe of the package.
        **overrides: Values that replace those of the file, with dots for nested keys.

    Raises:
        RecipeError: If the file is not a valid recipe. The message names the file and the key.

    Example:
        >>> recipe = load_recipe("bert-large-rte", output_dir="runs/rte", **{"adapter.num_virtual_tokens": 8})
    """
    values = read_values(name)
    try:
        return Recipe.from_dict(_set_nested(values, overrides))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
