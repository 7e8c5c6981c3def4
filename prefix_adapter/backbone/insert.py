"""Insert a prefix into one call of an attention module: its masks are widened, and its cache becomes a view."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import AttentionTarget
from .cache import GetPrefix
from .calls import MASK_ARGUMENTS, ModuleCall
from .masks import PrefixColumns, SharedValues, widen_masks


def insert_prefix(
    call: ModuleCall,
    target: AttentionTarget,
    model: nn.Module,
    columns: PrefixColumns,
    get_prefix: GetPrefix,
    shared: SharedValues | None = None,
) -> None:
    """Change the arguments of an attention call, so that the module attends to a prefix too.

    Args:
        call: The arguments; changed in place.
        target: The attention module.
        model: The model.
        columns: The columns of the prefix in masks.
        get_prefix: Returns the prefix's keys and values. The cache view calls it when the module updates the cache.
        shared: Values that other layers of the forward have computed.

    Raises:
        ValueError: If the attention implementation cannot show a prefix.
        TypeError: If a mask or the cache has an unknown form.
    """
    if columns.length and not (columns.plain and _needs_no_mask(call, target)):
        widen_masks(call, target, model, columns, shared)
    call.set(target.cache, target.view(call.get(target.cache), columns.length, get_prefix))


def _needs_no_mask(call: ModuleCall, target: AttentionTarget) -> bool:
    """Whether the call is for one token of each row that sees all keys, without a mask or bias to widen.

    Generation asks this for every layer and token, so the test is short.
    """
    if len(call.args) > 1 or target.bias is not None or target.own_mask is not None or target.windowed:
        return False
    for name in MASK_ARGUMENTS:
        if call.kwargs.get(name) is not None:
            return False
    states = call.get(target.names[0])
    return isinstance(states, Tensor) and states.shape[1] == 1
