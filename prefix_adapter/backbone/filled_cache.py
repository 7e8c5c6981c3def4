"""A plain cache that holds given keys and values, as an inference engine holds them, and a decoder behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .calls import parameter_names
from .find import find_cache_argument
from .key_values import KeyValues


def fill_cache(layers: Mapping[int, KeyValues], config: Any = None) -> DynamicCache:
    """Make a cache with given keys and values `[batch, heads, n, size]`.

    Args:
        layers: Keys and values by layer index.
        config: The config of the text model, for layers with a sliding window; `None` if no layer is to drop tokens.
    """
    cache = DynamicCache(config=config)
    for index in sorted(layers):
        cache.update(*layers[index], index)
    return cache


def run_decoder(model: nn.Module, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Run a decoder on token ids `[1, tokens]`.

    Args:
        model: The decoder, with a head or without.
        ids: The token ids.
        cache: The cache that it continues; it gets the new tokens.

    Returns:
        The logits `[1, tokens, words]`; the hidden states of a model without a head.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
    if cache is not None:
        argument = find_cache_argument(model)
        if argument is None:
            raise ValueError(f"{type(model).__name__} takes no cache.")
        inputs[argument] = cache
    if "attention_mask" in parameter_names(model):
        inputs["attention_mask"] = torch.ones(1, past + ids.shape[1], dtype=torch.long, device=ids.device)
    output: Tensor = model(**inputs)[0]
    return output
