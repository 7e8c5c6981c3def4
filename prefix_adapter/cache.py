"""A view of a key/value cache with a prefix in front: the only file that knows transformers' Cache API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .encoder import Pair, prepend

# The prefix in front of the keys `[batch, heads, length, size]` and values of the layer with the given index, if any.
PrefixOf = Callable[[Tensor, Tensor, Optional[int]], Optional[Pair]]


class _Joined(NamedTuple):
    """What a layer of an inner cache holds, with the prefix in front.

    Attributes:
        prefix: keys and values of the prefix.
        own: those of the layer, a part of `both`.
        both: the prefix and what the layer holds.
    """

    prefix: Pair
    own: Pair
    both: Pair


# By the layer: for as long as its owner keeps it.
_joined: WeakKeyDictionary[DynamicLayer, _Joined] = WeakKeyDictionary()


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
        self._view.used = True
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
        self.used = False

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
        self.used = True
        layer = self._growing(layer_idx)
        if layer is not None:
            return self._grow(layer, key_states, value_states, layer_idx)
        if self._inner is not None:
            key_states, value_states = self._inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.join(key_states, value_states, layer_idx)

    def join(self, keys: Tensor, values: Tensor, layer_idx: Any) -> Pair:
        """Keys and values with the prefix in front."""
        prefix = self.prefix_of(keys, values, layer_idx)
        return (keys, values) if prefix is None else prepend(prefix, keys, values)

    def _growing(self, layer_idx: Any) -> Any:
        """The inner cache's layer, if it does nothing but put new keys and values behind those that it has."""
        inner = self._inner
        if type(inner) is not DynamicCache or not self.length or inner.offloading or layer_idx >= len(inner.layers):
            return None
        layer = inner.layers[layer_idx]
        return layer if type(layer) is DynamicLayer else None

    def _grow(self, layer: Any, key_states: Tensor, value_states: Tensor, layer_idx: Any) -> Pair:
        """Do the work of such a layer.

        It copies all that it has for each token, and with the prefix in front that would be copied again. So there is
        one copy of both, and what the layer holds is a part of it.
        """
        prefix = self.prefix_of(key_states, value_states, layer_idx)
        if prefix is None:
            raise ValueError(f"There is no prefix of length {self.length}.")
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        compiled = torch.compiler.is_compiling()
        known = None if compiled else _joined.get(layer)
        if known and known.prefix is prefix and known.own[0] is layer.keys and known.own[1] is layer.values:
            keys = torch.cat([known.both[0], key_states], dim=2)
            both = keys, keys if known.both[0] is known.both[1] else torch.cat([known.both[1], value_states], dim=2)
        else:
            past = [(layer.keys, layer.values)] if layer.get_seq_length() else []
            both = prepend(prefix, key_states, value_states, past)
        layer.keys, layer.values = both[0][:, :, self.length :], both[1][:, :, self.length :]
        if not compiled:
            _joined[layer] = _Joined(prefix, (layer.keys, layer.values), both)
        return both

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

    @property
    def used(self) -> bool:
        """Whether either side was asked."""
        return self.self_attention_cache.used or self.cross_attention_cache.used

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
        raise TypeError(
            f"`past_key_values` must be a transformers `Cache`, got {type(inner).__name__}. Build a "
            "`DynamicCache` from tuples of keys and values."
        )
    return PrefixCache(inner, length, prefix_of)
