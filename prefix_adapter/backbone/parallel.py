"""Tensor parallelism: the processes that divide the attention heads of a model, and how a prefix is divided with them.

Each process keeps a whole prefix and uses the heads that it computes. The probe shows which heads these are: the
processes compare the keys and values that they have computed. In the same way they compare the gradients of a prefix,
because each process may have a part of a gradient or the whole. There is no list of models, and parallel plans are not
read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .key_values import HeadShare, KeyValues

# Relative difference of keys or gradients that two processes have computed alike. Others differ by their own size.
_SAME = 2e-2
# Largest relative error of a gradient beside a difference of outputs. Wrong counts of processes give at least 1 / 2.
_GRADIENT_ERROR = 0.3


class TensorParallelism:
    """The processes of one group. All of them compute the same batch, and call the methods below in the same order.

    Args:
        group: The process group.
    """

    def __init__(self, group: Any):
        self._group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallelism:
        # A copy of a model has the same processes, and a process group cannot be copied.
        return self

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values of the first process."""
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=self._group, group_src=0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return parts

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the forward pass. Each process has the whole gradient of the sum."""
        total: Tensor = _AddForward.apply(tensor, self._group)
        return total

    def add_gradients(self, tensor: Tensor, copies: int | Tensor = 1) -> Tensor:
        """The tensor itself. In the backward pass, its gradients in all processes are added.

        Args:
            tensor: A tensor with the same values in all processes.
            copies: The number of processes that compute the same part of the gradient; one for each column, or one
                for all.
        """
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor
        same: Tensor = _AddBackward.apply(tensor, self._group, copies)
        return same

    def join_heads(self, share: HeadShare, part: Tensor) -> Tensor:
        """All heads, from the heads `[batch, heads, ...]` of each process."""
        return torch.cat(self.gather(part)[:: self.size // share.parts], 1)

    def find_share(self, key_values: KeyValues) -> tuple[int, int]:
        """Find out which heads this process computes, from keys and values `[batch, heads, tokens, size]` of a probe.

        Returns:
            The index of this process's part, and the number of parts.

        Raises:
            ValueError: If the processes have different numbers of heads, or divide keys and values differently.
        """
        mine = [tensor.detach().float().cpu() for tensor in key_values]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self._group)
        shapes = sorted({tuple(side.shape[1] for side in each) for each in gathered})
        if len(shapes) > 1:
            raise ValueError(f"the processes compute different numbers of key and value heads: {shapes}")
        keys, values = (_count_parts([each[side] for each in gathered]) for side in (0, 1))
        if keys != values:
            raise ValueError(f"its keys are divided into {keys} parts and its values into {values}")
        return self.rank // (self.size // keys), keys

    def count_copies(self, gradient: Tensor) -> int:
        """How many processes have computed the same gradient."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, gradient.float().cpu(), group=self._group)
        return self.size // _count_parts(gathered)

    def check_gradient(self, product: Tensor, expected: Tensor) -> None:
        """Check a gradient of all processes together.

        Args:
            product: The gradient of this process times a step, divided by the number of processes that have the same.
            expected: The sum of that over all processes.

        Raises:
            ValueError: If it is another one.
        """
        total = product.detach().clone()
        dist.all_reduce(total, group=self._group)
        ratio = total.item() / max(expected.item(), 1e-30)
        if not abs(ratio - 1) <= _GRADIENT_ERROR:
            raise ValueError(f"the gradient of its prefix in all processes is {ratio:.3g} times the one expected")


def find_tensor_parallelism(model: nn.Module) -> TensorParallelism | None:
    """The processes that share the work of a model; `None` if each process computes the whole model.

    Raises:
        ValueError: If weights are divided in a way that does not show one group of processes with the same batch, or
            by FSDP2: that must come after the adapter. If each process has some of the layers.
    """
    size, name = getattr(model, "tp_size", None) or 1, type(model).__name__
    if not (dist.is_available() and dist.is_initialized()):
        return None
    stages = getattr(getattr(getattr(model, "config", None), "distributed_config", None), "pp_size", None) or 1
    if stages > 1:
        raise ValueError(
            f"The layers of {name} are divided over {stages} processes (pipeline parallelism, `pp_size`), and an "
            "adapter needs all layers in each process. Load the model with `tp_plan='auto'` instead, or whole and "
            "apply FSDP2 after the adapter was added (docs/distributed.md)."
        )
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    groups: dict[tuple[int, ...], Any] = {}
    sharded = any(isinstance(part, FSDPModule) for part in model.modules())
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            continue
        divided = [dim for dim, place in enumerate(parameter.placements) if not place.is_replicate()]
        if len(divided) > 1 or (sharded and divided and size > 1):
            raise ValueError(
                f"{name} is divided by tensor parallelism and by FSDP, which a prefix does not support. Use one of "
                "them: load the model with `tp_plan` alone, or without it and apply FSDP2 after the adapter was added "
                "(docs/distributed.md)."
            )
        for dim in () if sharded else divided:
            group = parameter.device_mesh.get_group(dim)
            if dist.get_world_size(group) > 1:
                groups[tuple(dist.get_process_group_ranks(group))] = group
    if sharded:
        raise ValueError(
            f"{name} is already divided by FSDP2 (`fully_shard`), which would not divide or train the parameters of "
            "an adapter that comes later. Add the adapter first (`get_peft_model`, `PeftModel.from_pretrained`), then "
            "apply `fully_shard` to the layers and to the model, or leave it to Accelerate (docs/distributed.md)."
        )
    if len(groups) > 1:
        raise ValueError(
            f"The weights of {name} are divided over several groups of processes, {sorted(groups)}, and a prefix can "
            "follow one of them. Load the model with tensor parallelism alone (`tp_plan='auto'`)."
        )
    if groups:
        return TensorParallelism(next(iter(groups.values())))
    if size > 1:
        raise ValueError(
            f"{name} is divided over {size} processes (`tp_size`), and none of its parameters is a `DTensor` that "
            "says how. Load it without quantization, or without `tp_plan`."
        )
    return None


def is_divided(module: nn.Module) -> bool:
    """Whether a weight of a module is divided over processes."""
    return any(hasattr(parameter, "placements") for parameter in module.parameters())


def _count_parts(tensors: list[Tensor]) -> int:
    """Into how many parts the heads are divided: consecutive processes with the same tensor have the same part."""
    size = len(tensors)
    for parts in range(1, size):
        block = size // parts
        if size % parts == 0 and all(_are_same(tensors[i], tensors[i - i % block]) for i in range(size)):
            return parts
    return size


def _are_same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _SAME * other.abs().max())


class _AddForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _AddBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, copies: int | Tensor) -> Tensor:
        ctx.group, ctx.copies = group, copies
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total / ctx.copies, None, None
