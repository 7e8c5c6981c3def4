"""The keys and values of prefixes: encoded from the parameters, joined for each row, and cached while that is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.attention import PrefixSlot
from ..backbone.key_values import KeyValues, split_layers
from ..backbone.parallel import TensorParallelism
from ..private import get_writes
from ..tuner.running import AdapterCall, Row, get_tensor_cache
from .batch import AdapterInfo
from .encoder import PrefixEncoder
from .plan import BatchPlan, PrefixPart
from .state import ForwardState


class PrefixValues:
    """Computes the keys and values of a model's prefixes.

    A prefix that is trained is encoded once per forward, for all layers. A prefix that is not trained is cached until
    one of its parameters is written to.

    Args:
        containers: The modules of all adapters by adapter name, one container for each field of `PrefixEncoder`.
        adapters: The model's adapters, by name.
        parallelism: The processes that share the work of the model.
    """

    def __init__(
        self,
        containers: Sequence[nn.ModuleDict],
        adapters: Mapping[str, AdapterInfo],
        parallelism: TensorParallelism | None = None,
    ):
        self._containers, self._adapters, self._parallelism = containers, adapters, parallelism
        # Cached keys and values by adapter, with the state of the parameters that they were computed from.
        self._cache: dict[str, tuple[list[tuple[int, int]], dict[PrefixSlot, KeyValues]]] = {}

    def get_encoder(self, adapter_name: str) -> PrefixEncoder:
        """The encoder of an adapter."""
        modules: list[Any] = [c[adapter_name] if adapter_name in c else None for c in self._containers]  # noqa: SIM401
        return PrefixEncoder(*modules)

    def get_dropout(self, adapter_name: str) -> float:
        """The dropout probability that applies now: 0 in eval mode."""
        dropout = self._adapters[adapter_name].dropout
        return dropout if dropout and self.get_encoder(adapter_name).embedding.training else 0.0

    def clear_cache(self, adapter_name: str | None = None) -> None:
        """Drop cached keys and values of one adapter, or of all."""
        if adapter_name is None:
            self._cache.clear()
        else:
            self._cache.pop(adapter_name, None)

    def encode_row(self, row: Row, state: ForwardState) -> None:
        """Encode the trained adapters of a row for all layers at once, for one forward.

        One layer's columns have a gradient as large as the whole table, and each layer would run the first half of the
        MLP again.
        """
        for name, _ in row:
            adapter = self._adapters[name]
            if self._get_layers(name, state) is not None:
                continue
            if self.get_dropout(name):
                whole = self._encode(name, list(adapter.columns), slice(None))
                parts = whole.split([slot.shape.columns for slot in adapter.columns], 1)
                state.encoded[name] = dict(zip(adapter.columns, parts, strict=True))
            else:
                state.prefixes[name] = self._encode_layers(name)

    def drop_outdated(self, call: AdapterCall) -> None:
        """Drop what a call has cached if a parameter of its adapters was written to since the last forward."""
        names = {active.adapter for row in call.rows for active in row}
        written = {name: self.get_writes(name) for name in names}
        if call.written != written:
            call.tensors, call.written = {}, written

    def get(
        self, slot: PrefixSlot, plan: BatchPlan, keys: Tensor, state: ForwardState, call: AdapterCall | None
    ) -> KeyValues:
        """The prefix of a batch for one layer.

        Args:
            slot: The slot of the layer.
            plan: The plan of the batch.
            keys: The layer's new keys `[batch, heads, length, size]`, for batch size, dtype and device.
            state: The state of the forward.
            call: The running call of this thread.

        Returns:
            Keys and values `[1 or batch, heads, n, size]`. The same tensors for the same prefix: the cache view
            recognises them.
        """
        if plan.picked is None:
            row = plan.rows[0]
            if len(row) == 1:
                return self._get_part(row[0], slot, keys, state)
            return self._join_parts(row, slot, keys, state)
        cached = get_tensor_cache(call)
        key = (slot, keys.device, keys.dtype, keys.shape[0])
        if key not in cached:
            rows = [self._join_parts(row, slot, keys, state) for row in plan.rows]
            prefix_keys, prefix_values = (
                torch.cat(side).to(keys.dtype)[plan.picked] for side in zip(*rows, strict=True)
            )
            cached[key] = prefix_keys, prefix_values
        return cached[key]

    def _join_parts(
        self, row: tuple[PrefixPart, ...], slot: PrefixSlot, keys: Tensor, state: ForwardState
    ) -> KeyValues:
        """The prefix of one row `[1, heads, n, size]`; `[batch, heads, n, size]` under dropout."""
        parts = [self._get_part(part, slot, keys, state) for part in row]
        batch = max(part.shape[0] for part, _ in parts)
        joined = [torch.cat([part.expand(batch, -1, -1, -1) for part in side], 2) for side in zip(*parts, strict=True)]
        return joined[0], joined[1]

    def _get_part(self, part: PrefixPart, slot: PrefixSlot, keys: Tensor, state: ForwardState) -> KeyValues:
        name = part.adapter
        if name is None:
            return slot.split(keys.new_zeros(1, part.length, slot.shape.columns))
        dropout = self.get_dropout(name)
        if dropout:
            columns = self._encode_slot(name, slot, state).to(keys.device, keys.dtype)
            return slot.split(F.dropout(columns.expand(keys.shape[0], -1, -1), dropout))
        layers = self._get_layers(name, state)
        pair = slot.split(self._encode_slot(name, slot, state)) if layers is None else layers[slot]
        return pair if pair[0].device == keys.device else (pair[0].to(keys.device), pair[1].to(keys.device))

    def _get_layers(self, adapter_name: str, state: ForwardState) -> dict[PrefixSlot, KeyValues] | None:
        """Keys and values of all layers, cached or encoded now.

        Returns:
            `None` for a trained adapter that `encode_row` has not encoded: the layer encodes its own columns then.
        """
        layers = state.prefixes.get(adapter_name)
        if layers is not None:
            return layers
        parameters, cached = self._get_parameter_state(adapter_name), self._cache.get(adapter_name)
        if parameters is not None:
            if cached is None or cached[0] != parameters:
                with torch.no_grad():
                    cached = self._cache[adapter_name] = parameters, self._encode_layers(adapter_name)
            layers = cached[1]
        elif torch.is_grad_enabled() or not state.rows:
            return None
        else:
            layers = self._encode_layers(adapter_name)
        state.prefixes[adapter_name] = layers
        return layers

    def _encode_layers(self, adapter_name: str) -> dict[PrefixSlot, KeyValues]:
        columns = self._adapters[adapter_name].columns
        whole = self._encode(adapter_name, list(columns), slice(None))
        layers = zip(columns, split_layers(whole, [slot.shape for slot in columns]), strict=True)
        return {slot: slot.cut(pair) for slot, pair in layers}

    def _encode_slot(self, adapter_name: str, slot: PrefixSlot, state: ForwardState) -> Tensor:
        """The columns of one slot, `[1, n, columns]`."""
        encoded = state.encoded.get(adapter_name)
        if encoded is not None:
            return encoded[slot].unsqueeze(0)
        encoder, columns = self.get_encoder(adapter_name), self._adapters[adapter_name].columns[slot]
        if encoder.output is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._encode(adapter_name, [slot], columns).unsqueeze(0)
        # Gradient checkpointing repeats a layer alone, and compares the number of saved tensors with that of the
        # forward, where the encoder had run before the layer. These hooks hide the encoder's tensors from that count.
        with torch.autograd.graph.saved_tensors_hooks(_identity, _identity):
            return self._encode(adapter_name, [slot], columns).unsqueeze(0)

    def _encode(self, adapter_name: str, slots: Sequence[PrefixSlot], columns: slice) -> Tensor:
        """Encode the columns of some slots, `[n, columns]`. Their gradient is that of all processes together."""
        encoded = self.get_encoder(adapter_name).encode(columns)
        if self._parallelism is None:
            return encoded
        counts = [
            (count, size)
            for slot in slots
            if slot.share is not None
            for count, size in (
                (slot.share.key_copies, slot.shape.key_columns),
                (slot.share.value_copies, slot.shape.columns - slot.shape.key_columns),
            )
        ]
        copies = {count for count, size in counts if size}
        if len(copies) == 1:
            return self._parallelism.add_gradients(encoded, copies.pop())
        repeated = [torch.full((size,), count, device=encoded.device) for count, size in counts]
        return self._parallelism.add_gradients(encoded, torch.cat(repeated))

    def _get_parameter_state(self, adapter_name: str) -> list[tuple[int, int]] | None:
        """A value that changes whenever the adapter's parameters do; `None` if its prefix must not be cached.

        For a table the cached keys and values are views of the embedding weight. A frozen MLP is run once.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: torch 2.10 compiles less of the rest
            return None
        encoder = self.get_encoder(adapter_name)
        is_trained = any(parameter.requires_grad for parameter in encoder.parameters())
        if is_trained and (not encoder.is_plain or torch.is_grad_enabled()):
            return None
        return self.get_writes(adapter_name)

    def get_writes(self, adapter_name: str) -> list[tuple[int, int]]:
        """A value that changes whenever a parameter of an adapter is written to or replaced."""
        return get_writes(self.get_encoder(adapter_name).tensors())


def _identity(tensor: Tensor) -> Tensor:
    return tensor
