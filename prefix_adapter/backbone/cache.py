"""A view of a key/value cache with a prefix in front: the only file that knows transformers' Cache API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
)

from .key_values import Pair, prepend

# The prefix in front of the keys `[batch, heads, length, size]` and values of the layer with the given index, if any.
PrefixOf = Callable[[Tensor, Tensor, Optional[int]], Optional[Pair]]


# From how many bytes of keys on a cache that grows is given room to do so, and for how many tokens at least. To copy
# less than that takes less time than to write it in place, which takes more calls of torch.
_SMALL, _SPARE = 2**18, 64


@dataclass
class _Room:
    """A prefix, and behind it what a layer of an inner cache holds, in one tensor with room for more.

    To join the two for each token would be to copy the whole context for each token. So the layer's own keys and
    values are a part of this, and new ones are written behind them.

    Attributes:
        prefix: keys and values of the prefix.
        own: those of the layer that was written last, as it was left with them. Layers copied from it share the room
            until one of them is written to, and then it is that one's.
        both: `[batch, heads, length + capacity, size]`; one tensor where keys serve as values too.
    """

    prefix: Pair
    own: Pair
    both: Pair

    @classmethod
    def make(cls, prefix: Pair, own: Pair, new: Pair, capacity: int) -> _Room:
        """Room for `capacity` tokens with keys and values like `new`, and those that a layer holds already in it."""
        length, sides = prefix[0].shape[2], []
        for side in range(1 if prefix[0] is prefix[1] else 2):
            batch, heads, _, size = new[side].shape
            both = new[side].new_zeros(batch, heads, length + capacity, size)
            both[:, :, :length] = prefix[side]
            if own[side].numel():
                both[:, :, length : length + own[side].shape[2]] = own[side]
            sides.append(both)
        return cls(prefix, own, (sides[0], sides[-1]))

    def up_to(self, end: int) -> Pair:
        """The prefix, and what is behind it until `end`."""
        return self.both[0].narrow(2, 0, end), self.both[1].narrow(2, 0, end)

    def leave(self, layer: Any, end: int) -> None:
        """Let the layer have what is behind the prefix until `end` for its own, and remember this."""
        start = self.prefix[0].shape[2]
        self.own = self.both[0].narrow(2, start, end - start), self.both[1].narrow(2, start, end - start)
        layer.keys, layer.values = self.own
        layer.prefix_room = self


def _room_of(layer: Any, prefix: Pair, new: Pair, end: int) -> _Room | None:
    """A layer's room, with the prefix in front, if keys and values like `new` can be written there until `end`."""
    room = getattr(layer, "prefix_room", None)
    # Others may crop, reorder or replace what a layer holds.
    if room is None or room.own[0] is not layer.keys or room.own[1] is not layer.values:
        return None
    both, like, length = room.both[0], new[0], prefix[0].shape[2]
    if room.prefix[0].shape[2] != length or both.shape[0] != like.shape[0] or both.shape[2] < end:
        return None
    # What was made in inference mode cannot be written to outside of it.
    if both.dtype != like.dtype or (both.is_inference() and not torch.is_inference_mode_enabled()):
        return None
    if room.prefix is not prefix:
        for side, states in zip(room.both, prefix, strict=True):
            side[:, :, :length] = states
        room.prefix = prefix
    return room


class _PrefixedLayer:
    """A layer of the inner cache as cross-attention reads it once it is filled: `.keys` and `.values`."""

    def __init__(self, view: PrefixCache, index: int):
        self._view, self._index = view, index

    @property
    def keys(self) -> Tensor:
        return self._both()[0]

    @property
    def values(self) -> Tensor:
        return self._both()[1]

    def _both(self) -> Pair:
        layer: Any = self._view.inner.layers[self._index]
        return self._view.join(layer.keys, layer.values, self._index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view.inner.layers[self._index], name)


class _PrefixedLayers:
    def __init__(self, view: PrefixCache):
        self._view = view

    def __getitem__(self, index: int) -> _PrefixedLayer:
        return _PrefixedLayer(self._view, index)

    def __len__(self) -> int:
        return len(self._view.inner.layers)


