"""Keys and values of attention layers as tensors: their shapes, and how a prefix is joined with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Keys and values.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KeyValueShape:
    """Heads and head size of the keys and of the values that one attention layer caches; they may differ (MLA).

    No value heads means that the keys serve as values too.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def key_columns(self) -> int:
        """Numbers in the key of one token; those of the value follow."""
        return self.key_heads * self.key_size

    @property
    def columns(self) -> int:
        """Numbers in the key and the value of one token."""
        return self.key_columns + self.value_heads * self.value_size

    def split(self, prefix: Tensor) -> Pair:
        """`[batch, n, columns]` to keys `[batch, key_heads, n, key_size]` and values, likewise; no copies."""
        # Not two slices: the gradient of each would be as large as both.
        keys, values = prefix.split([self.key_columns, self.columns - self.key_columns], dim=-1)
        keys = keys.unflatten(-1, (self.key_heads, self.key_size)).transpose(1, 2)
        if not self.value_heads:
            return keys, keys
        return keys, values.unflatten(-1, (self.value_heads, self.value_size)).transpose(1, 2)


def split_layers(prefix: Tensor, shapes: list[KeyValueShape]) -> list[Pair]:
    """`[n, columns]` of several layers to the keys and values of each, as `KeyValueShape.split` has them for one.

    Of layers that are alike in a few operations for all, in the backward pass too.
    """
    shape = shapes[0]
    if any(s != shape for s in shapes) or (shape.key_heads, shape.key_size) != (shape.value_heads, shape.value_size):
        parts = prefix.unsqueeze(0).split([s.columns for s in shapes], dim=-1)
        return [s.split(part) for s, part in zip(shapes, parts, strict=True)]
    sides = prefix.unflatten(-1, (1, 2 * len(shapes), shape.key_heads, shape.key_size)).permute(2, 1, 3, 0, 4).unbind()
    return list(zip(sides[::2], sides[1::2], strict=True))


def prepend(prefix: Pair, keys: Tensor, values: Tensor, past: Pair | None = None) -> Pair:
    """Put a prefix `[1 or batch, heads, n, size]` in front of keys and values `[batch, heads, length, size]`.

    Those of the `past` come between the two. A prefix that serves as both gives one tensor that does.
    """
    joined = _join(prefix[0], None if past is None else past[0], keys)
    if prefix[0] is prefix[1]:
        return joined, joined
    return joined, _join(prefix[1], None if past is None else past[1], values)


def _join(prefix: Tensor, past: Tensor | None, states: Tensor) -> Tensor:
    # In decoding each layer does this for every token, so it asks first what need not be done.
    if prefix.dtype != states.dtype or prefix.device != states.device:
        prefix = prefix.to(states.device, states.dtype)
    if prefix.shape[0] != states.shape[0]:
        prefix = prefix.expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states] if past is None else [prefix, past, states], 2)
