"""The state of one forward of the model. It is created when the forward begins and gone when the forward ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbone.attention import PrefixSlot
from ..backbone.key_values import KeyValues
from ..backbone.masks import SharedValues
from ..tuner.running import PerThread, Row


@dataclass
class ForwardState:
    """The state of one forward of the whole model.

    Attributes:
        rows: The adapters of each row; a single entry if all rows have the same. Empty for a call of a part of the
            model, such as an encoder: no state of it is kept.
        batch: The number of sequences in a mixed batch, if it is known.
        shifts: The position shift of each row, by kind of attention.
        called: The indices of targets that received a prefix.
        calls: How often targets that serve several layers were called, by their index.
        served: The indices of targets that asked the cache view for their prefix.
        prefixes: Keys and values by adapter and slot.
        encoded: Columns `[n, columns of the slot]` by adapter and slot, if `prefix_dropout` is still to be applied.
        shared: Masks and other values that several layers use.
    """

    rows: list[Row] = field(default_factory=list)
    batch: int | None = None
    shifts: dict[str, list[int]] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)
    served: set[int] = field(default_factory=set)
    prefixes: dict[str, dict[PrefixSlot, KeyValues]] = field(default_factory=dict)
    encoded: dict[str, dict[PrefixSlot, Tensor]] = field(default_factory=dict)
    shared: SharedValues = field(init=False)

    def __post_init__(self) -> None:
        # Not a default factory: the compiler cannot trace one that is a class of ours.
        self.shared = SharedValues()


class CurrentForward(PerThread):
    """The forward that a thread is in. (`nn.DataParallel` runs each replica in a thread of its own.)

    Attributes:
        state: Its state; `None` outside of a forward.
    """

    state: ForwardState | None = None

    def get(self) -> ForwardState:
        """The state of the forward; a new one, which nobody keeps, in a compiled graph or outside of a forward."""
        return ForwardState() if torch.compiler.is_compiling() else self.state or ForwardState()
