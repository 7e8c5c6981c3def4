"""What a saved adapter holds, read from its files alone: no model is loaded."""

from __future__ import annotations

import math
import os
from typing import Any

from ..config import PrefixTuningV2Config
from ..files.source import Source, open_weights
from ..prefix.names import PREFIX
from .saved import load_config


def describe(adapter: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Read what a saved adapter is, and what is in its file.

    Args:
        adapter: its folder, or its name on the Hub.
        revision: its revision on the Hub.

    Returns:
        Its type, base model, task and settings, the bytes of its file, and the shape and dtype of each tensor. The
        texts are those of its author: escape them before a terminal gets them.

    Raises:
        ValueError: if there is no adapter, or its file is damaged.
    """
    config = load_config(adapter, revision=revision)
    path = Source.of(adapter, kwargs={} if revision is None else {"revision": revision}).weights()
    tensors, parameters = {}, {"prefix": 0, "other": 0}
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
            part = file.get_slice(name)
            shape = list(part.get_shape())
            tensors[name] = {"shape": shape, "dtype": part.get_dtype()}
            parameters["prefix" if f".{PREFIX}" in name else "other"] += math.prod(shape)
    defaults = type(config)().to_dict()
    hidden = ("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "peft_version")
    settings = {
        name: sorted(value, key=str) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in hidden and value != defaults.get(name)
    }
    if isinstance(config, PrefixTuningV2Config):
        settings = {"num_virtual_tokens": config.num_virtual_tokens, **settings}
    return {
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type and str(getattr(config.task_type, "value", config.task_type)),
        "settings": settings,
        "parameters": parameters,
        "bytes": path.stat().st_size,
        "tensors": tensors,
    }
