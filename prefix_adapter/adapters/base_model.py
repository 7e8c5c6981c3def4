"""The base model of a saved adapter that is converted, and the writing of the converted adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..config import PrefixTuningV2Config
from ..files.card import CARD, config_card, write_card
from ..files.check import find_misfits
from ..files.contents import shapes_of
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


@dataclass
class BaseModelLoader:
    """The base model of an adapter that is converted. Each call of `load` gives the same weights.

    Attributes:
        adapter: The adapter's folder, file or Hub name, for messages.
        task: The task of the model's head, a key of `AUTO_CLASSES`.
        name: The folder or Hub name of the base model.
        revision: Its revision on the Hub.

    Raises:
        ValueError: If `name` is empty.
    """

    adapter: AnyPath
    task: str
    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                f"`base_model`: {self.adapter} does not say which model was frozen. Give its folder or name."
            )
        self._auto_class = getattr(transformers, AUTO_CLASSES[self.task])
        self._options: dict[str, Any] = {"revision": self.revision or "main", "trust_remote_code": False}

    def load_config(self, num_labels: int | None = None) -> Any:
        """Load the configuration of the base model, with a number of labels or its own.

        Raises:
            OSError: If it cannot be found.
        """
        labels = {} if num_labels is None else {"num_labels": num_labels}
        with _quiet():
            return AutoConfig.from_pretrained(self.name, **self._options, **labels)

    def make_empty(self, config: Any) -> PreTrainedModel:
        """Make the base model on the meta device, without weights."""
        with torch.device("meta"):
            return self._auto_class.from_config(config)

    def load(self, config: Any) -> tuple[PreTrainedModel, set[str]]:
        """Load the base model in float32. Missing weights are drawn with a fixed seed.

        Returns:
            The model, and the names of the weights that its own checkpoint does not have.

        Raises:
            ValueError: If it cannot be loaded for the task.
            OSError: If it cannot be found.
        """
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True, **self._options}
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, info = self._auto_class.from_pretrained(self.name, **options)
        except RuntimeError as error:
            raise ValueError(
                f"`base_model`: {self.name!r} cannot be loaded as {AUTO_CLASSES[self.task]}: {error}"
            ) from error
        return model, set(info["missing_keys"])

    def check_complete(self, missing: set[str], head: dict[str, Tensor]) -> None:
        """Reject weights that neither the base model nor the adapter has, which would be random at every loading.

        A backbone without a head may lack its pooler, because not everybody uses the pooler's output.

        Raises:
            ValueError: If such weights are missing.
        """
        lost = sorted(missing - set(head))
        if lost and self.task != "FEATURE_EXTRACTION":
            raise ValueError(
                f"Neither {self.adapter} nor {self.name} has {', '.join(lost)}: outputs cannot be those of the "
                "trained model."
            )

    def add_adapter(self, base: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor]) -> PeftModel:
        """Wrap the base model with a new adapter, and fill the adapter with `weights`, named as in a file.

        Raises:
            ValueError: If a tensor is missing, unknown or of another shape.
        """
        model: Any = get_peft_model(base, config)
        needed = get_peft_model_state_dict(model, save_embedding_layers=False)
        misfits = find_misfits(shapes_of(weights), shapes_of(needed), {})
        if misfits:
            raise ValueError(f"{self.adapter} does not fit {type(base).__name__}: {'; '.join(misfits)}.")
        set_peft_model_state_dict(model, weights)
        return model


def attention_window(base: Any) -> int | None:
    """Return the number of tokens that some layers look back; `None` without such a limit."""
    config = base.config.get_text_config()
    return next(filter(None, (getattr(config, name, None) for name in _WINDOW_NAMES)), None)


def warn_of_window(base: nn.Module, other: str) -> None:
    """Warn that a sliding window makes outputs differ. Call this from the public function.

    Args:
        base: The base model.
        other: The tokens in front of the input that the prefix is compared with.
    """
    window = attention_window(base)
    if window is not None:
        warnings.warn(
            f"{type(base).__name__} has layers that look back {window} tokens. They always see a prefix of this "
            f"package, but not always {other}: outputs are equal as long as all tokens fit into the window.",
            stacklevel=3,
        )


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and, but for rounding, the same numbers."""
    return one.shape == other.shape and torch.allclose(one.to(other.dtype), other)


def with_root(root: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put `root` in front of all names."""
    return {root + key: tensor for key, tensor in tensors.items()}


def write_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Save the adapter of a model, with the given name of its base model."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    # PEFT has added its own names of heads to the given ones.
    config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if not isinstance(config, PrefixTuningV2Config):
        # PEFT's own card is a template that names the base model's folder.
        write_card(folder / CARD, config_card(config))
