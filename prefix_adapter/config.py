"""What a user may say about a P-Tuning v2 prefix, checked when it is said."""

from __future__ import annotations

import enum
import functools
import math
import os
import tempfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES

from .backbone.attention import KINDS
from .files.card import replace_pickle, write_model_card
from .files.source import Source, read_json
from .messages import shorten


class PrefixTuningV2Type(str, enum.Enum):  # noqa: UP042 (printed and compared as PEFT's own types are)
    """The PEFT type of this package.

    `peft.PeftType` is closed, but the dictionaries in `peft.mapping` are keyed by string-valued enums, so a string
    enum of our own is a key like any other.
    """

    PREFIX_TUNING_V2 = "PREFIX_TUNING_V2"


# The sizes of a prefix are multiplied as 64-bit integers.
_LARGEST = 2**31 - 1


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _LARGEST:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {shorten(value)}.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"`{name}` must be a finite number, got {shorten(value)}.")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shorten(value)}.")


def _check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"`{name}` must be a string, got {shorten(value)}.")
    # PEFT and transformers print these, and a terminal takes control characters for commands.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(value)):
        raise ValueError(f"`{name}` must not have control characters, got {shorten(str(value))}.")


@dataclass
class PrefixTuningV2Config(PeftConfig):
    """Configuration of a P-Tuning v2 prefix (Liu et al. 2022, https://arxiv.org/abs/2110.07602, section 3.2).

    Every attention layer of the frozen backbone is given `num_virtual_tokens` learned keys and values in front of its
    own. They come from a plain table, `Embedding(n, columns)`, or, with `prefix_projection`, from the reference's
    two-layer MLP, `Embedding(n, hidden) - Linear(hidden, encoder_hidden_size) - Tanh -
    Linear(encoder_hidden_size, columns)`, where `columns` is the sum over the layers of the key and the value size
    (layers x 2 x hidden for BERT). The columns are in the order of the reference: layer by layer, the key before the
    value, heads, head size.

    Args:
        num_virtual_tokens (`int`, defaults to 20):
            Prefix length n, in tokens; at least 1. The paper's settings lie between 4 and 224 (its appendix).
        prefix_projection (`bool`, defaults to `False`):
            Whether an MLP computes the prefix (the paper's "reparameterization", section 3.3).
        encoder_hidden_size (`int`, *optional*):
            Width of the MLP's hidden layer; the backbone's hidden size if `None`. Only with `prefix_projection`.
        prefix_dropout (`float`, defaults to 0.1):
            Probability with which an element of a prefix key or value is dropped in training, drawn for each row of
            the batch as in the reference implementation. In [0, 1).
        init_std (`float`, defaults to 0.02):
            Standard deviation of the normal distribution from which the table, or the MLP's embedding and weights, are
            drawn (the reference's `initializer_range`). Above 0, as an MLP of zeros never gets a gradient, and at
            most 1000.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices of the layers that get a prefix, all if `None`. In an encoder-decoder an index means that layer of
            the encoder and of the decoder.
        target_attention (`list[str]`, *optional*):
            Which attention gets a prefix: `"encoder"` self-attention, `"decoder"` self-attention, `"cross"` attention
            (Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4, gives all three one each). `None` means
            every kind that the model has.
        shift_positions (`bool`, defaults to `False`):
            Whether the positions of the input start at n instead of 0, as in the reference and in PEFT's prefix
            tuning. The default leaves the backbone's own positions, so that all of its input length stays usable.
        modules_to_save (`list[str]`, *optional*):
            Modules besides the prefix that are trained and saved, a task head for instance.
        prefix_layout (`str`, *optional*):
            Layers, heads and head sizes that the prefix was made for. Written when an adapter is saved, and compared
            when it is loaded onto a model: 6 layers of 768 have as many columns as 12 of 384.

    Raises:
        ValueError: if a field has a value that it cannot have; the message names the field.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prefix length, in virtual tokens."})
    prefix_projection: bool = field(default=False, metadata={"help": "Whether a two-layer MLP computes the prefix."})
    encoder_hidden_size: Optional[int] = field(
        default=None, metadata={"help": "Width of the MLP's hidden layer, the backbone's hidden size by default."}
    )
    prefix_dropout: float = field(default=0.1, metadata={"help": "Dropout on the prefix keys and values."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indices of the layers that get a prefix, all by default."}
    )
    target_attention: Optional[list[Literal["encoder", "decoder", "cross"]]] = field(
        default=None, metadata={"help": "Which attention gets a prefix: encoder, decoder, cross; all by default."}
    )
    shift_positions: bool = field(
        default=False, metadata={"help": "Whether the input's positions start behind the prefix."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules besides the prefix that are trained and saved."}
    )
    prefix_layout: Optional[str] = field(
        default=None, metadata={"help": "The layers that the prefix was made for; written when it is saved."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.task_type, (str, type(None))):
            raise ValueError(f"Invalid task type: {shorten(self.task_type)}.")
        super().__post_init__()
        self._layouts: set[str] = set()
        # Where an adapter that is to be loaded with this config is.
        self.source: Source | None = None
        self.peft_type = PrefixTuningV2Type.PREFIX_TUNING_V2
        _check_int("num_virtual_tokens", self.num_virtual_tokens, 1)
        _check_bool("prefix_projection", self.prefix_projection)
        _check_bool("shift_positions", self.shift_positions)
        if self.encoder_hidden_size is not None:
            _check_int("encoder_hidden_size", self.encoder_hidden_size, 1)
            if not self.prefix_projection:
                raise ValueError(
                    "`encoder_hidden_size` is the width of the MLP and needs `prefix_projection=True`, without which "
                    "it would have no effect."
                )
        _check_number("prefix_dropout", self.prefix_dropout)
        if not 0 <= self.prefix_dropout < 1:
            raise ValueError(f"`prefix_dropout` must lie in [0, 1), got {shorten(self.prefix_dropout)}.")
        _check_number("init_std", self.init_std)
        if not 0 < self.init_std <= 1000:
            raise ValueError(f"`init_std` must be above 0 and at most 1000, got {shorten(self.init_std)}.")
        self._check_layers()
        self._check_names("target_attention", KINDS)
        self._check_names("modules_to_save", None)
        _check_bool("inference_mode", self.inference_mode)
        for name in ("prefix_layout", "base_model_name_or_path", "revision", "peft_version"):
            _check_text(name, getattr(self, name))
        auto: Any = self.auto_mapping
        parts = [auto.get(name) for name in ("base_model_class", "parent_library")] if isinstance(auto, dict) else [0]
        if auto is not None and not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"`auto_mapping` must have the strings `base_model_class` and `parent_library`, got {shorten(auto)}."
            )
        for part in parts if auto is not None else ():
            _check_text("auto_mapping", part)

    def _check_layers(self) -> None:
        if self.layers_to_transform is None:
            return
        layers = self.layers_to_transform
        if not isinstance(layers, (list, tuple, set, range)):
            layers = [layers]
        if not layers:
            raise ValueError("`layers_to_transform` is empty: an adapter needs at least one layer. None means all.")
        for index in layers:
            _check_int("layers_to_transform", index, 0)
        if len(set(layers)) != len(layers):
            raise ValueError(f"`layers_to_transform` names a layer twice: {shorten(list(layers))}.")
        self.layers_to_transform = sorted(layers)

    def _check_names(self, name: str, allowed: tuple[str, ...] | None) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"`{name}` must be a list of strings that are not empty, got {shorten(value)}.")
        for item in value:
            _check_text(name, item)
        if allowed and (not value or set(value) - set(allowed)):
            raise ValueError(f"`{name}` must be a non-empty list out of {list(allowed)}, got {shorten(value)}.")
        setattr(self, name, [item for item in allowed if item in value] if allowed else list(value))

    def wraps(self, model_name: str, layout: str) -> None:
        """Compare `prefix_layout` with that of a model that is to be wrapped, and remember that for saving.

        Raises:
            ValueError: if the adapter was made for another layout.
        """
        if self.prefix_layout not in (None, layout):
            raise ValueError(
                f"The adapter was made for attention layers of another shape: {shorten(self.prefix_layout)}, while "
                f"{model_name} has {layout}. Load it onto the base model that it was trained on."
            )
        self._layouts.add(layout)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the layout of the model that was wrapped (if one object served several: none)."""
        layout = next(iter(self._layouts)) if len(self._layouts) == 1 else None
        return {**super().to_dict(), "prefix_layout": self.prefix_layout or layout}

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields in a config's file.

        Raises:
            ValueError: if the file is damaged; the message names it.
        """
        return read_json(Path(path_json_file))

    def __setattr__(self, name: str, value: Any) -> None:
        # `get_peft_model` sets the name of the base model: then this is to be a new adapter, wherever it was read.
        if name == "base_model_name_or_path":
            super().__setattr__("source", None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # The arguments that it was read with may have a token among them.
        return {**vars(self), "source": None}

    @property
    def target_modules(self) -> str:
        """PEFT's injection loop looks for modules to replace; a prefix replaces none and hooks those that it finds."""
        return DUMMY_TARGET_MODULES

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the model card beside it how to load the adapter.

        Raises:
            OSError: if they cannot be written; the files that were there are as they were.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file. Choose a folder to save the adapter in.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if "auto_mapping_dict" in kwargs:
            # `PeftModel.save_pretrained` says so; it has written the weights, and writes the config last.
            replace_pickle(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
            super().save_pretrained(scratch, **kwargs)
            os.replace(Path(scratch, CONFIG_NAME), folder / CONFIG_NAME)
        write_model_card(folder, self)


def _follow(read: Any) -> Any:
    """`PeftConfig.from_pretrained`, which remembers in a config of ours where it was read.

    It makes one without asking our class. transformers' `load_adapter` takes it from there, and changes the model
    before it reads the weights: there is no later moment to look at them.
    """

    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        source = Source.of(pretrained_model_name_or_path, subfolder, kwargs)
        try:
            config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            # A file without a type that is read as one of ours is a TypeError of PEFT's, as for its own methods.
            without_type = isinstance(error, TypeError) and "missing required keys" in str(error)
            ours = issubclass(cls, PrefixTuningV2Config) or _is_ours(source)
            if without_type or not ours or source.name in str(error):
                raise
            raise ValueError(f"The config of {source} is damaged: {shorten(str(error), 500)}") from error
        if isinstance(config, PrefixTuningV2Config):
            config.source = source
        return config

    return classmethod(from_pretrained)


def _is_ours(source: Source) -> bool:
    try:
        return read_json(source.config()).get("peft_type") == PrefixTuningV2Type.PREFIX_TUNING_V2
    except (OSError, ValueError):
        return False


PeftConfig.from_pretrained = _follow(PeftConfig.from_pretrained.__func__)  # type: ignore[method-assign,attr-defined]
