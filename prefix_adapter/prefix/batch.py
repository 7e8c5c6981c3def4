"""Which adapter's prefix goes where: rows with adapters of their own, adapters side by side, layers without."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..backbone.attention import AttentionTarget, Slot
from ..backbone.key_values import Pair

# The adapters of one row of the batch, from left to right; none for the base model.
Row = tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """What is to be known of an adapter besides its parameters.

    Attributes:
        length: virtual tokens.
        dropout: probability.
        shifts: whether it moves the positions of the input behind itself.
        columns: of its table, by the slots that it fills.
    """

    length: int
    dropout: float
    shifts: bool
    columns: dict[Slot, slice]

    def shift(self, kind: str) -> int:
        """By how much it moves the positions in the encoder or the decoder: its length, if it has a prefix there."""
        return self.length if self.shifts and any(slot.kind == kind for slot in self.columns) else 0

    def fills(self, target: AttentionTarget) -> bool:
        """Whether it has a prefix for the target."""
        return any(slot in self.columns for slot in target.slots.values())


class PerThread(threading.local):
    """Attributes that every thread has for itself.

    A copied or unpickled model starts without values: the calls that they belong to are calls of the original.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(eq=False)
class RowCall:
    """One call of the model in one thread: `forward` or `generate` of a `PeftModel`, or a call of an `AdapterPool`.

    It keeps the adapters with which it began: another thread that switches adapters does not change it.

    Attributes:
        names: the `adapter_names` of the call; `None` if it takes the active adapters.
        rows: the adapters of each row; a single entry if all rows have the same.
        outer: the call of the same thread inside which this one was made.
        count_rows: whether the number of rows still has to be compared with the number of names.
        plans: what `make_plan` has made for `names`, by target and batch.
        pairs: the prefixes of the batch, by slot and batch.
        expectations: the targets that are to use a prefix.
    """

    names: list[str] | None
    rows: list[Row]
    outer: RowCall | None = None
    count_rows: bool = False
    plans: dict[Any, Plan | None] = field(default_factory=dict)
    pairs: dict[Any, Pair] = field(default_factory=dict)
    expectations: dict[Any, list[int]] = field(default_factory=dict)

    def switch(self, rows: list[Row]) -> None:
        """Go on with other adapters."""
        self.rows, self.plans, self.pairs, self.expectations = rows, {}, {}, {}


@dataclass(frozen=True)
class Piece:
    """A part of a row's prefix: an adapter's, or blank (`adapter` is `None`), and then hidden."""

    adapter: str | None
    length: int


@dataclass(frozen=True)
class Plan:
    """The prefix of a batch for one target.

    Attributes:
        length: in tokens, the same for all rows; shorter ones are blank on the left.
        rows: the pieces of each different row.
        picked: `[batch]`, the entry of `rows` that each row of the batch takes; `None` for a single entry.
        visible: bool `[batch, length]`, `None` if nothing is blank.
    """

    length: int
    rows: list[tuple[Piece, ...]]
    picked: Tensor | None
    visible: Tensor | None


def check_names(names: int, batch: int, replica: bool) -> None:
    """Compare the number of `adapter_names` with that of the rows.

    Args:
        names: how many names there are.
        batch: how many rows.
        replica: whether the model is a copy that `nn.DataParallel` has made for a part of the batch.

    Raises:
        ValueError: if they differ.
    """
    if names != batch:
        split = " `nn.DataParallel` splits the batch but not the names: call the model without it." if replica else ""
        raise ValueError(f"`adapter_names` has {names} names for a batch of {batch}.{split}")


def describe(slots: Iterable[Slot]) -> str:
    """Slots in words: kind, layers, and heads x size of their keys + values."""
    parts = []
    for (kind, shape), group in groupby(slots, key=lambda slot: (slot.kind, slot.shape)):
        layers = ",".join(str(slot.layer) for slot in group)
        keys, values = f"{shape.key_heads}x{shape.key_size}", f"{shape.value_heads}x{shape.value_size}"
        parts.append(f"{kind} {layers}: {keys}+{values}")
    return "; ".join(parts)


def make_plan(rows: list[Row], adapters: dict[str, Adapter], target: AttentionTarget, states: Tensor) -> Plan | None:
    """What to put in front of a target that is given hidden states `[batch, ...]`; `None` if nothing."""
    distinct = list(dict.fromkeys(rows))
    pieces = [_pieces(row, adapters, target) for row in distinct]
    length = max(sum(piece.length for piece in row) for row in pieces)
    if not any(piece.adapter for row in pieces for piece in row) and not (length and target.shares_bias):
        return None
    filled = [_fill(row, length) for row in pieces]
    picked = pick_rows([distinct.index(row) for row in rows], states)
    visible = None
    if any(piece.adapter is None for row in filled for piece in row):
        shown = [[piece.adapter is not None for piece in row for _ in range(piece.length)] for row in filled]
        visible = torch.tensor(shown, device=states.device)
        visible = visible.expand(states.shape[0], -1) if picked is None else visible[picked]
    return Plan(length, filled, picked, visible)


def _pieces(row: Row, adapters: dict[str, Adapter], target: AttentionTarget) -> list[Piece]:
    pieces = []
    for name in row:
        adapter = adapters[name]
        if adapter.fills(target):
            pieces.append(Piece(name, adapter.length))
        elif target.shares_bias and any(slot.kind == target.kind for slot in adapter.columns):
            # A stack that computes its position bias once for all layers has the same columns in all of them.
            pieces.append(Piece(None, adapter.length))
    return pieces


def _fill(row: list[Piece], length: int) -> tuple[Piece, ...]:
    missing = length - sum(piece.length for piece in row)
    return (Piece(None, missing), *row) if missing else tuple(row)


def pick_outputs(outputs: list[Any], batch: int) -> Any:
    """Row by row out of what a module has returned for each: `[batch or 1, ...]` or `[tokens, size]`, or tuples."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(pick_outputs(list(parts), batch) for parts in zip(*outputs, strict=True))
    if first.dim() == 2:
        outputs = [output.unsqueeze(0) for output in outputs]
    batch = max(batch, outputs[0].shape[0])
    stacked = torch.stack([output.expand(batch, *output.shape[1:]) for output in outputs])
    rows = pick_rows(list(range(len(outputs))), stacked[0])
    return stacked[rows, torch.arange(batch, device=stacked.device)]


def pick_rows(entries: list[int], states: Tensor) -> Tensor | None:
    """For each row of a batch `[batch, ...]` its entry, when `entries` has one for each; `None` if all are the same.

    Raises:
        ValueError: if the batch is no multiple of their count.
    """
    batch = states.shape[0]
    if len(entries) > 1 and batch % len(entries):
        raise ValueError(f"`adapter_names` has {len(entries)} names for a batch of {batch}.")
    if len(set(entries)) == 1:
        return None
    # Beams, and the choices of a multiple-choice question, stand beside each other.
    return torch.tensor(entries, device=states.device).repeat_interleave(batch // len(entries))
