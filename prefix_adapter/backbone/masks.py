"""Attention masks and position biases that make room for a prefix."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionTarget, get_implementation, get_window
from .calls import MASK_ARGUMENTS, SHARED_STATES_ARGUMENT, ModuleCall, count_encoder_tokens
from .causal import CausalMask, is_square_faster

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PrefixColumns:
    """The columns that a prefix has in the masks of an attention call, on the left of all keys.

    Attributes:
        length: Prefix length in tokens.
        visible: Bool `[batch, length]` if rows see different parts of the prefix; `None` if all rows see all of it.
        bias: Float `[1 or batch, 1 or heads, length]`, added to the scores of the prefix: the logarithm of its
            strength. `None` if there is nothing to add.
    """

    length: int
    visible: Tensor | None = None
    bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether all rows see all of the prefix, and nothing is added to its scores."""
        return self.visible is None and self.bias is None


class SharedValues:
    """Values that the layers of one forward share, such as wide masks: each is computed by the first layer."""

    def __init__(self) -> None:
        self._values: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}

    def get(self, key: Hashable, inputs: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """The value for a key and for these very input objects; `compute` is called if there is none yet."""
        if torch.compiler.is_compiling():
            # Objects in a graph have no id, and the compiler itself removes repeated computations.
            return compute()
        key = (key, *map(id, inputs))
        if key not in self._values:
            # The inputs are kept, so that no other object gets their id.
            self._values[key] = inputs, compute()
        return self._values[key][1]

    def widen_mask(
        self, mask: Tensor, columns: PrefixColumns, true_means_hidden: bool, implementation: str, dtype: torch.dtype
    ) -> Tensor:
        """The result of `widen_mask`."""
        compute = partial(widen_mask, mask, columns, true_means_hidden, implementation, dtype)
        key = ("wide", columns.length, true_means_hidden, implementation, dtype)
        return self.get(key, (mask, columns.visible, columns.bias), compute)

    def make_mask(
        self, size: MaskSize, implementation: str, columns: PrefixColumns, groups: int = 1
    ) -> Tensor | CausalMask:
        """The result of `make_mask`."""
        compute = partial(make_mask, size, implementation, columns, groups)
        key = ("mask", implementation, size, columns.length, groups)
        return self.get(key, (columns.visible, columns.bias), compute)


def widen_masks(
    call: ModuleCall,
    target: AttentionTarget,
    model: nn.Module,
    columns: PrefixColumns,
    shared: SharedValues | None = None,
) -> None:
    """Add the columns of a prefix on the left of the masks and biases of an attention call.

    Args:
        call: The arguments of the call, with the module's own cache still in place. They are changed in place.
        target: The attention module.
        model: The model.
        columns: The columns of the prefix.
        shared: Values that other layers of the forward have computed.

    Raises:
        ValueError: If the attention implementation cannot show a prefix.
        TypeError: If a mask has an unknown form.
    """
    shared = SharedValues() if shared is None else shared
    # Reading a config takes time, so the answer is shared.
    config, read = getattr(target.module, "config", None), partial(get_implementation, target.module, model)
    implementation = shared.get("implementation", (config,), read)
    check_window(target, implementation, get_window(target.module))
    inverted = target.mask_true_means_hidden
    if target.bias is not None and target.slopes is not None:
        mask = call.get_first(MASK_ARGUMENTS)
        call.set(target.bias, _widen_bias(call.get(target.bias), target.slopes, columns.length, mask, inverted))
    given = [(name, mask) for name in MASK_ARGUMENTS if (mask := call.get(name)) is not None]
    for name, mask in given:
        dtype = call.get(call.names[0]).dtype
        call.set(name, shared.widen_mask(mask, columns, inverted, implementation, dtype))
    if not given:
        mask = _get_missing_mask(call, target, implementation, columns, shared)
        if mask is not None:
            names = [name for name in MASK_ARGUMENTS if name in call.names]
            # A module with two mask arguments (GPT-2) reads the encoder's in cross-attention.
            call.set(names[-1] if target.kind == "cross" else names[0], mask)


def check_window(target: AttentionTarget, implementation: str, window: Any) -> None:
    """Check that a sliding window does not hide the prefix.

    Args:
        target: The attention module.
        implementation: Its attention implementation.
        window: Its sliding window in tokens, if it has one.

    Raises:
        ValueError: If flash attention applies the window, instead of a mask.
    """
    if window and implementation.startswith("flash_attention"):
        raise ValueError(
            f"{target.name}: flash attention with a sliding window would hide the prefix behind the window. Use "
            "attn_implementation='sdpa' or 'eager'."
        )


def widen_mask(
    mask: Tensor,
    columns: PrefixColumns,
    true_means_hidden: bool = False,
    implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Add the columns of a prefix on the left of a mask `[..., keys]`.

    Args:
        mask: A bool mask (True shows a key), a float mask that is added to the scores, or an integer mask
            `[batch, keys]` (1 shows a key).
        columns: The columns of the prefix.
        true_means_hidden: Whether True in a bool mask hides a key.
        implementation: The attention implementation.
        dtype: The dtype of the scores, for a mask that becomes a float mask.

    Returns:
        A mask of the same form; a float mask if `columns.bias` is added to the scores.

    Raises:
        TypeError: For a mask of another form.
        ValueError: If the form of the mask, or the attention implementation, has no place for `columns.bias`.
    """
    if not isinstance(mask, Tensor) or (mask.dim() > 2 and not (mask.is_floating_point() or mask.dtype == torch.bool)):
        kind = f"{mask.dtype} mask of {mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"An attention mask that is a {kind} cannot be widened for a prefix.")
    additive = mask.dim() > 2 and mask.is_floating_point()
    if columns.bias is not None:
        check_bias(implementation)
        if mask.dim() != 4:
            raise ValueError(
                f"The strength of a prefix is added to the scores, and an attention mask of {mask.dim()} dimensions "
                "is not: there is no place for it."
            )
        if not additive:
            hides = mask if true_means_hidden and mask.dtype == torch.bool else ~mask
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(hides, torch.finfo(dtype).min)
        return _widen_with_bias(mask, columns)
    shown, hidden = (0.0, torch.finfo(mask.dtype).min) if additive else (1, 0)
    if true_means_hidden and mask.dtype == torch.bool:
        shown, hidden = hidden, shown
    if columns.visible is None:
        return F.pad(mask, (columns.length, 0), value=shown)
    batch, rest = columns.visible.shape[0], mask.shape[1:-1]
    left = torch.where(columns.visible, mask.new_tensor(shown), mask.new_tensor(hidden))
    left = left.view(batch, *(1 for _ in rest), columns.length)
    return torch.cat([left.expand(batch, *rest, columns.length), mask.expand(batch, *mask.shape[1:])], dim=-1)


def check_bias(implementation: str) -> None:
    """Check that an attention implementation can add something to the scores of a prefix.

    Raises:
        ValueError: If not.
    """
    if implementation.startswith("flash_attention"):
        raise ValueError(
            "Flash attention has no place for the strength of a prefix, which is added to the scores. Use "
            "attn_implementation='sdpa' or 'eager'."
        )


def _widen_with_bias(mask: Tensor, columns: PrefixColumns) -> Tensor:
    """Add columns with a bias on the left of a float mask `[batch, heads, queries, keys]`, each of which may be 1."""
    assert columns.bias is not None
    left = columns.bias.to(mask.dtype)
    if columns.visible is not None:
        left = left.masked_fill(~columns.visible[:, None], torch.finfo(mask.dtype).min)
    left = left.unsqueeze(-2)
    shape = torch.broadcast_shapes(left.shape[:-1], mask.shape[:-1])
    return torch.cat([left.expand(*shape, -1), mask.expand(*shape, -1)], -1)


def _get_missing_mask(
    call: ModuleCall,
    target: AttentionTarget,
    implementation: str,
    columns: PrefixColumns,
    shared: SharedValues,
) -> Tensor | None:
    """The mask for a call that has none; `None` if attention is right without one.

    sdpa's causal rule starts in the upper left corner, where the prefix now is, so it needs a mask. Flash attention's
    rule ends in the lower right corner. Attention that is not causal needs a mask only to hide parts of a prefix or
    to add something to its scores.
    """
    states = call.get(call.names[0])
    batch, queries = states.shape[:2]
    causal = queries > 1 and implementation == "sdpa" and target.kind != "cross"
    if causal:
        causal = is_causal(target.module, call.get("is_causal"))
    if columns.plain and not causal:
        return None
    inner = call.get(target.cache)
    past: int | None = 0
    keys, offset = queries, 0
    if target.kind == "cross":
        keys = count_encoder_tokens(call)
    elif target.follows:
        # The other module's keys include the prefix. There is no past: transformers passes a mask if there is one.
        states_by_source, module = call.get(SHARED_STATES_ARGUMENT), target.module
        sources = (getattr(module, "layer_type", None), getattr(module, "kv_shared_layer_index", None))
        keys = next(states_by_source[source] for source in sources if source in states_by_source)[0].shape[2]
        keys -= columns.length
    elif inner is not None:
        # The shortest of the module's layers: its other layers may have stored this call's keys already.
        past, layer_idx = min((inner.get_seq_length(index or 0), index or 0) for index in target.slots)
        keys, offset = inner.get_mask_sizes(queries, layer_idx)
    size = MaskSize(batch, queries, keys, past if causal else None, offset, states.device, states.dtype)
    groups = target.groups if torch.is_grad_enabled() else 1
    return shared.make_mask(size, implementation, columns, groups)


def is_causal(module: nn.Module, given: bool | None) -> bool:
    """Whether sdpa applies the causal rule in a module: what the caller passes, else the module's own attribute."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


@dataclass(frozen=True)
class MaskSize:
    """The facts about an attention call from which a mask can be made.

    Attributes:
        batch: Rows of the batch.
        queries: Number of queries.
        keys: Number of keys, without the prefix.
        past: How many keys the first query follows, if attention is causal, else `None`.
        offset: The position of the first key.
        device: Device of the states.
        dtype: Dtype of the states.
    """

    batch: int
    queries: int
    keys: int
    past: int | None
    offset: int
    device: torch.device
    dtype: torch.dtype


def make_mask(size: MaskSize, implementation: str, columns: PrefixColumns, groups: int = 1) -> Tensor | CausalMask:
    """A mask for a call that has none, with columns for a prefix.

    Args:
        size: The facts about the call.
        implementation: The attention implementation, which decides the form of the mask.
        columns: The columns of the prefix.
        groups: How many query heads share one key head.

    Raises:
        ValueError: If the attention implementation has no place for `columns.bias`.
    """
    batch, queries, keys, past, device = size.batch, size.queries, size.keys, size.past, size.device
    if implementation.startswith("flash_attention"):
        mask = torch.ones(batch, keys, dtype=torch.bool, device=device)
        return widen_mask(mask, columns, implementation=implementation)
    square = columns.plain and size.offset == 0 and past == 0 and keys == queries
    if square and (groups > 1 or is_square_faster(queries, columns.length)) and not torch.compiler.is_compiling():
        return CausalMask(queries, columns.length, device, groups)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if past is not None:
        positions = torch.arange(queries, device=device) + past
        mask = mask & (torch.arange(keys, device=device) + size.offset <= positions[:, None])
    mask = widen_mask(mask, columns, dtype=size.dtype)
    if implementation == "eager" and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=size.dtype).masked_fill(~mask, torch.finfo(size.dtype).min)
    # Some modules compare the shape of a float mask with that of the scores (LED, MVP).
    return mask if columns.bias is None else mask.expand(batch, -1, -1, -1)


def _widen_bias(bias: Tensor, slopes: Tensor, length: int, mask: Any, true_means_hidden: bool) -> Tensor:
    """Continue ALiBi biases (Press et al. 2022) to the left: the prefix stands before the first key that is shown.

    Raises:
        ValueError: If that key differs between rows and the bias does not (MPT): there is no one place for a prefix.
    """
    heads = slopes.numel()
    if isinstance(mask, Tensor) and mask.dim() == 4:
        # MPT passes biases for the longest input, and uses the last ones.
        bias = bias[..., -mask.shape[-1] :]
    start = bias[..., :1]
    if bias.numel() == heads * bias.shape[-1] and isinstance(mask, Tensor) and mask.dim() == 4:
        # One bias for all rows counts padding too. (Bloom has one for each row, from its first token.)
        last = mask[:, 0, -1]
        first = (last == 0 if last.is_floating_point() or true_means_hidden else last).int().argmax(-1)
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
