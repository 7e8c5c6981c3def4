"""A prefix for attention that takes no cache: it enters through the module's attention function.

Attention modules of transformers look up a function for the attention implementation that their config names, and call
it with query, key, value and mask. Here a module receives a copy of its config that names a function of ours. That
function puts the prefix in front of keys and values, widens the mask, and calls the module's own function. The config
of the backbone stays, and with it the masks that the backbone makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..private import copy_config, find_attention_interface, get_attention_implementation
from .attention import AttentionEntry, AttentionTarget, check_implementation
from .key_values import KeyValues, prepend
from .masks import MaskSize, PrefixColumns, SharedValues, check_window, is_causal

# The name of our function in transformers' attention interface.
_NAME = "prefix_tuning_v2"
# The attribute of a module with the function that ours calls. (transformers copies configs, with all that is in them.)
_FUNCTION = "prefix_tuning_v2_function"


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The function that transformers' interface returns for modules with a prefix."""
    return getattr(module, _FUNCTION)(module, *args, **kwargs)


AttentionInterface.register(_NAME, _attend)


class InterfaceEntry(AttentionEntry):
    """The entry into a module that uses transformers' attention interface.

    Args:
        config: The module's own config, which names the attention implementation.
        interface: The mapping from implementations to functions that the module reads.
        eager: The function for "eager", which is in no mapping; `None` if the module has none.
    """

    def __init__(self, config: Any, interface: Any, eager: Callable[..., Any] | None):
        self._config, self._interface, self._eager = config, interface, eager

    @classmethod
    def find(cls, module: nn.Module) -> InterfaceEntry | None:
        """The entry into a module; `None` if the module does not use the interface."""
        config = getattr(module, "config", None)
        if config is None or isinstance(module, PreTrainedModel):
            # A model names the interface in order to choose an implementation.
            return None
        module_class: Any = type(module)
        found = find_attention_interface(module_class)
        return None if found is None else cls(config, *found)

    @property
    def implementation(self) -> str:
        """The attention implementation that the module's own config names."""
        return check_implementation(self._config)

    def install(self, module: nn.Module, attend: Callable[..., Any]) -> None:
        """Give the module a copy of its config that names our function."""
        setattr(module, _FUNCTION, attend)
        module.config = copy_config(self._config, _NAME)

    def uninstall(self, module: nn.Module) -> None:
        """Give the module its own config back, unless other code has replaced the copy."""
        vars(module).pop(_FUNCTION, None)
        if get_attention_implementation(module.config) == _NAME:
            module.config = self._config

    def attend(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the function that the module's own config names."""
        implementation = self.implementation
        if implementation not in ("sdpa", "eager"):
            # Flash attention reads its implementation from the config of the module that it receives.
            module = copy.copy(module)
            module.config = self._config
        return self._interface.get_interface(implementation, self._eager)(module, *args, **kwargs)


def attend_with_prefix(
    prefix: KeyValues,
    columns: PrefixColumns,
    target: AttentionTarget,
    shared: SharedValues,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Call a module's own attention function with a prefix in front of keys and values.

    Args:
        prefix: Keys and values `[1 or batch, heads, n, size]`.
        columns: The columns of the prefix in masks.
        target: The attention module.
        shared: Values that other layers of the forward have computed.
        module: The module that is called: the target's, or a replica of it.
        query: `[batch, heads, tokens, size]`.
        key: `[batch, key heads, keys, size]`.
        value: As `key`.
        attention_mask: The mask that the module passes.
        **kwargs: The other arguments that the module passes.

    Returns:
        The function's result: outputs and attention weights, the latter with n columns for the prefix in front.

    Raises:
        ValueError: If the attention implementation cannot show a prefix.
        TypeError: If the mask has an unknown form.
    """
    assert target.entry is not None
    implementation = target.entry.implementation
    check_window(target, implementation, kwargs.get("sliding_window"))
    if kwargs.get("cu_seq_lens_k") is not None and implementation.startswith("flash_attention"):
        raise ValueError(
            f"{target.name}: sequences that are packed for flash attention have no place for a prefix in front of "
            "each of them. Use attn_implementation='sdpa' or 'eager', or pad the batch."
        )
    mask: Tensor | None
    if attention_mask is not None:
        inverted = target.mask_true_means_hidden
        mask = shared.widen_mask(attention_mask, columns, inverted, implementation, query.dtype)
    else:
        mask = _make_missing_mask(query, key, columns, implementation, target, shared, kwargs.get("is_causal"))
    bias = kwargs.get("position_bias")
    if bias is not None:
        kwargs["position_bias"] = F.pad(bias, (columns.length, 0))
    keys, values = prepend(prefix, (key, value))
    return target.entry.attend(module, query, keys, values, mask, **kwargs)


def _make_missing_mask(
    query: Tensor,
    key: Tensor,
    columns: PrefixColumns,
    implementation: str,
    target: AttentionTarget,
    shared: SharedValues,
    given: bool | None,
) -> Tensor | None:
    """The mask for a call that has none; `None` if attention is right without one (see masks.py)."""
    causal = implementation == "sdpa" and query.shape[2] > 1 and is_causal(target.module, given)
    if columns.plain and not causal:
        return None
    # sdpa's causal rule starts in the upper left corner, whatever the number of keys.
    past = 0 if causal else None
    size = MaskSize(query.shape[0], query.shape[2], key.shape[2], past, 0, query.device, query.dtype)
    return shared.make_mask(size, implementation, columns)
