"""The recipe in an adapter's folder. It is untrusted: a third party may have written it."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from ..messages import shorten
from .recipe import Data, Recipe, RecipeError, read_values

_KEYS = ("task", "model", "load_in_4bit", "labels", "max_length", "eval_batch_size", "mixed_precision", "seed")
"""The keys that are read, besides `data.columns`, the methods of the adapters, `model_kwargs` and `task_kwargs`."""
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_MODEL_KWARGS: dict[str, Any] = {
    "dtype": lambda value: value in _DTYPES,
    "torch_dtype": lambda value: value in _DTYPES,
    "attn_implementation": lambda value: value in ("eager", "sdpa", "flash_attention_2", "flex_attention"),
    "revision": lambda value: isinstance(value, str),
}
"""The keys of `model_kwargs` that are read, and whether a value of theirs is harmless."""
_GENERATION_KWARGS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "early_stopping", "min_new_tokens", "renormalize_logits"),
)
_OF_LABELS = ("class_weights", "verbalizer")
"""The keys of `task_kwargs` that may be mappings: from labels to texts or numbers, or to lists of these."""
_LIMITS = {"eval_batch_size": 1024, "max_length": 1_000_000, "num_beams": 64, "max_answer_length": 1000}
_DEFAULT_LIMIT = 100_000
"""The largest number for keys that are not in `_LIMITS`."""


def load_adapter_recipe(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    rows: bool = False,
    trust_remote_code: bool = False,
) -> Recipe:
    """Read the harmless settings of the recipe in an adapter's folder.

    These are the settings that evaluation and prediction need: the task, the base model's name, labels, column names,
    lengths and batch sizes within limits, the dtype and the like. Keys that only concern training are ignored. Other
    keys of `model_kwargs` and `task_kwargs` are an error, since without them the model would compute something else.

    Args:
        path: The file.
        model: The base model; replaces that of the recipe.
        rows: Whether to read the source of the rows (`data`) too.
        trust_remote_code: Whether code from the base model's repository may run. The file cannot set it.

    Raises:
        RecipeError: If the file is not a recipe, or sets something that is not on the list.

    Example:
        >>> recipe = load_adapter_recipe("runs/ner/recipe.yaml")
    """
    values = read_values(path)
    kept = {key: values[key] for key in _KEYS if key in values}
    kept["trust_remote_code"] = trust_remote_code
    if model is not None:
        kept["model"] = model
    data = values.get("data", {})
    known = {each.name for each in dataclasses.fields(Data)} - {"num_proc"} if rows else {"columns"}
    if isinstance(data, dict):
        kept["data"] = {key: value for key, value in data.items() if key in known}
    for key in ("adapter", "second_adapter"):
        adapter = values.get(key, {})
        if isinstance(adapter, dict) and "peft_type" in adapter:
            kept[key] = {"peft_type": adapter["peft_type"]}
    try:
        kept["model_kwargs"] = _harmless_model_kwargs(_mapping(values, "model_kwargs"), trust_remote_code)
        kept["task_kwargs"] = _mapping(values, "task_kwargs")
        _check_task_kwargs(kept["task_kwargs"])
        for key in ("max_length", "eval_batch_size"):
            _check_limit(key, kept.get(key))
        return Recipe.from_dict({"output_dir": os.path.dirname(path) or ".", **kept})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"`{key}` must be a mapping, got {_short(value)}.")
    return value


def _harmless_model_kwargs(settings: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        if key == "trust_remote_code":
            if value and not trust_remote_code:
                raise RecipeError(
                    "`model_kwargs.trust_remote_code`: the adapter's recipe asks to run code from the base model's "
                    "repository. If you trust the code, set --trust_remote_code, or in Python "
                    "`trust_remote_code=True`."
                )
        elif key in _MODEL_KWARGS and _MODEL_KWARGS[key](value):
            kept[key] = value
        elif not re.search("dropout|pdrop", str(key)):  # dropout is for training only
            raise _rejection(f"model_kwargs.{key}", value)
    return kept


def _check_task_kwargs(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key == "generation_kwargs" and isinstance(value, dict):
            for name, each in value.items():
                if name not in _GENERATION_KWARGS or not isinstance(each, (bool, int, float)):
                    raise _rejection(f"task_kwargs.generation_kwargs.{name}", each)
                _check_limit(f"task_kwargs.generation_kwargs.{name}", each)
        elif key in _OF_LABELS and isinstance(value, dict):
            for label, each in value.items():
                for one in each if isinstance(each, list) else [each]:
                    _check_plain(f"task_kwargs.{key}.{label}", one)
        else:
            _check_plain(f"task_kwargs.{key}", value)


def _check_plain(key: str, value: Any) -> None:
    """Check that a value is a text or a number within limits."""
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise _rejection(key, value)
    _check_limit(key, value)


def _check_limit(key: str, value: Any) -> None:
    limit = _LIMITS.get(key.rpartition(".")[2], _DEFAULT_LIMIT)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= limit:
        raise _rejection(key, value, f" (more than {limit:,})")


def _rejection(key: str, value: Any, why: str = "") -> RecipeError:
    return RecipeError(
        f"`{key}`: {_short(value)} is not read from an adapter's folder{why}. If you trust this recipe, name it "
        "explicitly: --config FILE, or in Python `config=`."
    )


def _short(value: Any) -> str:
    return shorten(repr(value), 80)
