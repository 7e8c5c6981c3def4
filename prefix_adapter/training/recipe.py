"""A recipe: everything that decides what a training run does, as YAML or on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from importlib import resources
from inspect import formatannotation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "causal-lm",
    "seq2seq-lm",
)
NO_ADAPTER = ("FULL", "HEAD")
"""What `adapter.peft_type` may say besides a PEFT type: train all of the model, or its task head alone."""
_CODE = ("allow_all_kernels", "use_kernels", "kernel_config")
"""Arguments of `from_pretrained` with which transformers downloads and runs kernels."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key."""


@dataclass
class Data:
    """Where the rows come from.

    Args:
        path: A data set of the Hub or a folder that `datasets.load_dataset` reads. Without it `train`, `validation`
            and `test` are files: .jsonl, .json, .csv, .tsv or .parquet, the text ones also as .gz.
        name: The configuration of a data set of the Hub.
        revision: The revision of a data set of the Hub: a branch, tag or commit.
        train: The split, or the file, to learn from.
        validation: The split or file that the best checkpoint is chosen on. If it is not given, `validation_fraction`
            of the training rows are held out.
        test: The split or file that the finished adapter is measured on, once.
        validation_fraction: Share of the training rows to hold out when there is no `validation`; in (0, 1).
        columns: What the data calls the task's columns, `{ours: theirs}`, for instance `{text: premise}`.
        max_train_rows: Use so many rows at most, drawn with the recipe's seed.
        max_validation_rows: As `max_train_rows`, for the validation rows.
        max_test_rows: As `max_train_rows`, for the test rows.
        num_proc: Processes that tokenize.
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

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        for name in ("max_train_rows", "max_validation_rows", "max_test_rows", "num_proc"):
            if getattr(self, name) is not None:
                _require(f"data.{name}", getattr(self, name), least=1)
        _require("data.validation_fraction", self.validation_fraction, above=0, below=1)


@dataclass
class Recipe:
    """All settings of a training run. Names are those of `TrainingArguments` where it has one.

    Args:
        task: What is learnt; each task has its own columns, head, loss and metrics.
        model: The base model: a name on the Hub or a folder.
        output_dir: The folder for the adapter, its card, curve, metrics and checkpoints.
        data: Where the rows come from.
        adapter: A PEFT configuration as a mapping. `peft_type` is PREFIX_TUNING_V2 unless it says otherwise; the other
            keys are the configuration's own (`num_virtual_tokens`, `prefix_projection`, ...), with its defaults; but a
            table beside a new task head starts at `init_std: 0.5`. For comparisons, `peft_type` may be any type of
            PEFT's, FULL (everything is trained) or HEAD (the task head alone).
        init_from: The saved adapter, a folder or a name on the Hub, whose prefix training starts from. `adapter` must
            have its `num_virtual_tokens`, and what else shapes a prefix; the task head starts anew.
        init_text: The text whose keys and values the prefix starts as, for causal-lm. Its tokens are the virtual
            tokens: `num_virtual_tokens` may be left out.
        model_kwargs: Passed on to `from_pretrained` of the base model (`dtype`, `attn_implementation`, `revision`,
            `hidden_dropout_prob` of a BERT, ...).
        task_kwargs: Settings of the task; `prefix-adapter train --help` lists them.
        max_length: Tokens of an input at most; the task's own default if not given.
        batch_size: Rows of an optimizer step, over all processes and accumulation steps together, so that a recipe
            means the same on one GPU and on eight.
        gradient_accumulation_steps: In how many parts each process computes its share of a batch.
        eval_batch_size: Rows of a forward pass of one process in evaluation.
        num_train_epochs: Passes over the training rows.
        max_steps: Stop after so many optimizer steps, whatever `num_train_epochs` says.
        group_by_length: Put rows of similar length into one batch, which saves padding.
        learning_rate: Of the adapter. By default 3e-2 for a table of prefixes, 1e-3 for an MLP, 2e-3 for LoRA, 3e-5
            for FULL, 1e-2 for what else PEFT has.
        head_learning_rate: Of the task head. By default 2e-2 beside an adapter or alone, `learning_rate` with FULL.
        weight_decay: AdamW's, for the adapter and the head.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        lr_scheduler_type: A name that `transformers.get_scheduler` knows, or `exponential`, which multiplies the rate
            by `lr_scheduler_kwargs: {gamma: ...}` after every epoch.
        lr_scheduler_kwargs: Further settings of the schedule.
        warmup_ratio: Share of the steps in which the rate rises from 0.
        seed: Of the initial weights, the order of the rows and dropout.
        mixed_precision: Accelerate's: no, fp16 or bf16. By default what `accelerate launch` was told.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        eval_steps: Evaluate and write a checkpoint every so many steps; by default after every epoch.
        save_steps: Write a checkpoint every so many steps besides.
        logging_steps: Record the loss every so many steps.
        metric_for_best_model: The metric of the validation rows that decides which checkpoint is best; the task's own
            by default, `loss` for the lowest loss.
        early_stopping_patience: Stop after so many evaluations without a better one.
        report_to: Accelerate's trackers, for instance `[tensorboard]`, written to `output_dir/logs`.
        labels: The labels, in the order of the head's outputs; read from the training rows if not given.
        trust_remote_code: Run the Python code that the base model's repository contains. No file can set this: it is
            an option of the command line and an argument in Python, and is not saved with the recipe.
    """

    task: Literal[TASKS]  # type: ignore[valid-type]
    model: str
    output_dir: str
    data: Data = field(default_factory=Data)
    adapter: dict[str, Any] = field(default_factory=dict)
    init_from: Optional[str] = None
    init_text: Optional[str] = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
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
        self._check_code()
        kind = self.adapter.get("peft_type", "PREFIX_TUNING_V2")
        if not isinstance(kind, str):
            raise RecipeError(f"`adapter.peft_type` must be the name of a method, got {kind!r}.")
        self.adapter = {**self.adapter, "peft_type": kind.upper()}
        self._check_start()
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), above=0)
        for name in ("batch_size", "gradient_accumulation_steps", "eval_batch_size", "logging_steps"):
            _require(name, getattr(self, name), least=1)
        for name in ("max_length", "max_steps", "eval_steps", "save_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), least=1)
        _require("num_train_epochs", self.num_train_epochs, above=0)
        for name in ("weight_decay", "max_grad_norm", "warmup_ratio"):
            _require(name, getattr(self, name), least=0)
        _require("warmup_ratio", self.warmup_ratio, most=1)
        _require("seed", self.seed, least=0)
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), 1):
            raise RecipeError(f"`labels` must be different from each other, got {self.labels}.")
        if len({type(label) for label in self.labels or []}) > 1:
            raise RecipeError(f"`labels` must be all strings or all integers, got {self.labels}.")

    def _check_start(self) -> None:
        given = [name for name in ("init_from", "init_text") if getattr(self, name) is not None]
        for name in given:
            if not getattr(self, name).strip():
                raise RecipeError(f"`{name}` is empty; leave it out for a random start.")
            if self.adapter["peft_type"] != "PREFIX_TUNING_V2":
                raise RecipeError(f"`{name}` is for PREFIX_TUNING_V2, not for {self.adapter['peft_type']}.")
        if len(given) > 1:
            raise RecipeError("`init_from` and `init_text`: a prefix can start from one of them only.")
        if self.init_text is not None and self.task != "causal-lm":
            raise RecipeError(f"`init_text` is for causal-lm: the model of {self.task} reads no text in front.")
        if self.init_text is not None and self.adapter.get("prefix_projection"):
            raise RecipeError(
                "`adapter.prefix_projection`: an MLP cannot start from `init_text`. Leave it out, for a table."
            )

    def _check_code(self) -> None:
        """Refuse settings with which transformers runs code from a repository, unless the caller trusts it."""
        if "trust_remote_code" in self.model_kwargs:
            raise RecipeError(
                "`model_kwargs.trust_remote_code`: leave it out. If you trust the code of the base model's "
                "repository, say so with --trust_remote_code, or in Python with `trust_remote_code=True`."
            )
        for name in self.model_kwargs:
            attention = name == "attn_implementation" and "/" in str(self.model_kwargs[name])
            if (attention or name in _CODE) and not self.trust_remote_code:
                raise RecipeError(
                    f"`model_kwargs.{name}`: {self.model_kwargs[name]!r} runs code from a repository. If you trust "
                    "it, say so with --trust_remote_code, or in Python with `trust_remote_code=True`."
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe of plain values, as `to_dict` gives them.

        Raises:
            RecipeError: if a key is unknown or missing, or has an impossible value; the message names it.
        """
        _check_keys(values)
        needed = [each.name for each in dataclasses.fields(cls) if each.default is each.default_factory is MISSING]
        if missing := [f"`{name}`" for name in needed if name not in values]:
            raise RecipeError(f"There must be a value for {', '.join(missing)}.")
        return cls(**{**values, "data": Data(**values.get("data", {}))})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for YAML or JSON."""
        return dataclasses.asdict(self)

    def with_values(self, values: dict[str, Any], without: Iterable[str] = ()) -> Recipe:
        """A copy with other values.

        Args:
            values: the values, by keys with dots for nested ones: `{"adapter.num_virtual_tokens": 8}`.
            without: such keys, which get their defaults first.

        Raises:
            RecipeError: if there is no such key, or it cannot have the value.
        """
        return Recipe.from_dict(_set(self.to_dict(), values, without))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        write_values(self.to_dict(), path)


def write_values(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the values of a recipe as YAML, `trust_remote_code` as false: no file can set it."""
    text = yaml.dump({**values, "trust_remote_code": False}, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def say(text: str) -> None:
    """Print a line for the user to standard error, in the first of the processes that a launcher started."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


def _set(contents: dict[str, Any], values: dict[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Set values by keys with dots for nested ones."""

    def holder(key: str) -> dict[str, Any]:
        place = contents
        for parent in key.split(".")[:-1]:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise RecipeError(f"`{key}`: `{parent}` is no mapping, it is {place!r}.")
        return place

    for key in without:
        holder(key).pop(key.rpartition(".")[2], None)
    for key, value in values.items():
        holder(key)[key.rpartition(".")[2]] = dataclasses.asdict(value) if isinstance(value, Data) else value
    return contents


def _check_types(owner: Data | Recipe, prefix: str = "") -> None:
    for name, hint in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
            setattr(owner, name, value)
        number = type(value) is int and float in (hint, *get_args(hint))
        try:
            type_validator(name, float(value) if number else value, hint)
        except TypeError as error:
            # YAML's truth values are the likeliest slip: `labels: [no, yes]`, `mixed_precision: no`.
            quotes = " (YAML reads no, yes, off and on as truth values: put them in quotes)"
            quotes = quotes if re.search("True|False", repr(value)) else ""
            raise RecipeError(f"`{prefix}{name}` must be {formatannotation(hint)}, got {value!r}{quotes}.") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"`{prefix}{name}` must be a finite number, got {value}.")


