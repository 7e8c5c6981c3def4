"""Views of a key/value cache with a prefix in front: the only file that knows transformers' Cache API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
)

from ..private import mark_static_address
from .key_values import KeyValues, prepend

# Returns the prefix for the new keys and values `[batch, heads, length, size]` of the layer with the given index.
# `None` means that there is no prefix.
GetPrefix = Callable[[Tensor, Tensor, Optional[int]], Optional[KeyValues]]

# Minimum key size in bytes at which a growing cache gets preallocated space. Below that, copying is faster: writing in
# place needs more torch calls.
_MIN_BUFFER_BYTES = 2**18
# Minimum number of tokens that a new buffer has space for.
_SPARE_TOKENS = 64


@dataclass
class _PrefixBuffer:
    """One tensor with a prefix, a layer's cached keys (or values) and space for more.

    Without it, each new token would copy the whole context to join it with the prefix. The cache layer's own keys and
    values are views of the buffer, and new tokens are written behind them.

    Attributes:
        prefix: Keys and values of the prefix.
        own: The views that a cache layer received last. Copies of that layer share the buffer until one of them is
            written to; from then on it belongs to that one.
        both: `[batch, heads, length + capacity, size]` for keys and for values.
    """

    prefix: KeyValues
    own: KeyValues
    both: KeyValues

    @classmethod
    def allocate(cls, prefix: KeyValues, own: KeyValues, new: KeyValues, capacity: int) -> _PrefixBuffer:
        """Allocate space for `capacity` tokens like `new`, and copy the layer's tokens `own` into it."""
        length, sides = prefix[0].shape[2], []
        for side in range(1 if prefix[0] is prefix[1] else 2):
            batch, heads, _, size = new[side].shape
            both = new[side].new_zeros(batch, heads, length + capacity, size)
            both[:, :, :length] = prefix[side]
            if own[side].numel():
                both[:, :, length : length + own[side].shape[2]] = own[side]
            sides.append(both)
        return cls(prefix, own, (sides[0], sides[-1]))

    @classmethod
    def find(cls, layer: Any, prefix: KeyValues, new: KeyValues, end: int) -> _PrefixBuffer | None:
        """The buffer of a cache layer, with this prefix in front, if `new` can be written there up to `end`."""
        buffer = getattr(layer, "prefix_buffer", None)
        # Other code may have cropped, reordered or replaced the layer's keys.
        if buffer is None or buffer.own[0] is not layer.keys or buffer.own[1] is not layer.values:
            return None
        both, like, length = buffer.both[0], new[0], prefix[0].shape[2]
        if buffer.prefix[0].shape[2] != length or both.shape[0] != like.shape[0] or both.shape[2] < end:
            return None
        # A tensor of inference mode cannot be written to outside of it.
        if both.dtype != like.dtype or (both.is_inference() and not torch.is_inference_mode_enabled()):
            return None
        if buffer.prefix is not prefix:
            for side, states in zip(buffer.both, prefix, strict=True):
                side[:, :, :length] = states
            buffer.prefix = prefix
        return buffer

    def up_to(self, end: int) -> KeyValues:
        """Keys and values of the prefix and of the tokens up to column `end`."""
        return self.both[0].narrow(2, 0, end), self.both[1].narrow(2, 0, end)

    def assign(self, layer: Any, end: int) -> None:
        """Make the columns between the prefix and `end` the keys and values of a cache layer."""
        start = self.prefix[0].shape[2]
        self.own = self.both[0].narrow(2, start, end - start), self.both[1].narrow(2, start, end - start)
        layer.keys, layer.values = self.own
        layer.prefix_buffer = self