class PrefixCache(Cache):
    """What one attention layer is given in place of its cache, or of none.

    The inner cache does its work and never holds the prefix, so it may be of any kind, cropped, reordered or fed back
    by its owner. Whatever the view does not answer itself goes to the inner cache.

    Args:
        inner: the cache that the layer would have been given; `None` if none.
        length: the prefix's length in tokens.
        prefix_of: the prefix itself.
    """

    def __init__(self, inner: Cache | None, length: int, prefix_of: PrefixOf):
        # No `super().__init__()`: the storage is the inner cache's.
        self._inner, self.length, self.prefix_of = inner, length, prefix_of

    @property
    def inner(self) -> Cache:
        """The cache behind the view, an empty one if there is none."""
        if self._inner is None:
            self._inner = DynamicCache()
        return self._inner

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: Any = None, *args: Any, **kwargs: Any
    ) -> Pair:
        """Let the inner cache store the new keys and values, and return them all with the prefix in front."""
        layer, new = self._plain_layer(layer_idx), (key_states, value_states)
        if type(layer) is DynamicLayer:
            return self._grow(layer, new, layer_idx)
        if type(layer) is StaticLayer and not torch.is_grad_enabled():
            return self._fill(layer, new, layer_idx)
        if self._inner is not None:
            new = self._inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.join(*new, layer_idx)

    def join(self, keys: Tensor, values: Tensor, layer_idx: Any) -> Pair:
        """Keys and values with the prefix in front."""
        prefix = self.prefix_of(keys, values, layer_idx)
        return (keys, values) if prefix is None else prepend(prefix, keys, values)

    def _plain_layer(self, layer_idx: Any) -> Any:
        """The inner cache's layer, if all that the cache does is to have it store new keys and values."""
        inner: Any = self._inner
        if type(inner) not in (DynamicCache, StaticCache) or not self.length or inner.offloading:
            return None
        return inner.layers[layer_idx] if layer_idx < len(inner.layers) else None

    def _prefix(self, new: Pair, layer_idx: Any) -> Pair:
        prefix = self.prefix_of(*new, layer_idx)
        if prefix is None:
            raise ValueError(f"There is no prefix of length {self.length}.")
        return prefix

    def _grow(self, layer: Any, new: Pair, layer_idx: Any) -> Pair:
        """Do what `DynamicLayer.update` does: put new keys and values behind those that it holds."""
        prefix = self._prefix(new, layer_idx)
        if not layer.is_initialized:
            layer.lazy_initialization(*new)
        past = layer.get_seq_length()
        start, end = self.length + past, self.length + past + new[0].shape[2]
        # To write into what autograd has kept would spoil it.
        kept = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if kept or (layer.keys if past else new[0]).nbytes < _SMALL:
            both = prepend(prefix, *new, (layer.keys, layer.values) if past else None)
            layer.keys, layer.values = (side.narrow(2, self.length, end - self.length) for side in both)
            return both
        room = _room_of(layer, prefix, new, end)
        if room is None:
            room = _Room.make(prefix, (layer.keys, layer.values), new, end + max(_SPARE, end // 4))
        for side, states in zip(room.both, new, strict=True):
            side.narrow(2, start, end - start).copy_(states)
        room.leave(layer, end)
        return room.up_to(end)

    def _fill(self, layer: Any, new: Pair, layer_idx: Any) -> Pair:
        """Have a `StaticLayer` write into a room that has the prefix in front, and return all of that."""
        prefix = self._prefix(new, layer_idx)
        if torch.compiler.is_compiling():
            return self._fill_compiled(layer, prefix, new)
        if not layer.is_initialized:
            layer.lazy_initialization(*new)
        end = self.length + layer.max_cache_len
        room = _room_of(layer, prefix, new, end)
        if room is None:
            room = _Room.make(prefix, (layer.keys, layer.values), new, layer.max_cache_len)
            room.leave(layer, end)
            # As the layer itself marks what it allocates, for CUDA graphs.
            for side in room.both:
                torch._dynamo.mark_static_address(side)
        layer.update(*new)
        return room.both

    def _fill_compiled(self, layer: Any, prefix: Pair, new: Pair) -> Pair:
        """The same for a graph, which is to know each piece of memory by one name, and that is the room's.

        A first call has made it before: transformers compiles the steps that follow.
        """
        room = getattr(layer, "prefix_room", None)
        if room is None or room.own[0] is not layer.keys or room.prefix[0].shape[2] != self.length:
            return prepend(prefix, *layer.update(*new))
        tokens = torch.arange(new[0].shape[2], device=layer.device) + layer.cumulative_length + self.length
        positions = torch.cat([torch.arange(self.length, device=layer.device), tokens])
        layer.cumulative_length.add_(new[0].shape[2])
        # At once, or the compiler makes a copy of all of the room between the two.
        for side, states in zip(room.both, prepend(prefix, *new), strict=True):
            side.index_copy_(2, positions, states)
        return room.both

    def get_seq_length(self, layer_idx: Any = 0) -> Any:
        """Keys before the new ones, the prefix's included: T5 places its queries by it."""
        if self._inner is None:
            return self.length
        return self._inner.get_seq_length(layer_idx) + self.length

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: an indexer picks tokens by scores of its own, and has none for those of a prefix."""
        raise NotImplementedError("sparse attention with an indexer, which has no scores for the tokens of a prefix")

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """The inner cache's layers with the prefix in front, as cross-attention reads them."""
        return _PrefixedLayers(self)

    def __len__(self) -> int:
        return len(self.inner)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length}, inner={self._inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _delegated(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


# `__getattr__` is not asked for what the Cache class itself defines: send all of that on, but for what is ours.
for _name in vars(Cache):
    if not _name.startswith("_") and _name not in vars(PrefixCache):
        setattr(PrefixCache, _name, _delegated(_name))


class PrefixEncoderDecoderCache(EncoderDecoderCache):
    """The same view for a layer of an encoder-decoder model, whose cache has two sides.

    Args:
        inner: the cache that the layer would have been given; `None` if none.
        length: the prefix's length in tokens.
        prefix_of: the prefix of self-attention.
        cross_prefix_of: that of cross-attention; the same if it is not given.
    """

    def __init__(
        self,
        inner: EncoderDecoderCache | None,
        length: int,
        prefix_of: PrefixOf,
        cross_prefix_of: PrefixOf | None = None,
    ):
        self.inner = inner
        # Not `inner and ...`: a cache without layers is false.
        own, cross = (None, None) if inner is None else (inner.self_attention_cache, inner.cross_attention_cache)
        self.self_attention_cache: Any = PrefixCache(own, length, prefix_of)
        self.cross_attention_cache: Any = PrefixCache(cross, length, cross_prefix_of or prefix_of)
        self.is_updated = {} if inner is None else inner.is_updated

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Self-attention's own; some modules of an encoder (T5Gemma) know no cache of two sides."""
        return self.self_attention_cache.update(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.__dict__.get("inner") is None:
            raise AttributeError(name)
        return getattr(self.inner, name)


def with_prefix(
    inner: Any,
    length: int,
    prefix_of: PrefixOf,
    cross_prefix_of: PrefixOf | None = None,
    encoder_decoder: bool = False,
) -> PrefixCache | PrefixEncoderDecoderCache:
    """A view of `inner` (or of no cache) that puts a prefix in front.

    Args:
        encoder_decoder: the kind of view when there is no inner cache to tell.
    """
    if isinstance(inner, EncoderDecoderCache) or (inner is None and encoder_decoder):
        return PrefixEncoderDecoderCache(inner, length, prefix_of, cross_prefix_of)
    if inner is not None and not isinstance(inner, Cache):
        way_out = (
            "Continuous batching (`generate_batch`) has another kind of cache, which takes no prefix: use `generate`."
            if hasattr(inner, "update")
            else "Build a `DynamicCache` from tuples of keys and values."
        )
        raise TypeError(f"The cache must be a transformers `Cache`, got {type(inner).__name__}. {way_out}")
    return PrefixCache(inner, length, prefix_of)
