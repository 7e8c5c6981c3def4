"""What the configs of all methods of this package share: checked fields, and files that are read without trust."""

from __future__ import annotations

import math
import os
import tempfile
import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..files.card import OwnCard, has_default_names, save_own_card
from ..files.pickled import replace_pickle
from ..files.source import AdapterSource, read_json
from ..messages import shorten
from ..private import running_config_read

# Products of two sizes must fit into 64-bit integers.
_LARGEST_INT = 2**31 - 1


def check_int(name: str, value: Any, minimum: int) -> None:
    """Check that a field is an integer of at least `minimum`.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _LARGEST_INT:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {shorten(value)}.")


def check_number(name: str, value: Any) -> None:
    """Check that a field is a finite number.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"`{name}` must be a finite number, got {shorten(value)}.")


def check_bool(name: str, value: Any) -> None:
    """Check that a field is True or False.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shorten(value)}.")


def has_control_characters(text: str) -> bool:
    """Whether a text has characters that a terminal executes, or that are no characters."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def check_text(name: str, value: Any) -> None:
    """Check that a field is `None` or a text without control characters.

    Raises:
        ValueError: If it is not.
    """
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"`{name}` must be a string, got {shorten(value)}.")
    # PEFT and transformers print these texts, and a terminal executes control characters.
    if has_control_characters(str(value)):
        raise ValueError(f"`{name}` must not have control characters, got {shorten(str(value))}.")


