"""Saved adapters: read, folded, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from .check import Source, read_weights
from .config import PrefixTuningV2Config
from .encoder import PrefixEncoder
from .layer import PREFIX


def fold(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Turn the MLP of a saved adapter into the plain table that it computes: an adapter of its own, a few hundred KB.

    The base model is not needed. Task heads and other trained modules are carried over.

    Args:
        source: an adapter's folder, or its name on the Hub.
        target: a folder that does not exist yet.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: if `target` exists.
        ValueError: if `source` is no prefix adapter, has no MLP, or is damaged.
    """
    target = check_free(target)
    config = load_config(source, PrefixTuningV2Config)
    if not config.prefix_projection:
        raise ValueError(f"{source} is a table already (`prefix_projection` is false).")
    weights = read_weights(Source.of(source).weights())
    where = next((key.partition(PREFIX)[0] for key in weights if f".{PREFIX}" in key), None)
    weights[f"{where}{PREFIX}embedding.weight"] = take_encoder(weights, f"{where}{PREFIX}").fold()
    config.prefix_projection, config.encoder_hidden_size = False, None
    with new_folder(target) as folder:
        contents = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(contents, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)
    return target


def take_encoder(weights: dict[str, Tensor], prefix: str, projection: bool = True) -> PrefixEncoder:
    """Take an encoder, a table without `projection`, out of tensors whose names begin with `prefix`.

    Raises:
        ValueError: if a part is missing.
    """
    names = PrefixEncoder._fields if projection else PrefixEncoder._fields[:1]
    return PrefixEncoder(*(_module(weights, f"{prefix}{name}.") for name in names))


def _module(weights: dict[str, Tensor], prefix: str) -> Any:
    """Take a module's parameters out of `weights`: an embedding, or a linear module if there is a bias."""
    parameters = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
    if "weight" not in parameters:
        raise ValueError(f"The adapter's weights have no {prefix}weight.")
    rows, columns = parameters["weight"].shape
    module = nn.Linear(columns, rows, device="meta") if "bias" in parameters else nn.Embedding(rows, columns)
    module.load_state_dict(parameters, assign=True)
    return module


def load_config(source: str | os.PathLike[str], config_class: type[PeftConfig]) -> Any:
    """The configuration of a saved adapter, which must be of a given class.

    Raises:
        ValueError: if there is no adapter, or it is of another method.
    """
    config = PeftConfig.from_pretrained(str(source))
    if not isinstance(config, config_class):
        kinds = (str(getattr(kind, "value", kind)) for kind in (config.peft_type, config_class().peft_type))
        raise ValueError("{} is a {} adapter, not one of {}.".format(source, *kinds))
    return config


def check_free(target: str | os.PathLike[str]) -> Path:
    """The path of a folder that is to be written.

    Raises:
        FileExistsError: if it exists.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another folder for the new adapter, or remove it.")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write an adapter into, which is `target` once all is written; after an error there is nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        yield folder
        folder.rename(target)
