"""The plan of a batch: which adapters' prefixes each row gets at one attention module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..backbone.masks import PrefixColumns


@dataclass(frozen=True)
class PrefixPart:
    """A part of a row's prefix: one adapter's, or hidden padding (`adapter` is `None`)."""

    adapter: str | None
    length: int
    strength: float = 1.0


@dataclass(frozen=True)
class BatchPlan:
    """The prefix of a whole batch at one attention module.

    Attributes:
        rows: The parts of each distinct row. All rows are equally long: shorter ones have hidden padding on the left.
        picked: `[batch]`, the entry of `rows` for each row of the batch; `None` if there is one entry for all.
        columns: The columns of the prefix in masks.
    """

    rows: list[tuple[PrefixPart, ...]]
    picked: Tensor | None
    columns: PrefixColumns
