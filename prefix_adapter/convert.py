"""Saved adapters from and to other forms."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

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
        ValueError: if `source` is no prefix adapter, or has no MLP.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another folder for the folded adapter, or remove it.")
    config = PeftConfig.from_pretrained(str(source))
    if not isinstance(config, PrefixTuningV2Config):
        raise ValueError(f"{source} is a {config.peft_type} adapter, not one of PREFIX_TUNING_V2.")
    if not config.prefix_projection:
        raise ValueError(f"{source} is a table already (`prefix_projection` is false).")
    weights = load_peft_weights(str(source), device="cpu")
    where = next((key.partition(PREFIX)[0] for key in weights if f".{PREFIX}" in key), None)
    encoder = PrefixEncoder(*(_module(weights, f"{where}{PREFIX}{name}.") for name in PrefixEncoder._fields))
    weights[f"{where}{PREFIX}embedding.weight"] = encoder.fold()
    config.prefix_projection, config.encoder_hidden_size = False, None
    _write(target, config, weights)
    return target


def _module(weights: dict[str, Tensor], prefix: str) -> Any:
    """Take a module's parameters out of `weights`: an embedding, or a linear module if there is a bias."""
    parameters = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
    if "weight" not in parameters:
        raise ValueError(f"The adapter's weights have no {prefix}weight.")
    rows, columns = parameters["weight"].shape
    module = nn.Linear(columns, rows, device="meta") if "bias" in parameters else nn.Embedding(rows, columns)
    module.load_state_dict(parameters, assign=True)
    return module


def _write(target: Path, config: PrefixTuningV2Config, weights: dict[str, Tensor]) -> None:
    """Write an adapter's folder, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        contents = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(contents, os.path.join(scratch, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        shutil.copytree(scratch, target)
