"""The plan of a batch: which adapters' prefixes each row gets at one attention module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The adapters of one row of a batch, from left to right. Empty for the base model.
Row = tuple[str, ...]


@dataclass(frozen=True)
class PrefixPart:
    """A part of a row's prefix: one adapter's, or hidden padding (`adapter` is `None`)."""

    adapter: str | None
    length: int


@dataclass(frozen=True)
class BatchPlan:
    """The prefix of a whole batch at one attention module.

    Attributes:
        length: In tokens, the same for all rows. Shorter prefixes have hidden padding on the left.
        rows: The parts of each distinct row.
        picked: `[batch]`, the entry of `rows` for each row of the batch; `None` if there is one entry for all.
        visible: Bool `[batch, length]`; `None` if no part is hidden.
    """

    length: int
    rows: list[tuple[PrefixPart, ...]]
    picked: Tensor | None
    visible: Tensor | None
