"""Keys and values of attention layers as tensors: their shapes, and how a prefix is put in front of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Keys and values. One tensor in both places if the keys serve as values too.
KeyValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HeadShare:
    """The heads that this process computes, if tensor parallelism divides the heads of an attention layer.

    Attributes:
        index: Which part of the heads.
        parts: Number of parts; 1 if each process computes all heads.
        key_copies: How many processes compute the same gradient of the keys of a prefix.
        value_copies: The same for its values.
    """

    index: int
    parts: int
    key_copies: int
    value_copies: int

    def cut(self, whole: KeyValues) -> KeyValues:
        """This process's part of keys and values `[batch, heads, n, size]`, as views."""
        if self.parts == 1:
            return whole
        keys, values = (side.unflatten(1, (self.parts, -1))[:, self.index] for side in whole)
        return (keys, keys) if whole[0] is whole[1] else (keys, values)


@dataclass(frozen=True)
class KeyValueShape:
    """Heads and head sizes of the keys and values that one attention layer caches.

    Keys and values may differ (multi-head latent attention). Zero value heads mean that the keys serve as values.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def key_columns(self) -> int:
        """Numbers in the key of one token."""
        return self.key_heads * self.key_size

    @property
    def columns(self) -> int:
        """Numbers in the key and the value of one token."""
        return self.key_columns + self.value_heads * self.value_size

    def times(self, parts: int) -> KeyValueShape:
        """The shape with so many times the heads."""
        return replace(self, key_heads=parts * self.key_heads, value_heads=parts * self.value_heads)

    def split(self, prefix: Tensor) -> KeyValues:
        """Views of a prefix `[batch, n, columns]`: keys `[batch, key_heads, n, key_size]`, and values likewise."""
        # `split` and not two slices: the gradient of a slice is as large as the whole tensor.
        keys, values = prefix.split([self.key_columns, self.columns - self.key_columns], dim=-1)
        keys = keys.unflatten(-1, (self.key_heads, self.key_size)).transpose(1, 2)
        if not self.value_heads:
            return keys, keys
        return keys, values.unflatten(-1, (self.value_heads, self.value_size)).transpose(1, 2)


def split_layers(prefix: Tensor, shapes: list[KeyValueShape]) -> list[KeyValues]:
    """Split `[n, columns of all layers]` into keys and values of each layer, like `KeyValueShape.split` for one layer.

    Layers of one shape share a few operations, in the backward pass too.
    """
    shape = shapes[0]
    if any(s != shape for s in shapes) or (shape.key_heads, shape.key_size) != (shape.value_heads, shape.value_size):
        parts = prefix.unsqueeze(0).split([s.columns for s in shapes], dim=-1)
        return [s.split(part) for s, part in zip(shapes, parts, strict=True)]
    sides = prefix.unflatten(-1, (1, 2 * len(shapes), shape.key_heads, shape.key_size)).permute(2, 1, 3, 0, 4).unbind()
    return list(zip(sides[::2], sides[1::2], strict=True))


def prepend(prefix: KeyValues, new: KeyValues, past: KeyValues | None = None) -> KeyValues:
    """Concatenate a prefix `[1 or batch, heads, n, size]`, past tokens and new tokens `[batch, heads, length, size]`.

    The result is one tensor in both places if the prefix is.
    """
    keys = _concatenate(prefix[0], None if past is None else past[0], new[0])
    if prefix[0] is prefix[1]:
        return keys, keys
    return keys, _concatenate(prefix[1], None if past is None else past[1], new[1])


def _concatenate(prefix: Tensor, past: Tensor | None, new: Tensor) -> Tensor:
    # Each layer does this for every generated token, and a conversion that changes nothing takes time too.
    if prefix.dtype != new.dtype or prefix.device != new.device:
        prefix = prefix.to(new.device, new.dtype)
    if prefix.shape[0] != new.shape[0]:
        prefix = prefix.expand(new.shape[0], -1, -1, -1)
    return torch.cat([prefix, new] if past is None else [prefix, past, new], 2)
