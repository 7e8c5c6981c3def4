"""Low-rank matrices beside a prefix: LoRA on the linear layers of attention, as a part of the same adapter.

A prefix cannot change how much attention one token of the input pays to another; a change of queries and keys can
(docs/learning.md). As in LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685) the output of a linear layer becomes
`Wx + scale * B(Ax)`. Hooks add the second part, so that no module is replaced, and each row of a batch can have its
own adapter and strength.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from ..backbone.linears import LinearLayer
from ..backbone.parallel import TensorParallelism
from ..tuner.running import Row, RunningCalls, get_tensor_cache, pick_rows
from .batch import AdapterInfo
from .encoder import LOW_RANK_SCALE, PrefixEncoder


class LowRankHooks:
    """The hooks on the linear layers of one model.

    Args:
        adapters: The model's adapters, by name.
        get_encoder: Returns the modules of an adapter.
        get_rows: Returns the adapters of each row in the forward that this thread is in.
        calls: The model's running calls.
        parallelism: The processes that share the work of the model.
    """

    def __init__(
        self,
        adapters: Mapping[str, AdapterInfo],
        get_encoder: Callable[[str], PrefixEncoder],
        get_rows: Callable[[], list[Row]],
        calls: RunningCalls,
        parallelism: TensorParallelism | None = None,
    ):
        self._parallelism = parallelism
        self._adapters, self._get_encoder, self._get_rows, self._calls = adapters, get_encoder, get_rows, calls
        self._handles: list[RemovableHandle] = []

    def register(self, layers: Iterable[LinearLayer]) -> None:
        """Add the hooks."""
        for layer in layers:
            self._handles.append(layer.module.register_forward_hook(partial(self._add_change, layer)))

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _add_change(self, layer: LinearLayer, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the changes of the active adapters to the output `[batch, ..., outputs]` of a linear layer."""
        rows, states = self._get_rows(), args[0]
        distinct = list(dict.fromkeys(rows))
        if not any(self._changes(active.adapter, layer) for row in distinct for active in row):
            return output
        if len(distinct) == 1:
            down, up = self._join(layer, distinct[0], states)
            inner = self._join_processes(layer, F.linear(_cast(states, down), down))
            return output + F.linear(inner, up.t()).to(output.dtype)
        if states.dim() < 3:
            # Rows of tokens would count as rows of the batch.
            raise ValueError(
                f"{layer.name} receives the tokens of all rows in one row, so the rows cannot have different adapters "
                "with `lora_r`. Call the model for each adapter."
            )
        down, up = self._get_matrices_of_rows(layer, rows, distinct, states)
        inner = self._join_processes(layer, _cast(states.flatten(1, -2), down) @ down)
        return output + (inner @ up).view(output.shape).to(output.dtype)

    def _join_processes(self, layer: LinearLayer, inner: Tensor) -> Tensor:
        """Ax `[..., rank]` of a layer, in all processes together.

        If processes have parts of the inputs, each has a part of the sum. If they have parts of the outputs, each has
        a part of the gradient.
        """
        if self._parallelism is None or layer.divided is None:
            return inner
        return self._parallelism.add(inner) if layer.divided == "inputs" else self._parallelism.add_gradients(inner)

    def _changes(self, adapter: str, layer: LinearLayer) -> bool:
        return layer.name in self._adapters[adapter].linears

    def _join(self, layer: LinearLayer, row: Row, states: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of a row's adapters side by side, `[rank, inputs]` and, with the scale, `[rank, outputs]`.

        Under tensor parallelism these are the inputs and outputs of this process.
        """
        downs, ups = [], []
        for adapter, strength in row:
            if self._changes(adapter, layer):
                encoder, (inputs, outputs) = self._get_encoder(adapter), self._adapters[adapter].linears[layer.name]
                assert encoder.down is not None and encoder.up is not None
                downs.append(encoder.down.weight[:, inputs].to(states.device))
                ups.append(encoder.up.weight[:, outputs].to(states.device) * (strength * LOW_RANK_SCALE))
        down = torch.cat(downs) if downs else states.new_zeros(0, layer.inputs)
        up = torch.cat(ups) if ups else states.new_zeros(0, layer.outputs)
        return self._take_part(down, layer.divided == "inputs"), self._take_part(up, layer.divided == "outputs")

    def _take_part(self, weight: Tensor, divided: bool) -> Tensor:
        """This process's columns of a matrix `[rank, columns]`. Their gradient is that of all processes together."""
        if self._parallelism is None:
            return weight
        if not divided:
            return self._parallelism.add_gradients(weight, self._parallelism.size)
        return self._parallelism.add_gradients(weight).chunk(self._parallelism.size, 1)[self._parallelism.rank]

    def _get_matrices_of_rows(
        self, layer: LinearLayer, rows: list[Row], distinct: list[Row], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The matrices of each row of a batch, `[batch, inputs, rank]` and, with the scale, `[batch, rank, outputs]`.

        Rows of a lower rank have zeros.
        """
        cached = get_tensor_cache(self._calls.current)
        key = (layer.name, states.device, states.shape[0])
        if key not in cached:
            pairs = [self._join(layer, row, states) for row in distinct]
            picked = pick_rows([distinct.index(row) for row in rows], states)
            assert picked is not None
            down, up = (pad_sequence([pair[side] for pair in pairs], batch_first=True)[picked] for side in (0, 1))
            cached[key] = down.transpose(1, 2), up
        return cached[key]


def _cast(states: Tensor, like: Tensor) -> Tensor:
    """Hidden states in the dtype of the matrices, as in PEFT's LoRA, if autocast does not choose the dtype."""
    return states if torch.is_autocast_enabled(states.device.type) else states.to(like.dtype)
