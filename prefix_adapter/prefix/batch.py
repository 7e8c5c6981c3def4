"""Which adapter's prefix goes to which row of a batch, at each attention module."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backbone.attention import AttentionTarget, PrefixSlot
from ..backbone.masks import PrefixColumns
from ..tuner.running import AdapterCall, Row, pick_rows
from .plan import BatchPlan, PrefixPart


@dataclass(frozen=True)
class AdapterInfo:
    """The facts about an adapter besides its parameters.

    Attributes:
        length: Number of virtual tokens.
        dropout: Dropout probability.
        shifts: Whether it shifts the positions of the input by its length.
        columns: The columns of its table, by slot.
        strength: The factor of its weight in the softmax of attention, where a call sets no other.
        linears: The columns of its low-rank matrices, of inputs and of outputs, by the name of the linear layer.
    """

    length: int
    dropout: float
    shifts: bool
    columns: dict[PrefixSlot, slice]
    strength: float = 1.0
    linears: dict[str, tuple[slice, slice]] = field(default_factory=dict)

    def get_shift(self, kind: str) -> int:
        """By how much it shifts positions in the encoder or decoder: its length, if it has a prefix there."""
        return self.length if self.shifts and any(slot.kind == kind for slot in self.columns) else 0

    def has_prefix_for(self, target: AttentionTarget, slot: PrefixSlot | None = None) -> bool:
        """Whether it has a prefix for an attention module: for one of its slots, or for any."""
        return any(slot in self.columns for slot in ([slot] if slot else target.slots.values()))


class BatchPlanner:
    """Makes the plans of a model's batches, and caches them.

    The plan for one list of adapters lasts until adapters come or go. Plans of a mixed batch last as long as its
    `adapter_names`: they are in the `AdapterCall`.

    Args:
        targets: The attention modules of the model.
        adapters: The model's adapters, by name.
    """

    def __init__(self, targets: list[AttentionTarget], adapters: Mapping[str, AdapterInfo]):
        self._targets, self._adapters = targets, adapters
        self._plans: dict[Hashable, BatchPlan | None] = {}
        self._expected: dict[Hashable, list[int]] = {}

    def clear(self) -> None:
        """Drop all cached plans."""
        self._plans, self._expected = {}, {}

    def plan(
        self,
        index: int,
        states: Tensor,
        rows: list[Row],
        call: AdapterCall | None,
        slot: PrefixSlot | None = None,
    ) -> BatchPlan | None:
        """The plan for an attention module; `None` if it gets no prefix.

        Args:
            index: The index of the module among the targets.
            states: Its hidden states `[batch, ...]`.
            rows: The adapters of each row; a single entry if all rows have the same.
            call: The running call of this thread.
            slot: The slot that the module's call fills, if the module has several and it is known which.
        """
        mixed = len(rows) > 1
        key = (index, slot, states.device, states.shape[0]) if mixed else (index, slot, rows[0])
        plans = self._plans if call is None or not mixed else call.plans
        if key in plans:
            return plans[key]
        plan = make_plan(rows, self._adapters, self._targets[index], states, slot)
        if mixed or plan is None or plan.columns.visible is None:
            plans[key] = plan
        return plan

    def get_expected(self, rows: list[Row], call: AdapterCall | None, encoder_rests: bool) -> list[int]:
        """The indices of the targets that must use a prefix in a forward.

        Args:
            rows: The adapters of each row.
            call: The running call of this thread.
            encoder_rests: Whether the caller passed the encoder's outputs.
        """
        key = (encoder_rests, rows[0])
        cached = self._expected if call is None or len(rows) == 1 else call.expected
        if key not in cached:
            adapters = [self._adapters[active.adapter] for row in rows for active in row]
            cached[key] = [
                index
                for index, target in enumerate(self._targets)
                if any(adapter.has_prefix_for(target) for adapter in adapters)
                and not (encoder_rests and target.kind == "encoder")
            ]
        return cached[key]


def make_plan(
    rows: list[Row],
    adapters: Mapping[str, AdapterInfo],
    target: AttentionTarget,
    states: Tensor,
    slot: PrefixSlot | None = None,
) -> BatchPlan | None:
    """The prefix of a batch at one attention module with hidden states `[batch, ...]`; `None` if there is none."""
    distinct = list(dict.fromkeys(rows))
    parts = [_get_parts(row, adapters, target, slot) for row in distinct]
    length = max(sum(part.length for part in row) for row in parts)
    if not any(part.adapter for row in parts for part in row) and not (length and target.shares_bias):
        return None
    padded = [_pad_left(row, length) for row in parts]
    picked = pick_rows([distinct.index(row) for row in rows], states)
    visible = bias = None
    if any(part.adapter is None for row in padded for part in row):
        shown = [[part.adapter is not None for part in row for _ in range(part.length)] for row in padded]
        visible = torch.tensor(shown, device=states.device)
        visible = visible.expand(states.shape[0], -1) if picked is None else visible[picked]
    if any(part.strength != 1 for row in padded for part in row):
        logs = [[math.log(part.strength) for part in row for _ in range(part.length)] for row in padded]
        bias = torch.tensor(logs, device=states.device).unsqueeze(1)
        bias = bias if picked is None else bias[picked]
    return BatchPlan(padded, picked, PrefixColumns(length, visible, bias))


def _get_parts(
    row: Row, adapters: Mapping[str, AdapterInfo], target: AttentionTarget, slot: PrefixSlot | None
) -> list[PrefixPart]:
    parts = []
    for name, strength in row:
        adapter = adapters[name]
        if adapter.has_prefix_for(target, slot):
            parts.append(PrefixPart(name, adapter.length, strength))
        elif target.shares_bias and any(slot.kind == target.kind for slot in adapter.columns):
            # A stack that computes one position bias for all layers needs the same number of columns in all of them.
            parts.append(PrefixPart(None, adapter.length))
    return parts


def _pad_left(row: list[PrefixPart], length: int) -> tuple[PrefixPart, ...]:
    missing = length - sum(part.length for part in row)
    return (PrefixPart(None, missing), *row) if missing else tuple(row)


def pick_outputs(outputs: list[Any], batch: int) -> Any:
    """Combine the outputs that a module has computed for each row's setting: row i of the i-th output.

    Args:
        outputs: For each row `[batch or 1, ...]` or `[tokens, size]`, or tuples of those.
        batch: The number of rows.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(pick_outputs(list(parts), batch) for parts in zip(*outputs, strict=True))
    if first.dim() == 2:
        outputs = [output.unsqueeze(0) for output in outputs]
    batch = max(batch, outputs[0].shape[0])
    stacked = torch.stack([output.expand(batch, *output.shape[1:]) for output in outputs])
    rows = pick_rows(list(range(len(outputs))), stacked[0])
    return stacked[rows, torch.arange(batch, device=stacked.device)]
