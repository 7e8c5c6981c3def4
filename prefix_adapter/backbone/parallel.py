"""Reject models whose attention heads are divided over processes."""

from __future__ import annotations

import torch
from torch import nn


def check_no_tensor_parallelism(model: nn.Module) -> None:
    """Reject tensor parallelism: a process has some of the heads, and their prefix would pass for the whole prefix.

    Raises:
        ValueError: If weights are sharded over processes, and not by FSDP, which gathers them for each forward.
    """
    size = getattr(model, "tp_size", None) or 1
    if size == 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor, Shard

        for parameter in () if any(isinstance(part, FSDPModule) for part in model.modules()) else model.parameters():
            if isinstance(parameter, DTensor) and any(isinstance(place, Shard) for place in parameter.placements):
                size = max(size, parameter.device_mesh.size())
    if size > 1:
        raise ValueError(
            f"{type(model).__name__} is divided over {size} processes by tensor parallelism, which a prefix does not "
            "support. Load it without `tp_plan`; to use several GPUs, use DDP or FSDP2."
        )
