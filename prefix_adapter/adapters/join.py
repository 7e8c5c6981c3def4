"""Join saved prefixes side by side into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import PrefixTuningV2Config
from ..files.whole import check_free, new_folder
from ..messages import shorten
from .base_model import with_root
from .saved import AnyPath, open_adapter, read_encoder

# The fields in which joined prefixes may differ. All others, new ones too, are taken to say what the columns of a
# table mean, and how attention uses them.
_MAY_DIFFER = {
    *("num_virtual_tokens", "num_frozen_tokens", "prefix_projection", "encoder_hidden_size", "lora_r"),
    *("prefix_dropout", "init_std", "modules_to_save", "label_names"),
    *("auto_mapping", "inference_mode", "peft_version"),
}


def join(sources: Sequence[AnyPath], target: AnyPath) -> Path:
    """Join saved prefixes side by side into one, whose virtual tokens are those of all of them.

    In attention each prefix keeps its keys and values, and all share one softmax with the input. The outputs are those
    of the model with all adapters active (`model.base_model.set_adapter([...])`). The base model is not needed. An MLP
    becomes the table that it computes. Dropout and frozen tokens are those of the first adapter.

    With `shift_positions` the input moves behind all prefixes, so each of them is further away from it than when it
    was trained. Without it, the distances stay.

    Args:
        sources: The adapters' folders, or their names on the Hub, in the order of their tokens; two or more.
        target: A folder that does not exist yet.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If there are fewer than two, one is no prefix or is damaged, they belong to different models, tasks
            or layers, or differ in `entry_point`, `shift_positions` or `strength`, or one has more than a prefix:
            `lora_r`, or other trained modules.
        OSError: If the Hub cannot be reached, or `target` cannot be written.

    Example:
        ```python
        join(["runs/contract", "runs/price-list"], "both")
        ```
    """
    target = check_free(target)
    if len(sources) < 2:
        raise ValueError(f"`sources` must name two adapters or more, got {len(sources)}.")
    tables: list[Tensor] = []
    first: PrefixTuningV2Config | None = None
    for source in sources:
        saved = open_adapter(source, PrefixTuningV2Config)
        config, (encoder, others) = saved.config, read_encoder(saved)
        first = first or config
        for name in (each.name for each in dataclasses.fields(config) if each.name not in _MAY_DIFFER):
            own, wanted = getattr(config, name), getattr(first, name)
            if own != wanted:
                raise ValueError(
                    f"{source} has `{name}={shorten(repr(own))}`, and {sources[0]} has {shorten(repr(wanted))}: only "
                    "prefixes that agree in it can be joined."
                )
        if config.lora_r or others:
            what = f"`lora_r={config.lora_r}`" if config.lora_r else ", ".join(sorted(others))
            raise ValueError(
                f"{source} has more than a prefix ({shorten(what)}), and only prefixes can stand side by side."
            )
        tables.append(encoder.fold())
        if tables[-1].shape[1] != tables[0].shape[1]:
            raise ValueError(
                f"{source} has {tables[-1].shape[1]} columns, and {sources[0]} has {tables[0].shape[1]}: they belong "
                "to different models."
            )
    assert first is not None
    table, frozen = torch.cat(tables), first.num_frozen_tokens
    first.num_virtual_tokens = len(table)
    if first.prefix_projection:
        first.note_folded()
    parts = {"embedding.weight": table[frozen:].contiguous()}
    if frozen:
        parts["frozen.weight"] = table[:frozen].contiguous()
    with new_folder(target) as folder:
        save_file(with_root(saved.root, parts), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        first.save_pretrained(folder)
    return target