class AdapterConfig(PeftConfig):
    """The base of the configs of this package. Every field is checked when a config is made.

    A subclass is a dataclass with the fields `num_virtual_tokens`, `modules_to_save` and `label_names`. It checks its
    own fields in `check_own_fields`, and describes its adapter in `make_card`.

    Attributes:
        method: The PEFT type.
        table_setting: The setting of an adapter whose parameters are a plain table.
        source: The place from which the config was read; `None` for a new adapter.
    """

    method: Any
    table_setting: str
    source: AdapterSource | None
    num_virtual_tokens: int
    modules_to_save: list[str] | None
    label_names: list[str] | None

    def __post_init__(self) -> None:
        self._base_labels: set[tuple[str, ...]] = set()
        reading = running_config_read()
        self.source = reading and AdapterSource.of(*reading)
        try:
            self._check_fields()
        except ValueError as error:
            if self.source is None:
                raise
            raise self.source.damaged_config(error) from error

    @abstractmethod
    def check_own_fields(self) -> None:
        """Check the fields that PEFT's configs do not have.

        Raises:
            ValueError: If one of them has a wrong value.
        """

    @abstractmethod
    def make_card(self, *, mapped: bool = False) -> OwnCard:
        """What the model card says about the adapter.

        Args:
            mapped: Whether the config file names the class of the base model (`auto_mapping`).
        """

    @property
    @abstractmethod
    def has_encoder(self) -> bool:
        """Whether an encoder computes the adapter's table."""

    @abstractmethod
    def note_folded(self) -> None:
        """Note that the table has replaced the encoder."""

    def _check_fields(self) -> None:
        if not isinstance(self.task_type, (str, type(None))):
            raise ValueError(f"Invalid task type: {shorten(self.task_type)}.")
        super().__post_init__()
        self.peft_type = self.method
        self.check_own_fields()
        self.check_names("modules_to_save", None)
        self.check_names("label_names", None)
        check_bool("inference_mode", self.inference_mode)
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            check_text(name, getattr(self, name))
        self._check_auto_mapping()

    def _check_auto_mapping(self) -> None:
        mapping = self.auto_mapping
        if mapping is None:
            return
        keys = ("base_model_class", "parent_library")
        if not isinstance(mapping, dict) or not all(isinstance(mapping.get(key), str) for key in keys):
            raise ValueError(
                f"`auto_mapping` must have strings at `base_model_class` and `parent_library`, got {shorten(mapping)}."
            )
        for key in keys:
            check_text("auto_mapping", mapping[key])

    def check_names(self, name: str, allowed: tuple[str, ...] | None) -> None:
        """Check that a field is `None` or a list of names.

        Args:
            name: The field.
            allowed: The names that it may have; any if `None`.

        Raises:
            ValueError: If it is not.
        """
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"`{name}` must be a list of strings that are not empty, got {shorten(value)}.")
        for item in value:
            check_text(name, item)
        if allowed and (not value or set(value) - set(allowed)):
            raise ValueError(f"`{name}` must be a non-empty list out of {list(allowed)}, got {shorten(value)}.")
        setattr(self, name, [item for item in allowed if item in value] if allowed else list(value))

    def note_base_labels(self, names: Sequence[str]) -> None:
        """Remember the names of the labels of a model with the adapter, for saving, if a config can have them."""
        if all(name and not has_control_characters(name) for name in names):
            self._base_labels.add(tuple(names))

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the labels of the model with the adapter (`None` if several share the config)."""
        labels = next(iter(self._base_labels)) if len(self._base_labels) == 1 else None
        classifies = self.task_type in ("SEQ_CLS", "TOKEN_CLS") or (self.task_type is None and self.modules_to_save)
        # Every model of transformers has two labels if nobody sets their number.
        if labels and (not classifies or (self.task_type is None and has_default_names(labels))):
            labels = None
        modules = self.modules_to_save
        return {
            **super().to_dict(),
            # PEFT adds the task heads whenever an adapter is loaded.
            "modules_to_save": modules and list(dict.fromkeys(modules)),
            "label_names": self.label_names or (labels and list(labels)),
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read the config of a saved adapter.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its name on the Hub.
            subfolder: A folder within it.
            **kwargs: Arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, ...).

        Returns:
            The config. As in PEFT, it is of the class that belongs to the `peft_type` in the file.

        Raises:
            ValueError: If there is no config, or it is damaged; the message names it.
            TypeError: If the file has no `peft_type`, as for PEFT's own methods.
        """
        source = AdapterSource.of(pretrained_model_name_or_path, subfolder, kwargs)
        try:
            config = super().from_pretrained(source.name, subfolder=subfolder, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            is_named = source.name in str(error) or str(source) in str(error)
            if is_named or (isinstance(error, TypeError) and "missing required keys" in str(error)):
                raise
            raise source.damaged_config(error) from error
        if isinstance(config, AdapterConfig):
            config.source = source
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Read the fields in a config file.

        Raises:
            ValueError: If the file is damaged; the message names it.
        """
        return read_json(Path(path_json_file))

    def __setattr__(self, name: str, value: Any) -> None:
        # `get_peft_model` sets the name of the base model. It makes a new adapter, also with a config that was read.
        if name == "base_model_name_or_path":
            super().__setattr__("source", None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # The Hub options in `source` may contain a token.
        return {**vars(self), "source": None}

    @property
    def target_modules(self) -> str:
        """The modules that PEFT's injection loop replaces: none, because a prefix uses hooks."""
        return DUMMY_TARGET_MODULES

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, and describe the adapter in the model card beside it.

        The card's text outside of our part stays.

        Args:
            save_directory: The folder; created if it does not exist.
            **kwargs: Arguments of `PeftConfig.save_pretrained`.

        Raises:
            ValueError: If `save_directory` is a file, or the card there is damaged.
            OSError: If a file cannot be written; existing files are then unchanged.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file. Choose a folder to save the adapter in.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Only `PeftModel.save_pretrained` passes this argument.
        by_peft = "auto_mapping_dict" in kwargs
        if by_peft:  # it writes the weights before the config
            replace_pickle(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
            super().save_pretrained(scratch, **kwargs)
            os.replace(Path(scratch, CONFIG_NAME), folder / CONFIG_NAME)
        save_own_card(
            folder, self.make_card(mapped="auto_mapping_dict" in kwargs), by_peft="auto_mapping_dict" in kwargs
        )
