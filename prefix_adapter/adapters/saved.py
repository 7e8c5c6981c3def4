"""Saved adapters: read, folded, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import PrefixTuningV2Config
from ..files.check import read_weights
from ..files.source import Source, read_json
from ..messages import shorten
from ..prefix.encoder import PrefixEncoder
from ..prefix.names import PREFIX

# Numbers of the largest table that an MLP is folded into. With the 126 layers of 1,024 key columns that Llama 3.1 405B
# has, 1,000 virtual tokens need a quarter of that.
_TABLE = 2**30


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
    path = Source.of(source).weights()
    weights = read_weights(path)
    where = next((key.partition(PREFIX)[0] for key in weights if f".{PREFIX}" in key), "")
    try:
        encoder: Any = take_encoder(weights, f"{where}{PREFIX}")
        size = encoder.embedding.weight.shape[0] * encoder.output.bias.shape[0]
        if size > _TABLE:
            raise ValueError(f"the table would have {size:,} numbers")
        table = encoder.fold()
    except (AttributeError, RuntimeError, ValueError) as error:  # parts that are missing, or do not fit together
        raise ValueError(f"{path} does not hold the MLP that its config describes: {shorten(str(error))}") from error
    weights[f"{where}{PREFIX}embedding.weight"] = table
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


def load_config(
    source: str | os.PathLike[str], config_class: type[PeftConfig] = PeftConfig, revision: str | None = None
) -> Any:
    """The configuration of a saved adapter, which must be of a given class.

    Raises:
        ValueError: if there is no adapter, its config is damaged, or it is of another method; the message names it.
    """
    options = {} if revision is None else {"revision": revision}
    # PEFT looks at the type before it looks at anything else, and ends in any error if the file is not what it thinks.
    path = Source.of(source, kwargs=options).config()
    kind = read_json(path).get("peft_type")
    methods: dict[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
    method = methods.get(kind) if isinstance(kind, str) else None
    if method is None:
        raise ValueError(f"{path} is damaged: `peft_type` is {shorten(repr(kind))}, which is no method of PEFT.")
    if not issubclass(method, config_class):
        wanted = config_class().peft_type
        raise ValueError(f"{source} is a {kind} adapter, not one of {getattr(wanted, 'value', wanted)}.")
    try:
        return method.from_pretrained(str(source), **options)
    except Exception as error:  # other methods check less than this one, and fail wherever they first use a value
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged: {type(error).__name__}, {shorten(str(error), 500)}") from error


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