def _check_keys(values: dict[str, Any]) -> None:
    data = values.get("data", {})
    if not isinstance(data, dict):
        raise RecipeError(f"`data` must be a mapping, got {data!r}.")
    for prefix, given, kind in (("", values, Recipe), ("data.", data, Data)):
        known = [each.name for each in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                raise RecipeError(f"`{prefix}{key}`: there is no such key; there are {', '.join(known)}.")


def _require(
    key: str, value: float, *, least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None,
) -> None:  # fmt: skip
    if least is not None and not value >= least:
        raise RecipeError(f"`{key}` must be at least {least}, got {value}.")
    if above is not None and not value > above:
        raise RecipeError(f"`{key}` must be above {above}, got {value}.")
    if most is not None and not value <= most:
        raise RecipeError(f"`{key}` must be at most {most}, got {value}.")
    if below is not None and not value < below:
        raise RecipeError(f"`{key}` must be below {below}, got {value}.")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str | os.PathLike[str]) -> str:
    """The path of a recipe: a file of the user's, or by its name one that comes with the package.

    Raises:
        RecipeError: if there is neither.
    """
    if os.path.isfile(name):
        return str(name)
    if str(name) in recipe_names():
        return str(resources.files(__package__) / "recipes" / f"{name}.yaml")
    raise RecipeError(f"There is no file {str(name)!r} and no recipe of that name; there are {recipe_names()}.")


