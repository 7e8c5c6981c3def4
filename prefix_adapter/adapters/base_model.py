"""The base model of a saved adapter: loaded for a conversion, and given the converted adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..files.check import find_misfits
from .saved import AnyPath

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# The names of sliding windows in the configurations of transformers.
_WINDOW_NAMES = ("sliding_window", "window_size", "attention_chunk_size")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' reports on a missing or resized head, because the adapter has the head."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def check_base_name(source: AnyPath, name: str | None) -> str:
    """Return the name of the base model.

    Raises:
        ValueError: If there is none.
    """
    if not name:
        raise ValueError(f"`base_model`: {source} does not say which model was frozen. Give its folder or name.")
    return name


def load_base_config(name: str, num_labels: int | None, revision: str | None = None) -> Any:
    """Load the configuration of a base model, with a number of labels or its own."""
    with _quiet():
        settings = {} if num_labels is None else {"num_labels": num_labels}
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False, **settings)


def make_empty_base(task: str, config: Any) -> PreTrainedModel:
    """Make a base model on the meta device, without weights."""
    with torch.device("meta"):
        return getattr(transformers, AUTO_CLASSES[task]).from_config(config)


def load_base(task: str, name: str, config: Any, revision: str | None = None) -> tuple[PreTrainedModel, set[str]]:
    """Load a base model in float32. Missing weights are drawn with a fixed seed, so that each call gives the same.

    Returns:
        The model, and the names of the weights that its own checkpoint does not have.

    Raises:
        ValueError: If it cannot be loaded for the task.
        OSError: If it cannot be found.
    """
    auto_class = getattr(transformers, AUTO_CLASSES[task])
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, info = auto_class.from_pretrained(
                name,
                config=config,
                revision=revision or "main",
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise ValueError(f"`base_model`: {name!r} cannot be loaded as {AUTO_CLASSES[task]}: {error}") from error
    return model, set(info["missing_keys"])


def check_complete(source: AnyPath, task: str, name: str, missing: set[str], head: dict[str, Tensor]) -> None:
    """Reject weights that neither file has, which would be random at every loading.

    A backbone without a head may lack its pooler, because not everybody uses the pooler's output.

    Raises:
        ValueError: If such weights are missing.
    """
    lost = sorted(missing - set(head))
    if lost and task != "FEATURE_EXTRACTION":
        raise ValueError(
            f"Neither {source} nor {name} has {', '.join(lost)}: outputs cannot be those of the trained model."
        )


def attention_window(base: Any) -> int | None:
    """Return the number of tokens that some layers look back; `None` without such a limit."""
    config = base.config.get_text_config()
    return next(filter(None, (getattr(config, name, None) for name in _WINDOW_NAMES)), None)


def warn_of_window(base: PreTrainedModel) -> None:
    """Warn that outputs differ from PEFT's behind a sliding window. Call it from the public function."""
    window = attention_window(base)
    if window is not None:
        warnings.warn(
            f"{type(base).__name__} has layers that look back {window} tokens. A prefix of PEFT leaves that window, a "
            "prefix of this package does not: outputs are equal as long as prefix and input fit into the window.",
            stacklevel=3,
        )


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and, but for rounding, the same numbers."""
    return one.shape == other.shape and torch.allclose(one.to(other.dtype), other)


def with_root(root: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put `root` in front of all names."""
    return {root + key: tensor for key, tensor in tensors.items()}


def add_adapter(source: AnyPath, base: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor]) -> PeftModel:
    """Wrap a base model, and fill the adapter with weights.

    Args:
        source: The adapter that is converted, for the message.
        base: The base model.
        config: The config of the new adapter.
        weights: All of its tensors, by their names in a file.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    model: Any = get_peft_model(base, config)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    misfits = find_misfits({key: tuple(tensor.shape) for key, tensor in wanted.items()}, weights)
    if misfits:
        raise ValueError(f"{source} does not fit {type(base).__name__}: {'; '.join(misfits)}.")
    set_peft_model_state_dict(model, weights)
    return model


def write_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Save the adapter of a model, with the given name of its base model."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    # PEFT has added its own names of heads to the given ones.
    config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
    model.save_pretrained(str(folder), save_embedding_layers=False)
