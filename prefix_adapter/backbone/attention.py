"""An attention layer that takes a prefix: the facts that the probe found out about it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..private import get_attention_implementation
from .cache import GetPrefix, view_with_prefix
from .calls import CACHE_ARGUMENTS, ModuleCall
from .key_values import HeadShare, KeyValues, KeyValueShape

AttentionKind = Literal["encoder", "decoder", "cross"]
KINDS: tuple[str, ...] = get_args(AttentionKind)
EntryPoint = Literal["cache", "attention"]
ENTRY_POINTS: tuple[str, ...] = get_args(EntryPoint)
# Attention implementations whose masks masks.py can widen, by the start of their names in transformers.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention")
# The name that continuous batching gives eager attention. The masks are the same.
PAGED_EAGER = "paged|eager"


class AttentionEntry(ABC):
    """A way for a prefix into the attention of a module that takes no cache.

    The module computes query, key and value. It then calls a function, which the entry replaces.
    """

    @property
    @abstractmethod
    def implementation(self) -> str:
        """The attention implementation, which decides the form of masks.

        Raises:
            ValueError: If masks.py cannot widen the masks of that implementation.
        """

    @abstractmethod
    def install(self, module: nn.Module, attend: Callable[..., Any]) -> None:
        """Have a module call `attend` with module, query, key, value, mask and keyword arguments."""

    @abstractmethod
    def uninstall(self, module: nn.Module) -> None:
        """Let a module attend by itself again, as before `install`."""

    @abstractmethod
    def attend(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Attend as the module itself does; the arguments are those that `install` passes on."""


@dataclass(frozen=True, eq=False)
class PrefixSlot:
    """A place for one prefix: one layer of one kind of attention. Two slots are never equal, even if they look alike.

    Attributes:
        kind: `"encoder"`, `"decoder"` or `"cross"`.
        layer: The index that `layers_to_transform` knows it by.
        shape: Heads and head sizes of its keys and values, in all processes together.
        share: The heads of this process; `None` without tensor parallelism.
    """

    kind: str
    layer: int
    shape: KeyValueShape
    share: HeadShare | None = None

    def split(self, prefix: Tensor) -> KeyValues:
        """The keys and values of this process in a prefix `[batch, n, columns]`, as views."""
        return self.cut(self.shape.split(prefix))

    def cut(self, whole: KeyValues) -> KeyValues:
        """The keys and values of this process in those of all heads."""
        return whole if self.share is None else self.share.cut(whole)


@dataclass
class AttentionTarget:
    """An attention module that takes a prefix.

    Attributes:
        name: The module's name in the model.
        module: The module.
        names: The arguments of its `forward`, in order.
        cache: The argument that takes the cache; empty if the prefix enters through `entry`.
        encoder_decoder: Whether it belongs to an encoder-decoder model.
        slots: Its prefix slots, by the layer index with which it updates the cache (several if layers share it). If
            the prefix enters through `entry`, by the number of the module's call in a forward, or by `None`.
        dtype: The dtype of the keys that it computes.
        shares_bias: Whether the first layer of its stack computes a position bias for all layers (T5).
        bias: The argument with ALiBi biases if the model passes them to each layer, else `None`.
        slopes: ALiBi's slopes `[heads]`.
        mask_true_means_hidden: Whether True in its bool masks hides a key (MPT), instead of showing it.
        follows: Whether it attends to the keys and values of another module and computes none (Gemma 3n).
        own_mask: The buffer with which the module itself hides keys (GPT-Neo's local attention), else `None`.
        groups: How many of its query heads share one key head, if it repeats key heads before attention.
        windowed: Whether it hides keys that are further away than a sliding window.
        entry: Where the prefix enters; `None` for the cache.
        takes_strength: Whether something can be added to the scores of the prefix.
    """

    name: str
    module: nn.Module
    names: list[str]
    cache: str
    encoder_decoder: bool
    slots: dict[int | None, PrefixSlot] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shares_bias: bool = False
    bias: str | None = None
    slopes: Tensor | None = None
    mask_true_means_hidden: bool = False
    follows: bool = False
    own_mask: str | None = None
    groups: int = 1
    windowed: bool = False
    entry: AttentionEntry | None = None
    takes_strength: bool = False

    @cached_property
    def kind(self) -> str:
        """`"encoder"`, `"decoder"` or `"cross"`."""
        return next(iter(self.slots.values())).kind

    @cached_property
    def stack(self) -> str:
        """The stack of layers and the kind of attention. A forward calls all targets of a stack, or none."""
        return f"{re.sub(r'(^|[.])[0-9]+([.].*)?$', '', self.name)} ({self.kind} attention)"

    def get_slot(self, layer_idx: int | None) -> PrefixSlot:
        """The slot for the layer index that the module passes to its cache."""
        return self.slots[layer_idx] if len(self.slots) > 1 else next(iter(self.slots.values()))

    def divide(self, share: HeadShare) -> None:
        """Note that this process computes a part of the heads: the slots have the shape of all heads from now on."""
        self.slots = {
            key: replace(slot, shape=slot.shape.times(share.parts), share=share) for key, slot in self.slots.items()
        }

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCall:
        """A call of the module, with its cache under the name that its `forward` has for it.

        A caller may use an older name: transformers renames that inside `forward`, after the hooks.
        """
        call = ModuleCall(self.names, args, kwargs)
        if self.cache not in call.kwargs:
            for name in CACHE_ARGUMENTS:
                if name in call.kwargs:
                    call.kwargs[self.cache] = call.kwargs.pop(name)
        return call

    def view(self, inner: Any, length: int, get_prefix: GetPrefix, get_cross_prefix: GetPrefix | None = None) -> Any:
        """The view that the module receives in place of the cache `inner`."""
        return view_with_prefix(inner, length, get_prefix, get_cross_prefix, self.encoder_decoder)


def get_implementation(module: nn.Module, model: nn.Module) -> str:
    """The attention implementation of a module.

    Raises:
        ValueError: If masks.py cannot widen the masks of that implementation.
    """
    return check_implementation(getattr(module, "config", None) or getattr(model, "config", None))


def check_implementation(config: Any) -> str:
    """The attention implementation that a config names.

    Raises:
        ValueError: If masks.py cannot widen the masks of that implementation.
    """
    implementation = get_attention_implementation(config) or "eager"
    if implementation == PAGED_EAGER:
        return "eager"
    if not implementation.startswith(IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported with a prefix. Load the model, or call "
            "`model.set_attn_implementation`, with 'sdpa' or 'eager'."
        )
    return implementation


def get_window(module: nn.Module) -> Any:
    """The sliding window of a module, in tokens: its own, or the config's where it reads that (Mistral)."""
    config = getattr(module, "config", None)
    shared = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return getattr(module, "sliding_window", shared)
