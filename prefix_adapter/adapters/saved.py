"""Saved adapters, read from their files alone: opened, described and folded without a base model."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import PrefixTuningV2Config
from ..files.card import CARD, changed_settings, read_card, task_type_of
from ..files.check import Shapes, find_misfits, read_weights
from ..files.contents import SAVED_ROOT, SECOND, shapes_of
from ..files.source import AdapterSource, open_weights, read_header, read_json
from ..files.whole import check_free, new_folder
from ..messages import shorten
from ..methods import METHODS
from ..prefix.encoder import EncoderSizes, PrefixEncoder
from ..prefix.names import LAYER_NAME, PREFIX
from ..ptuning.config import PTuningConfig
from ..ptuning.encoder import PromptEncoder, PromptSizes
from ..tuner.config import AdapterConfig

AnyPath = str | os.PathLike[str]
ConfigT = TypeVar("ConfigT", bound=PeftConfig)

# The files of a training run beside an adapter, and the curve that its card shows.
_RUN_FILES = ("recipe.yaml", "results.json", "curve.png")
# The names of the prefix's tensors in a file start with this.
PREFIX_ROOT = f"{SAVED_ROOT}{LAYER_NAME}.{PREFIX}"
# An MLP that computes a larger table is rejected. With the 126 layers of 1,024 key columns in Llama 3.1 405B, 1,000
# virtual tokens need a quarter of this size.
_MAX_TABLE_SIZE = 2**30


@dataclass(frozen=True)
class SavedAdapter(Generic[ConfigT]):
    """A saved adapter whose config was read and checked.

    Attributes:
        source: The place of its files.
        config: Its config.
    """

    source: AdapterSource
    config: ConfigT

    @property
    def task_type(self) -> str | None:
        """PEFT's task type as plain text."""
        return task_type_of(self.config)

    @cached_property
    def weights_path(self) -> Path:
        """The path of its safetensors file.

        Raises:
            ValueError: If there is none, or the weights are in a pickle.
            OSError: If the Hub cannot be reached.
        """
        return self.source.find_weights()

    def read_header(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Read the shape and the safetensors name of the dtype of each tensor.

        Raises:
            ValueError: If the file is damaged.
        """
        with open_weights(self.weights_path) as file:
            return read_header(file)

    @property
    def root(self) -> str:
        """The beginning of the names of its own tensors in the file."""
        layers = [method.tuner.tuner_layer_cls for method in METHODS if isinstance(self.config, method.config)]
        return f"{SAVED_ROOT}{layers[0].layer_name}.{layers[0].prefix}" if layers else PREFIX_ROOT

    def read_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read all tensors.

        Returns:
            Its own tensors by their names in a `PrefixEncoder` or `PromptEncoder`, and all other tensors by their
            names in the file.

        Raises:
            ValueError: If the file is damaged, or a tensor has an integer or 8-bit dtype, NaN or Inf.
        """
        others = read_weights(self.weights_path)
        names = [name for name in others if name.startswith(self.root)]
        return {name.removeprefix(self.root): others.pop(name) for name in names}, others


def open_adapter(
    adapter: AnyPath,
    config_class: type[ConfigT] | tuple[type[ConfigT], ...],
    revision: str | None = None,
    *,
    instead: str = "",
) -> SavedAdapter[ConfigT]:
    """Find a saved adapter that works alone, and read its config.

    Args:
        adapter: The adapter's folder, or its name on the Hub.
        config_class: The class that its config must have, or several such classes.
        revision: Its revision on the Hub.
        instead: What can be done with an adapter of another method, as a sentence for the message.

    Raises:
        ValueError: If there is no adapter, its config is damaged, or it belongs to another method; the message names
            it. Also if it was trained together with a second adapter.
    """
    first, *further = open_adapters(adapter, config_class, revision, instead=instead)
    if further:
        raise ValueError(
            f"{adapter} was trained together with a second adapter, in its folder {SECOND}, and does not work alone. "
            "The commands `evaluate`, `predict`, `info`, `fold` and `push` can use both; in Python, load both as the "
            "model card says."
        )
    return first


def open_adapters(
    adapter: AnyPath,
    config_class: type[ConfigT] | tuple[type[ConfigT], ...],
    revision: str | None = None,
    *,
    instead: str = "",
) -> list[SavedAdapter[Any]]:
    """Find a saved adapter, and the second one that was trained together with it, if there is one.

    Args:
        adapter: As for `open_adapter`.
        config_class: As for `open_adapter`, for the first adapter.
        revision: As for `open_adapter`.
        instead: As for `open_adapter`.

    Raises:
        ValueError: As for `open_adapter`; not if there is a second adapter.
    """
    first = _open(AdapterSource.of(adapter, kwargs={"revision": revision}), config_class, instead)
    second = AdapterSource.of(adapter, SECOND, {"revision": revision})
    path = None if isinstance(first.config, PTuningConfig) else second.find_if_there(CONFIG_NAME)
    # PEFT saves any adapter that a user has called "second" into such a folder.
    if path is None or read_json(path).get("peft_type") != PTuningConfig.method.value:
        return [first]
    return [first, _open(second, PTuningConfig)]


def _open(
    source: AdapterSource, config_class: type[ConfigT] | tuple[type[ConfigT], ...], instead: str = ""
) -> SavedAdapter[ConfigT]:
    """Find one saved adapter, and read its config; see `open_adapter`."""
    # PEFT reads the type before any other check, and fails with any kind of error if the file is damaged.
    path = source.find_config()
    kind = read_json(path).get("peft_type")
    methods: dict[Any, type[Any]] = PEFT_TYPE_TO_CONFIG_MAPPING
    method = methods.get(kind) if isinstance(kind, str) else None
    if method is None:
        raise ValueError(f"{path} is damaged: `peft_type` is {shorten(repr(kind))}, which is no method of PEFT.")
    if not issubclass(method, config_class):
        classes = config_class if isinstance(config_class, tuple) else (config_class,)
        types = [each().peft_type for each in classes if each is not AdapterConfig]
        wanted = " or ".join(str(getattr(each, "value", each)) for each in types) or "this package"
        raise ValueError(f"{source} is a {kind} adapter, not one of {wanted}.{instead and f' {instead}'}")
    try:
        subfolder = {"subfolder": source.subfolder} if source.subfolder else {}
        return SavedAdapter(source, method.from_pretrained(source.name, **subfolder, **source.options))
    except Exception as error:  # configs of other methods check little, and fail with any kind of error
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged: {type(error).__name__}, {shorten(str(error), 500)}") from error


def read_encoder(saved: SavedAdapter[PrefixTuningV2Config]) -> tuple[PrefixEncoder, dict[str, Tensor]]:
    """Read the encoder of a prefix adapter.

    Returns:
        The encoder, and the other tensors of the adapter by their names in the file.

    Raises:
        ValueError: If the file is damaged, does not have the encoder that the config describes, or has an MLP that
            computes a table of more than 2**30 numbers.
    """
    config, (parts, others) = saved.config, saved.read_weights()
    # The config leaves these sizes to the base model.
    length, hidden_size = config.num_virtual_tokens, _last_size(parts, "embedding.weight")
    columns = _last_size(parts, "output.bias") if config.prefix_projection else hidden_size
    width = _last_size(parts, "hidden.bias") if config.prefix_projection else None
    inputs, outputs = [_last_size(parts, "down.weight")], [_last_size(parts, "up.weight")]
    frozen = config.num_frozen_tokens
    sizes = EncoderSizes(length, columns, hidden_size, width, config.lora_r, inputs, outputs, frozen)
    _check_parts(saved, parts, sizes.shapes, length * columns)
    with torch.device("meta"):
        encoder = PrefixEncoder.new(sizes, config.init_std)
    _fill(encoder, parts)
    return encoder, others


def read_prompt_encoder(saved: SavedAdapter[PTuningConfig]) -> tuple[PromptEncoder, dict[str, Tensor]]:
    """Read the encoder of a P-Tuning adapter, as `read_encoder` reads that of a prefix."""
    config, (parts, others) = saved.config, saved.read_weights()
    size = _last_size(parts, "embedding.weight")
    kind = config.encoder_reparameterization_type
    width = _last_size(parts, "lstm.weight_hh_l0" if kind == "LSTM" else "hidden.bias")
    sizes = PromptSizes(config.num_virtual_tokens, size, kind, width if kind else 0)
    _check_parts(saved, parts, sizes.shapes, config.num_virtual_tokens * size)
    with torch.device("meta"):
        encoder = PromptEncoder.new(sizes)
    _fill(encoder, parts)
    return encoder, others


def _last_size(parts: Mapping[str, Tensor], name: str) -> int:
    """The last size of a tensor; 0 if there is none."""
    return parts[name].shape[-1] if name in parts and parts[name].dim() else 0


def _check_parts(saved: SavedAdapter[Any], parts: Mapping[str, Tensor], needed: Shapes, table_size: int) -> None:
    """Check that a file has the parts of an encoder, which computes a table of an allowed size.

    Raises:
        ValueError: If it does not.
    """
    path, misfits = saved.weights_path, find_misfits(shapes_of(parts), needed, {})
    if len({tensor.dtype for tensor in parts.values()}) > 1:
        misfits.append("its parts have different dtypes")
    if misfits:
        raise ValueError(f"{path} is damaged: it does not hold the adapter of its config: {'; '.join(misfits)}.")
    if table_size > _MAX_TABLE_SIZE:
        raise ValueError(
            f"{path}: the table would have {table_size:,} numbers, more than the {_MAX_TABLE_SIZE:,} that are "
            "allowed. Ask for another file."
        )


def _fill(encoder: PrefixEncoder | PromptEncoder, parts: Mapping[str, Tensor]) -> None:
    """Put tensors into the modules of an encoder that was made on the meta device."""
    for field, module in zip(encoder._fields, encoder, strict=True):
        if module is not None:
            module.load_state_dict({key: parts[f"{field}.{key}"] for key in module.state_dict()}, assign=True)


def has_encoder(adapter: AnyPath) -> bool:
    """Whether `fold` has something to do in a folder: an adapter with an encoder."""
    if not os.path.isfile(os.path.join(adapter, CONFIG_NAME)):
        return False
    return any(_has_encoder(each) for each in open_adapters(adapter, PeftConfig))


def _has_encoder(saved: SavedAdapter[Any]) -> bool:
    return isinstance(saved.config, AdapterConfig) and saved.config.has_encoder


def fold(source: AnyPath, target: AnyPath) -> Path:
    """Replace the encoder of a saved adapter by the plain table that it computes, in a new folder of a few hundred KB.

    The base model is not needed. Task heads and other trained modules are copied, and so are the model card's text and
    the files of a training run that `evaluate` and `predict` read. Of two adapters that were trained together, those
    with an encoder are folded, and the other is copied.

    Args:
        source: The adapter's folder, or its name on the Hub.
        target: A folder that does not exist yet.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If `source` is no adapter of this package, has no encoder, or is damaged.
        OSError: If the Hub cannot be reached, or `target` cannot be written.

    Example:
        ```python
        fold("runs/ner/checkpoints/step-001000", "ner")
        ```
    """
    target = check_free(target)
    found = open_adapters(source, PeftConfig)
    first = found[0]
    if len(found) == 1 and not isinstance(first.config, AdapterConfig):
        first = open_adapter(source, AdapterConfig)  # raises: another method has nothing to fold
    if not any(map(_has_encoder, found)):
        raise ValueError(f"{source} is a table already (`{found[-1].config.table_setting}`).")
    weights = [_folded_weights(saved) if _has_encoder(saved) else read_weights(saved.weights_path) for saved in found]
    others = {name: path for name in _RUN_FILES if (path := first.source.find_if_there(name))}
    card = first.source.find_if_there(CARD)
    text = card and read_card(card)
    with new_folder(target) as folder:
        for name, path in others.items():
            shutil.copyfile(path, folder / name)
        if text:
            text.save(folder / CARD)
        for saved, own in zip(found, weights, strict=True):
            place = folder / (saved.source.subfolder or "")
            place.mkdir(exist_ok=True)
            contents = {key: tensor.contiguous() for key, tensor in own.items()}
            save_file(contents, place / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            saved.config.save_pretrained(place)
    return target


def _folded_weights(saved: SavedAdapter[Any]) -> dict[str, Tensor]:
    """The tensors of a saved adapter once its encoder is folded, by their names in the file. Its config notes it."""
    encoder: PrefixEncoder | PromptEncoder
    is_prompt = isinstance(saved.config, PTuningConfig)
    encoder, weights = read_prompt_encoder(saved) if is_prompt else read_encoder(saved)
    folded = encoder.folded()
    for field, module in zip(folded._fields, folded, strict=True):
        if module is not None:
            weights |= {f"{saved.root}{field}.{key}": tensor for key, tensor in module.state_dict().items()}
    saved.config.note_folded()
    return weights


def describe_adapter(adapter: AnyPath, revision: str | None = None) -> dict[str, Any]:
    """Describe a saved adapter of any PEFT method.

    Args:
        adapter: The adapter's folder, or its name on the Hub.
        revision: Its revision on the Hub.

    Returns:
        Its `peft_type`, `base_model`, `task_type` and `settings` (those that differ from the defaults), the number of
        its `parameters` in the `prefix` (or the `virtual tokens`) and in `other` tensors, the `bytes` of its file, and
        the shape and dtype of each of its `tensors`; and the same of the `second_adapter` that was trained together
        with it, if there is one. The texts are untrusted: escape them before printing them in a terminal.

    Raises:
        ValueError: If there is no adapter, or its file is damaged.
        OSError: If the Hub cannot be reached.
    """
    first, *further = map(_describe, open_adapters(adapter, PeftConfig, revision))
    return {**first, "second_adapter": further[0]} if further else first


def _describe(saved: SavedAdapter[Any]) -> dict[str, Any]:
    """Describe one saved adapter; see `describe_adapter`."""
    config, header = saved.config, saved.read_header()
    own = "virtual tokens" if isinstance(config, PTuningConfig) else "prefix"
    parameters = {own: 0, "other": 0}
    for name, (shape, _) in header.items():
        parameters[own if name.startswith(saved.root) else "other"] += math.prod(shape)
    settings = changed_settings(config)
    if isinstance(config, AdapterConfig):
        settings = {"num_virtual_tokens": config.num_virtual_tokens, **settings}
    return {
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "base_model": config.base_model_name_or_path,
        "task_type": saved.task_type,
        "settings": settings,
        "parameters": parameters,
        "bytes": saved.weights_path.stat().st_size,
        "tensors": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in header.items()},
    }