_FILE_BYTES, _FILE_NODES = 1_000_000, 100_000


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-2 is a number, a date is a text, and a key that occurs twice is an error.

    Aliases may repeat parts of a file, up to `_FILE_NODES` values in all: a few lines of aliases of aliases would
    otherwise become more values than any memory holds.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: Any, counts: dict[int, int | None]) -> int:
        """How many values a node holds, every alias counted as a copy of what it names."""
        if id(node) not in counts:
            counts[id(node)] = None
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
            counts[id(node)] = 1 + sum(self._count(part, counts) for part in parts)
        found = counts[id(node)]
        if found is None:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        if found > _FILE_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"it has more than {_FILE_NODES:,} values, repetitions counted", problem_mark=node.start_mark
            )
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would not read as a text, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: D102 (PyYAML's)
        return True


for _kind in (_Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def read_values(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a YAML file, or of a recipe that comes with the package.

    Raises:
        RecipeError: if there is no such file, if it is too large or no mapping, or if it sets `trust_remote_code`.
    """
    path = recipe_path(name)
    if os.path.getsize(path) > _FILE_BYTES:
        raise RecipeError(f"{path} is no recipe: it has more than {_FILE_BYTES:,} bytes.")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except RecursionError as error:
        raise RecipeError(f"{path} cannot be read: its values are nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: it must be a mapping of keys to values.")
    if values.get("trust_remote_code"):
        raise RecipeError(
            f"{path}: `trust_remote_code`: a file cannot say that a repository's code may run. If you trust the code, "
            "say so with --trust_remote_code, or in Python with `trust_remote_code=True`."
        )
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
    """Give a parser the option `--config` and one option for each field of a recipe."""
    parser.add_argument("--config", action=_ReadRecipe, help="A recipe (YAML, or a name); later options override it.")
    parser.add_class_arguments(Recipe)


def recipe_from(parsed: Namespace) -> Recipe:
    """The recipe among the parsed arguments of `add_recipe_arguments`.

    Raises:
        RecipeError: if a value is impossible; the message names the key.
    """
    values = {each.name: parsed[each.name] for each in dataclasses.fields(Recipe)}
    return Recipe.from_dict({**values, "data": dict(vars(values["data"]))})


def load_recipe(name: str | os.PathLike[str], **overrides: Any) -> Recipe:
    """Read a recipe from YAML.

    Args:
        name: a file, or the name of a recipe that comes with the package.
        **overrides: values that take the place of the file's, with dots for nested ones:
            `**{"data.train": "a.jsonl"}`.

    Raises:
        RecipeError: if the file is no valid recipe; the message names the key.
    """
    values = read_values(name)
    try:
        return Recipe.from_dict(_set(values, overrides))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error


# ---- The recipe in an adapter's folder

_HARMLESS = ("task", "model", "labels", "max_length", "eval_batch_size", "mixed_precision", "seed")
"""The keys that are taken from the recipe in an adapter's folder, besides `data` and those below."""
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_HARMLESS_MODEL_KWARGS: dict[str, Any] = {
    "dtype": lambda value: value in _DTYPES,
    "torch_dtype": lambda value: value in _DTYPES,
    "attn_implementation": lambda value: value in ("eager", "sdpa", "flash_attention_2", "flex_attention"),
    "revision": lambda value: isinstance(value, str),
}
_HARMLESS_GENERATION_KWARGS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "early_stopping", "min_new_tokens", "renormalize_logits"),
)
_MOST = {"eval_batch_size": 1024, "max_length": 1_000_000, "num_beams": 64, "max_answer_length": 1000}
_MOST_OF_OTHERS = 100_000


def load_adapter_recipe(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    rows: bool = False,
    trust_remote_code: bool = False,
) -> Recipe:
    """Read the recipe in the folder of an adapter, which somebody else may have written.

    Only settings are taken that an adapter needs to be used and that can do no harm: the task, the base model's name,
    labels, the names of columns, lengths and batch sizes within bounds, the dtype and the like. Other keys are left
    out; a setting that would change what the model computes and is not on the list is refused.

    Args:
        path: the file.
        model: the base model, in place of the recipe's.
        rows: also take where the run's rows are.
        trust_remote_code: whether the base model's repository may run its code; the file cannot set it.

    Raises:
        RecipeError: if it is no recipe, or sets something that is refused.
    """
    values = read_values(path)
    kept = {key: values[key] for key in _HARMLESS if key in values}
    kept["trust_remote_code"] = trust_remote_code
    if model is not None:
        kept["model"] = model
    data, adapter = values.get("data", {}), values.get("adapter", {})
    known = {each.name for each in dataclasses.fields(Data)} - {"num_proc"} if rows else {"columns"}
    if isinstance(data, dict):
        kept["data"] = {key: value for key, value in data.items() if key in known}
    if isinstance(adapter, dict) and "peft_type" in adapter:
        kept["adapter"] = {"peft_type": adapter["peft_type"]}
    try:
        kept["model_kwargs"] = _harmless_model_kwargs(values.get("model_kwargs", {}), trust_remote_code)
        kept["task_kwargs"] = _harmless_task_kwargs(values.get("task_kwargs", {}))
        for key in ("max_length", "eval_batch_size"):
            _check_bound(key, kept.get(key))
        return Recipe.from_dict({"output_dir": os.path.dirname(path) or ".", **kept})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _harmless_model_kwargs(settings: Any, trust_remote_code: bool) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise RecipeError(f"`model_kwargs` must be a mapping, got {_short(settings)}.")
    kept = {}
    for key, value in settings.items():
        if key == "trust_remote_code":
            if value and not trust_remote_code:
                raise RecipeError(
                    "`model_kwargs.trust_remote_code`: the adapter's recipe asks for the code of the base model's "
                    "repository to be run, which only you can allow: with --trust_remote_code, or in Python with "
                    "`trust_remote_code=True`."
                )
        elif re.search("dropout|pdrop", str(key)):
            continue  # it is for training alone
        elif key in _HARMLESS_MODEL_KWARGS and _HARMLESS_MODEL_KWARGS[key](value):
            kept[key] = value
        else:
            raise _refused(f"model_kwargs.{key}", value)
    return kept


def _harmless_task_kwargs(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise RecipeError(f"`task_kwargs` must be a mapping, got {_short(settings)}.")
    for key, value in settings.items():
        if key == "generation_kwargs" and isinstance(value, dict):
            for name, each in value.items():
                if name not in _HARMLESS_GENERATION_KWARGS or not isinstance(each, (bool, int, float)):
                    raise _refused(f"task_kwargs.generation_kwargs.{name}", each)
                _check_bound(f"task_kwargs.generation_kwargs.{name}", each)
        elif value is None or isinstance(value, (bool, int, float, str)):
            _check_bound(f"task_kwargs.{key}", value)
        else:
            raise _refused(f"task_kwargs.{key}", value)
    return settings


def _check_bound(key: str, value: Any) -> None:
    most = _MOST.get(key.rpartition(".")[2], _MOST_OF_OTHERS)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= most:
        raise _refused(key, value, f" (more than {most:,})")


def _refused(key: str, value: Any, why: str = "") -> RecipeError:
    return RecipeError(
        f"`{key}`: {_short(value)} is not taken from an adapter's folder{why}. If you trust this recipe, name it "
        "yourself: --config FILE, or in Python `config=`."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
