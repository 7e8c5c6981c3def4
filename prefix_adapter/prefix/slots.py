"""The slots that an adapter fills: the layers and kinds of attention that its config names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from ..backbone.attention import KINDS, PrefixSlot
from ..backbone.find import FoundTargets
from ..config import PrefixTuningV2Config
from ..messages import shorten


def select_slots(model: nn.Module, found: FoundTargets, config: PrefixTuningV2Config) -> list[PrefixSlot]:
    """The slots of a model that an adapter with a config fills, in the order of its columns.

    Raises:
        ValueError: If the config names layers or kinds of attention that the model does not have, or wants to shift
            positions that cannot be shifted.
    """
    name = type(model).__name__
    # A module that serves several layers lies among other modules: its slots are not next to each other.
    slots = sorted(
        (slot for target in found.targets for slot in target.slots.values()),
        key=lambda slot: (KINDS.index(slot.kind), slot.layer),
    )
    kinds = {slot.kind for slot in slots}
    absent = sorted(set(config.target_attention or ()) - kinds)
    if absent:
        raise ValueError(f"`target_attention` names {absent}, but {name} has only {sorted(kinds)} attention.")
    slots = [slot for slot in slots if slot.kind in (config.target_attention or kinds)]
    wanted: Any = config.layers_to_transform
    if wanted is not None:
        known = {slot.layer for slot in slots}
        unknown = sorted(set(wanted) - known)
        if unknown:
            raise ValueError(
                f"`layers_to_transform` names {shorten(unknown)}, but the layers of {name} that can take a prefix "
                f"are {sorted(known)}."
            )
        slots = [slot for slot in slots if slot.layer in wanted]
        _check_shared_modules(found, slots)
    if config.shift_positions:
        _check_can_shift(name, found)
    return slots


def _check_shared_modules(found: FoundTargets, slots: list[PrefixSlot]) -> None:
    """Check that a module which serves several layers gets prefixes for all of them or for none.

    Its cache shows which layer it serves only after its masks are made. (Its attention function is called later.)
    """
    for target in found.targets:
        layers = {slot.layer: slot in slots for slot in target.slots.values()}
        if target.entry is None and len(set(layers.values())) > 1:
            raise ValueError(
                f"`layers_to_transform`: {target.name} serves layers {sorted(layers)}. Name all of them, or none."
            )


def _check_can_shift(name: str, found: FoundTargets) -> None:
    fixed = [position.name for position in found.positions if not position.movable]
    if fixed:
        raise ValueError(
            f"`shift_positions=True`: {', '.join(fixed)} of {name} counts positions in a way that cannot "
            "be moved. Use `shift_positions=False`."
        )
    relative = any(target.bias or target.shares_bias for target in found.targets)
    if not found.positions and not relative:
        raise ValueError(
            f"`shift_positions=True`: no module of {name} was found to look positions up. Use `shift_positions=False`."
        )


def describe_slots(slots: Iterable[PrefixSlot]) -> str:
    """A text about slots: kind, layers, and heads x head size of the keys + values."""
    parts = []
    for (kind, shape), group in groupby(slots, key=lambda slot: (slot.kind, slot.shape)):
        layers = ",".join(str(slot.layer) for slot in group)
        keys, values = f"{shape.key_heads}x{shape.key_size}", f"{shape.value_heads}x{shape.value_size}"
        parts.append(f"{kind} {layers}: {keys}+{values}")
    return "; ".join(parts)