class _PrefixedLayer:
    """A layer of the inner cache with the prefix in front, for cross-attention, which reads `.keys` and `.values`."""

    def __init__(self, view: PrefixCache, index: int):
        self._view, self._index = view, index

    @property
    def keys(self) -> Tensor:
        return self._with_prefix()[0]

    @property
    def values(self) -> Tensor:
        return self._with_prefix()[1]

    def _with_prefix(self) -> KeyValues:
        layer: Any = self._view.inner.layers[self._index]
        return self._view.join((layer.keys, layer.values), self._index)

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
    """A view of a cache with a prefix in front. One attention layer receives it in place of its cache, or of none.

    The inner cache stores tokens as usual and never contains the prefix. So it may be of any kind, and its owner may
    crop it, reorder it or pass it in again. Attributes that the view does not define are those of the inner cache.

    Args:
        inner: The cache that the layer would have received; `None` if there is none.
        length: The prefix length in tokens.
        get_prefix: Returns the prefix.
    """

    def __init__(self, inner: Cache | None, length: int, get_prefix: GetPrefix):
        # No `super().__init__()`: the inner cache has the storage.
        self._inner, self.length, self.get_prefix = inner, length, get_prefix

    @property
    def inner(self) -> Cache:
        """The cache behind the view; a new empty one if there is none."""
        if self._inner is None:
            self._inner = DynamicCache()
        return self._inner

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: Any = None, *args: Any, **kwargs: Any
    ) -> KeyValues:
        """Store new keys and values in the inner cache, and return all of them with the prefix in front."""
        layer, new = self._plain_layer(layer_idx), (key_states, value_states)
        if type(layer) is DynamicLayer:
            return self._update_dynamic(layer, new, layer_idx)
        if type(layer) is StaticLayer and not torch.is_grad_enabled():
            return self._update_static(layer, new, layer_idx)
        if self._inner is not None:
            new = self._inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.join(new, layer_idx)

    def join(self, states: KeyValues, layer_idx: Any) -> KeyValues:
        """Keys and values with the prefix in front."""
        prefix = self.get_prefix(*states, layer_idx)
        return states if prefix is None else prepend(prefix, states)

    def _plain_layer(self, layer_idx: Any) -> Any:
        """The layer of the inner cache, if that cache does no more than pass new keys and values on to it."""
        inner: Any = self._inner
        if type(inner) not in (DynamicCache, StaticCache) or not self.length or inner.offloading:
            return None
        return inner.layers[layer_idx] if layer_idx < len(inner.layers) else None

    def _require_prefix(self, new: KeyValues, layer_idx: Any) -> KeyValues:
        prefix = self.get_prefix(*new, layer_idx)
        if prefix is None:
            raise ValueError(f"There is no prefix of length {self.length}.")
        return prefix

    def _update_dynamic(self, layer: Any, new: KeyValues, layer_idx: Any) -> KeyValues:
        """Do the work of `DynamicLayer.update`, which appends new tokens, in one step with adding the prefix."""
        prefix = self._require_prefix(new, layer_idx)
        if not layer.is_initialized:
            layer.lazy_initialization(*new)
        past = layer.get_seq_length()
        start, end = self.length + past, self.length + past + new[0].shape[2]
        # Autograd may have saved the tensors for the backward pass: do not write to them.
        keep = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if keep or (layer.keys if past else new[0]).nbytes < _MIN_BUFFER_BYTES:
            both = prepend(prefix, new, (layer.keys, layer.values) if past else None)
            layer.keys, layer.values = (side.narrow(2, self.length, end - self.length) for side in both)
            return both
        buffer = _PrefixBuffer.find(layer, prefix, new, end)
        if buffer is None:
            capacity = end + max(_SPARE_TOKENS, end // 4)
            buffer = _PrefixBuffer.allocate(prefix, (layer.keys, layer.values), new, capacity)
        for side, states in zip(buffer.both, new, strict=True):
            side.narrow(2, start, end - start).copy_(states)
        buffer.assign(layer, end)
        return buffer.up_to(end)

    def _update_static(self, layer: Any, new: KeyValues, layer_idx: Any) -> KeyValues:
        """Let a `StaticLayer` write into a buffer that has the prefix in front, and return the whole buffer."""
        prefix = self._require_prefix(new, layer_idx)
        if torch.compiler.is_compiling():
            return self._update_static_compiled(layer, prefix, new)
        if not layer.is_initialized:
            layer.lazy_initialization(*new)
        end = self.length + layer.max_cache_len
        buffer = _PrefixBuffer.find(layer, prefix, new, end)
        if buffer is None:
            buffer = _PrefixBuffer.allocate(prefix, (layer.keys, layer.values), new, layer.max_cache_len)
            buffer.assign(layer, end)
            for side in buffer.both:
                mark_static_address(side)
        layer.update(*new)
        return buffer.both

    def _update_static_compiled(self, layer: Any, prefix: KeyValues, new: KeyValues) -> KeyValues:
        """The same in a compiled graph, which must know each piece of memory by one name: the buffer.

        The buffer exists by then, because transformers compiles only the steps after the first.
        """
        buffer = getattr(layer, "prefix_buffer", None)
        if buffer is None or buffer.own[0] is not layer.keys or buffer.prefix[0].shape[2] != self.length:
            return prepend(prefix, layer.update(*new))
        tokens = torch.arange(new[0].shape[2], device=layer.device) + layer.cumulative_length + self.length
        positions = torch.cat([torch.arange(self.length, device=layer.device), tokens])
        layer.cumulative_length.add_(new[0].shape[2])
        # Prefix and tokens in one operation: between two operations the compiler would copy the whole buffer.
        for side, states in zip(buffer.both, prepend(prefix, new), strict=True):
            side.index_copy_(2, positions, states)
        return buffer.both

    def get_seq_length(self, layer_idx: Any = 0) -> Any:
        """The number of keys before the new ones, prefix included: T5 computes positions of queries from it."""
        if self._inner is None:
            return self.length
        return self._inner.get_seq_length(layer_idx) + self.length

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        """Reject sparse attention: its indexer picks tokens by scores, and prefix tokens have none."""
        raise NotImplementedError("sparse attention with an indexer, which has no scores for the tokens of a prefix")

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """The layers of the inner cache with the prefix in front."""
        return _PrefixedLayers(self)

    def __len__(self) -> int:
        return len(self.inner)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length}, inner={self._inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _delegate(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


# `__getattr__` is not called for attributes of the Cache class itself, so those are delegated one by one.
for _name in vars(Cache):
    if not _name.startswith("_") and _name not in vars(PrefixCache):
        setattr(PrefixCache, _name, _delegate(_name))


class PagedPrefixCache:
    """`PrefixCache` for the cache of continuous batching (`generate_batch`), which is of another kind.

    One call has the tokens of several requests side by side, as one row. Its mask shows each token the keys of its own
    request. All requests see the prefix, so it stands in front once. Other attributes are those of the inner cache.

    Args:
        inner: The cache that the layer would have received.
        length: The prefix length in tokens.
        get_prefix: Returns the prefix.
    """

    def __init__(self, inner: Any, length: int, get_prefix: GetPrefix):
        self._inner, self.length, self.get_prefix = inner, length, get_prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> KeyValues:
        """Store new keys and values, and return those that the requests see, with the prefix in front.

        Raises:
            NotImplementedError: If attention itself is to read the cache, from a table of blocks (flash attention).
        """
        if kwargs.get("block_table") is not None:
            raise NotImplementedError("a prefix in front of a table of blocks. Use attn_implementation='sdpa'.")
        prefix, read = self.get_prefix(key_states, value_states, layer_idx), kwargs["read_index"]
        # A cache that reads nothing returns the new keys and values themselves, which must not be written to.
        reads = not torch.is_grad_enabled() and all(index.numel() for index in read)
        if prefix is None or not reads:
            states: KeyValues = self._inner.update(key_states, value_states, layer_idx, kwargs)
            return states if prefix is None else prepend(prefix, states)
        # Joining would copy all keys and values once more than the cache does. So the cache reads n tokens more, those
        # of its first place, and the prefix is written over what it has read.
        kwargs["read_index"] = [F.pad(index, (self.length, 0)) for index in read]
        states = self._inner.update(key_states, value_states, layer_idx, kwargs)
        for side, columns in zip(states, prefix, strict=True):
            side[:, :, : self.length] = columns
        return states

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching."""
    if cache is None or isinstance(cache, Cache) or not hasattr(cache, "update"):
        return False
    # A late import: it takes time, and who passes such a cache has it imported.
    from transformers.generation.continuous_batching import PagedAttentionCache

    return isinstance(cache, PagedAttentionCache)


class PrefixEncoderDecoderCache(EncoderDecoderCache):
    """`PrefixCache` for a layer of an encoder-decoder model, whose cache has a part for self- and for cross-attention.

    Args:
        inner: The cache that the layer would have received; `None` if there is none.
        length: The prefix length in tokens.
        get_prefix: Returns the prefix of self-attention.
        get_cross_prefix: Returns the prefix of cross-attention; `get_prefix` by default.
    """

    def __init__(
        self,
        inner: EncoderDecoderCache | None,
        length: int,
        get_prefix: GetPrefix,
        get_cross_prefix: GetPrefix | None = None,
    ):
        self.inner = inner
        # `inner is None` and not `not inner`: a cache without layers is falsy.
        own, cross = (None, None) if inner is None else (inner.self_attention_cache, inner.cross_attention_cache)
        self.self_attention_cache: Any = PrefixCache(own, length, get_prefix)
        self.cross_attention_cache: Any = PrefixCache(cross, length, get_cross_prefix or get_prefix)
        self.is_updated = {} if inner is None else inner.is_updated

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Update self-attention's part: some encoder modules (T5Gemma) expect a cache with one part."""
        return self.self_attention_cache.update(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.__dict__.get("inner") is None:
            raise AttributeError(name)
        return getattr(self.inner, name)


def view_with_prefix(
    inner: Any,
    length: int,
    get_prefix: GetPrefix,
    get_cross_prefix: GetPrefix | None = None,
    encoder_decoder: bool = False,
) -> PrefixCache | PagedPrefixCache | PrefixEncoderDecoderCache:
    """A view of a cache with a prefix in front.

    Args:
        inner: The cache; `None` if the layer has none.
        length: The prefix length in tokens.
        get_prefix: Returns the prefix of self-attention.
        get_cross_prefix: Returns the prefix of cross-attention; `get_prefix` by default.
        encoder_decoder: Whether the view has two parts if `inner` is `None`.

    Raises:
        TypeError: If `inner` is no cache of transformers.
    """
    if isinstance(inner, EncoderDecoderCache) or (inner is None and encoder_decoder):
        return PrefixEncoderDecoderCache(inner, length, get_prefix, get_cross_prefix)
    if is_paged(inner):
        return PagedPrefixCache(inner, length, get_prefix)
    if inner is not None and not isinstance(inner, Cache):
        raise TypeError(
            f"The cache must be a transformers `Cache`, got {type(inner).__name__}. Build a `DynamicCache` from "
            "tuples of keys and values."
        )
    return PrefixCache(inner, length, get_prefix)
