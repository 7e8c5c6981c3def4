"""What an attention module is called with, and how its cache, masks and biases make room for a prefix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import PrefixOf, with_prefix
from .causal import CausalMask, without_mask
from .key_values import KeyValueShape

T = TypeVar("T")

KINDS = ("encoder", "decoder", "cross")
# Names of the cache argument of attention modules and backbones: `cache` from transformers 5.24 on. A module whose
# argument has another name is found by its type or by what it is handed (find.py).
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
# What attention modules call their masks, the states of an encoder, and keys and values of other layers.
MASK_ARGUMENTS = ("attention_mask", "mask", "causal_mask", "encoder_attention_mask")
ENCODER_STATES = ("key_value_states", "encoder_hidden_states")
SHARED_STATES = "shared_kv_states"
# Attention implementations whose masks are understood, by the start of their names in transformers.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention")


@dataclass(frozen=True, eq=False)
class Slot:
    """One prefix of keys and values; itself and no other, however alike.

    Attributes:
        kind: `"encoder"`, `"decoder"` or `"cross"`.
        layer: the index that `layers_to_transform` knows it by.
        shape: heads and head sizes of its keys and values.
    """

    kind: str
    layer: int
    shape: KeyValueShape


@dataclass
class AttentionTarget:
    """An attention module that takes a prefix.

    Attributes:
        names: the arguments of its `forward`, in order.
        cache: the argument that takes the cache.
        slots: its prefixes by the layer index with which it updates the cache (more than one where layers share it).
        dtype: of the keys that it computes.
        shares_bias: whether the first layer of its stack computes a position bias for all (T5).
        bias: the argument with ALiBi's biases where the model hands them to each layer; else `None`.
        slopes: `[heads]`, ALiBi's slopes.
        follows: whether it attends to the keys and values of another module instead of its own (Gemma 3n).
        own_mask: the buffer with which the module hides keys by itself (GPT-Neo's local attention); else `None`.
        true_hides: whether True in its bool masks hides a key (MPT) instead of showing it.
        groups: how many heads of its queries share one of its keys, if it repeats them before attention.
        windowed: whether it hides keys that are further away than a window.
    """

    name: str
    module: nn.Module
    names: list[str]
    cache: str
    encoder_decoder: bool
    slots: dict[int | None, Slot] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shares_bias: bool = False
    bias: str | None = None
    slopes: Tensor | None = None
    true_hides: bool = False
    follows: bool = False
    own_mask: str | None = None
    groups: int = 1
    windowed: bool = False

    @cached_property
    def kind(self) -> str:
        """`"encoder"`, `"decoder"` or `"cross"`."""
        return next(iter(self.slots.values())).kind

    @cached_property
    def stack(self) -> str:
        """What names the layers around it and the kind: all of them are called in a forward, or none."""
        return f"{re.sub(r'[.]?[0-9]+([.].*)?$', '', self.name)} ({self.kind} attention)"

    def slot(self, layer_idx: int | None) -> Slot:
        """The prefix for the layer index that the module passes to its cache."""
        return self.slots[layer_idx] if len(self.slots) > 1 else next(iter(self.slots.values()))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of the module, with its cache under the name that its `forward` has for it.

        A caller may use an older name, which transformers renames inside `forward`, after the hooks.
        """
        call = Call(self.names, args, kwargs)
        if self.cache not in call.kwargs:
            for name in CACHE_ARGUMENTS:
                if name in call.kwargs:
                    call.kwargs[self.cache] = call.kwargs.pop(name)
        return call

    def view(self, inner: Any, length: int, prefix_of: PrefixOf, cross_prefix_of: PrefixOf | None = None) -> Any:
        """What the module is given in place of the cache `inner`."""
        return with_prefix(inner, length, prefix_of, cross_prefix_of, self.encoder_decoder)


class Call:
    """The arguments of one call of a module, by name, however they were passed."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names, self.args, self.kwargs = names, list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """The argument's value; `None` if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        if not self.args or name not in self.names:
            return None
        index = self.names.index(name)
        return self.args[index] if index < len(self.args) else None

    def set(self, name: str, value: Any) -> None:
        """Change the argument where it stands, or add it."""
        index = self.names.index(name) if name in self.names else len(self.args)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value

    def first(self, names: tuple[str, ...]) -> Any:
        """The first of the arguments that was given."""
        return next((value for value in map(self.get, names) if value is not None), None)


def implementation_of(module: nn.Module, model: nn.Module) -> str:
    """The attention implementation in use, which says what its mask looks like.

    transformers keeps it in the config under a private name; there is no public way to read it back.
    """
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


def _checked_implementation(module: nn.Module, model: nn.Module) -> str:
    implementation = implementation_of(module, model)
    check_implementation(implementation)
    return implementation


def check_implementation(implementation: str) -> None:
    """Refuse attention implementations whose masks we cannot widen."""
    if not implementation.startswith(IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported with a prefix. Load the model, or call "
            "`model.set_attn_implementation`, with 'sdpa' or 'eager'."
        )


def put_in_front(
    call: Call,
    target: AttentionTarget,
    model: nn.Module,
    length: int,
    visible: Tensor | None,
    prefix_of: PrefixOf,
    memo: dict[Any, Any] | None = None,
) -> None:
    """Change a module's arguments so that it sees `length` keys and values more: those of a prefix."""
    if length and not (visible is None and _is_token(call, target)):
        make_room(call, target, model, length, visible, memo)
    call.set(target.cache, target.view(call.get(target.cache), length, prefix_of))


def _is_token(call: Call, target: AttentionTarget) -> bool:
    """Whether a module is called for one token of each row that sees all there is: then nothing has to make room.

    A generation asks that for every layer and token, so it is asked without ceremony.
    """
    if len(call.args) > 1 or target.bias is not None or target.own_mask is not None or target.windowed:
        return False
    for name in MASK_ARGUMENTS:
        if call.kwargs.get(name) is not None:
            return False
    states = call.get(target.names[0])
    return isinstance(states, Tensor) and states.shape[1] == 1


def make_room(
    call: Call,
    target: AttentionTarget,
    model: nn.Module,
    length: int,
    visible: Tensor | None,
    memo: dict[Any, Any] | None = None,
) -> None:
    """Widen what a module is given for its keys, masks and biases, on the left by a prefix's columns.

    Args:
        call: the module's arguments, with its own cache still in place; changed in place.
        length: the number of columns.
        visible: bool `[batch, length]` where rows see different parts of the prefix; `None` if all is visible.
        memo: where to keep what is the same for other layers of the forward, such as wide masks.
    """
    memo = {} if memo is None else memo
    # A config takes its time to answer.
    config, ask = getattr(target.module, "config", None), partial(_checked_implementation, target.module, model)
    implementation = _once(memo, "implementation", (config,), ask)
    flash = implementation.startswith("flash_attention")
    if flash and window_of(target.module):
        raise ValueError(
            f"{target.name}: flash attention with a sliding window would hide the prefix behind the window. Use "
            "attn_implementation='sdpa' or 'eager'."
        )
    if target.bias is not None and target.slopes is not None:
        mask = call.first(MASK_ARGUMENTS)
        call.set(target.bias, _widen_bias(call.get(target.bias), target.slopes, length, mask, target.true_hides))
    given = [(name, mask) for name in MASK_ARGUMENTS if (mask := call.get(name)) is not None]
    for name, mask in given:
        widen = partial(widen_mask, mask, length, visible, target.true_hides)
        call.set(name, _once(memo, ("wide", length, target.true_hides), (mask, visible), widen))
    if not given:
        mask = _missing_mask(call, target, implementation, length, visible, memo)
        if mask is not None:
            names = [name for name in MASK_ARGUMENTS if name in call.names]
            # A module that names both (GPT-2) takes the encoder's for cross-attention.
            call.set(names[-1] if target.kind == "cross" else names[0], mask)


def window_of(module: nn.Module) -> Any:
    """A module's sliding window: its own, or the config's where it looks there (Mistral)."""
    config = getattr(module, "config", None)
    shared = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return getattr(module, "sliding_window", shared)


def _once(memo: dict[Any, Any], key: Any, given: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` makes, made once for the layers of a forward with the same key that are given the same objects."""
    if torch.compiler.is_compiling():
        # What a graph holds has no id, and it finds by itself what is made twice.
        return make()
    key = (key, *map(id, given))
    if key not in memo:
        # Beside what is known by its id, so that nothing else gets that.
        memo[key] = given, make()
    return memo[key][1]


def widen_mask(mask: Tensor, length: int, visible: Tensor | None, true_hides: bool = False) -> Tensor:
    """A mask `[..., keys]` with `length` columns more on the left.

    Bool masks are True where a key is seen (or hidden, with `true_hides`), float ones are added to the scores, integer
    ones must be `[batch, keys]`.

    Raises:
        TypeError: for a mask of another kind.
    """
    if not isinstance(mask, Tensor) or (mask.dim() > 2 and not (mask.is_floating_point() or mask.dtype == torch.bool)):
        kind = f"{mask.dtype} mask of {mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"An attention mask that is a {kind} cannot be widened for a prefix.")
    additive = mask.dim() > 2 and mask.is_floating_point()
    seen, hidden = (0.0, torch.finfo(mask.dtype).min) if additive else (1, 0)
    if true_hides and mask.dtype == torch.bool:
        seen, hidden = hidden, seen
    if visible is None:
        return F.pad(mask, (length, 0), value=seen)
    batch, rest = visible.shape[0], mask.shape[1:-1]
    columns = torch.where(visible, mask.new_tensor(seen), mask.new_tensor(hidden))
    columns = columns.view(batch, *(1 for _ in rest), length)
    return torch.cat([columns.expand(batch, *rest, length), mask.expand(batch, *mask.shape[1:])], dim=-1)


def _missing_mask(
    call: Call,
    target: AttentionTarget,
    implementation: str,
    length: int,
    visible: Tensor | None,
    memo: dict[Any, Any],
) -> Tensor | None:
    """The mask where the backbone gave none because a kernel's own rule would do; `None` where it still does.

    sdpa aligns its causal rule to the upper left corner, where the prefix now is, so it needs a mask; flash attention
    aligns to the lower right. Without causality a mask is needed only to hide parts of a prefix.
    """
    states = call.get(call.names[0])
    batch, queries = states.shape[:2]
    causal = queries > 1 and implementation == "sdpa" and target.kind != "cross"
    if causal:
        given = call.get("is_causal")
        causal = bool(getattr(target.module, "is_causal", True) if given is None else given)
    if visible is None and not causal:
        return None
    inner = call.get(target.cache)
    past: int | None = 0
    keys, offset = queries, 0
    if target.kind == "cross":
        keys = call.first(ENCODER_STATES).shape[1]
    elif target.follows:
        # What it follows has put the prefix in already. There is no past where there is no mask.
        shared, module = call.get(SHARED_STATES), target.module
        sources = (getattr(module, "layer_type", None), getattr(module, "kv_shared_layer_index", None))
        keys = next(shared[source] for source in sources if source in shared)[0].shape[2] - length
    elif inner is not None:
        # Of this layer: those before it have already stored this call's keys, as it has in earlier rounds itself.
        past, layer_idx = min((inner.get_seq_length(index or 0), index or 0) for index in target.slots)
        keys, offset = inner.get_mask_sizes(queries, layer_idx)
    past = past if causal else None
    groups = target.groups if torch.is_grad_enabled() else 1
    key = ("mask", implementation, batch, queries, keys, past, offset, length, states.device, states.dtype, groups)
    make = partial(_make_mask, states, keys, past, offset, implementation, length, visible, groups)
    return _once(memo, key, (visible,), make)


def _make_mask(
    states: Tensor,
    keys: int,
    past: int | None,
    offset: int,
    implementation: str,
    length: int,
    visible: Tensor | None,
    groups: int,
) -> Tensor:
    """A mask with a prefix in front; causal behind `past` tokens if that is not `None`."""
    batch, queries, device = *states.shape[:2], states.device
    if implementation.startswith("flash_attention"):
        return widen_mask(torch.ones(batch, keys, dtype=torch.bool, device=device), length, visible)
    square = visible is None and offset == 0 and past == 0 and keys == queries
    if square and (groups > 1 or without_mask(queries, length)) and not torch.compiler.is_compiling():
        return CausalMask(queries, length, device, groups)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if past is not None:
        positions = torch.arange(queries, device=device) + past
        mask = mask & (torch.arange(keys, device=device) + offset <= positions[:, None])
    mask = widen_mask(mask, length, visible)
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    return mask


def _widen_bias(bias: Tensor, slopes: Tensor, length: int, mask: Any, true_hides: bool) -> Tensor:
    """ALiBi (Press et al. 2022) with the prefix right in front of the first key that is seen: it goes on to the left.

    Raises:
        ValueError: if that key differs between rows and the bias does not (MPT): there is no one place for a prefix.
    """
    heads = slopes.numel()
    if isinstance(mask, Tensor) and mask.dim() == 4:
        # MPT hands over biases for the longest input, and takes the last of them.
        bias = bias[..., -mask.shape[-1] :]
    start = bias[..., :1]
    if bias.numel() == heads * bias.shape[-1] and isinstance(mask, Tensor) and mask.dim() == 4:
        # The same for all rows, it counts padding too. (Bloom's starts anew at the first token of each row.)
        last = mask[:, 0, -1]
        first = (last == 0 if last.is_floating_point() or true_hides else last).int().argmax(-1)
        if len(first) > 1 and not torch.compiler.is_compiling() and (first != first[0]).any():
            raise ValueError(
                "The rows of the batch are padded on the left by different lengths, and this model's ALiBi biases, "
                "the same for all rows, would put the prefix at different distances. Pad on the right, or batch "
                "inputs of one length."
            )
        start = bias.index_select(-1, first[:1])
    steps = slopes.to(bias).repeat(bias.numel() // bias.shape[-1] // heads).view(*bias.shape[:-1], 1)
    columns = start + steps * torch.arange(-length, 0, device=bias.device)
    return torch.cat([columns.to(bias.dtype), bias], dim=-1)
