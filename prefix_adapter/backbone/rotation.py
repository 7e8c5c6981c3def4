"""How positions turn the keys of a decoder, found out by running its attention modules at two places.

Rotary embeddings turn queries and keys by an angle that grows with the position. Models differ in the columns that
they turn, in the pairs of columns, and in the frequencies, which may differ from layer to layer. So keys of the same
hidden states are computed at two places, and the matrix that maps the ones to the others is the turn. There is no list
of models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from .attention import AttentionTarget, PrefixSlot
from .calls import ModuleCall, forward_pre_hooks
from .filled_cache import fill_cache, run_decoder
from .key_values import KeyValues

# Largest deviation of keys from those that a turn explains, and of the turn from a rotation, in units of the precision
# in which the model computes the angles and cosines of rotary embeddings.
_TOLERANCE = 8


class TurnError(ValueError):
    """Positions change the keys or the values of an attention module in another way than by a rotation."""


class _KeysFound(Exception):
    """Ends the call of a module whose keys and values were found."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values


@torch.no_grad()
def find_turns(model: nn.Module, targets: list[AttentionTarget], shift: int) -> dict[PrefixSlot, Tensor | None]:
    """Find how the keys of a decoder turn when all positions grow by the same number.

    Args:
        model: The decoder. The caller has switched its prefixes off.
        targets: Its attention modules.
        shift: The number of positions.

    Returns:
        For each slot the matrix `[size, size]` in float64 that a key is multiplied by; `None` if positions do not
        change keys.

    Raises:
        TurnError: If positions change keys or values in another way than by a rotation.
    """
    slots = [(target, slot) for target in targets for slot in target.slots.values()]
    # Twice as many keys as a key has numbers, so that they determine the matrix.
    tokens = 2 * max(slot.shape.key_size for _, slot in slots)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    cache = fill_cache({})
    near = _record_calls(model, ids, targets, cache)
    past: dict[int, KeyValues] = {}
    for _, slot in slots:
        stored: Any = cache.layers[slot.layer]
        past[slot.layer] = slot.shape.split(stored.keys.new_zeros(1, shift, slot.shape.columns))
    far = _record_calls(model, ids, targets, fill_cache(past))
    turns: dict[PrefixSlot, Tensor | None] = {}
    for target in targets:
        turn = _find_turn(target, near[target.name], far[target.name], tokens + shift)
        turns.update(dict.fromkeys(target.slots.values(), turn))
    return turns


def _record_calls(
    model: nn.Module, ids: Tensor, targets: list[AttentionTarget], cache: DynamicCache
) -> dict[str, ModuleCall]:
    """The calls of the attention modules in a forward behind a cache, by name."""
    calls: dict[str, ModuleCall] = {}

    def record(target: AttentionTarget) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[target.name] = target.call(args, kwargs)

        return hook

    with forward_pre_hooks((target.module, record(target)) for target in targets):
        run_decoder(model, ids, cache)
    return calls


def _find_turn(target: AttentionTarget, near: ModuleCall, far: ModuleCall, positions: int) -> Tensor | None:
    """The turn of one module between two recorded calls, at fewer than `positions` positions."""
    states = near.get(near.names[0])
    generator = torch.Generator().manual_seed(0)
    # Random matrices and norms of one: the keys then determine the turn, whatever the real weights are, and quantized
    # weights do not matter. Buffers, such as tables of angles, stay.
    weights = {name: _to_double(buffer) for name, buffer in target.module.named_buffers()}
    for name, parameter in target.module.named_parameters():
        drawn = torch.ones(parameter.shape, dtype=torch.float64, device="cpu")
        if parameter.dim() > 1:
            drawn.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        weights[name] = drawn.to(states.device)
    drawn = torch.randn(states.shape, generator=generator, dtype=torch.float64, device="cpu").to(states.device)
    (keys, values), (moved_keys, moved_values) = (_find_keys(target, call, drawn, weights) for call in (near, far))
    if torch.equal(keys, moved_keys) and torch.equal(values, moved_values):
        return None
    # The model has rounded the cosines for each token. The matrix that fits all of them best, and the rotation that is
    # next to it, are much closer to the exact turn.
    fitted = torch.linalg.lstsq(keys, moved_keys).solution.T
    left, _, right = torch.linalg.svd(fitted)
    turn = left @ right
    # Angles are computed in float32 and grow with the position.
    bound = _TOLERANCE * max(torch.finfo(states.dtype).eps, torch.finfo(torch.float32).eps * positions)
    explained = (keys @ turn.T - moved_keys).abs().max() <= bound * moved_keys.abs().max()
    if not (explained and torch.equal(values, moved_values) and (fitted - turn).abs().max() <= bound):
        raise TurnError(
            f"{target.name} ({type(target.module).__name__}) does not turn its keys alone by their positions."
        )
    return turn


def _find_keys(
    target: AttentionTarget, call: ModuleCall, states: Tensor, weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The keys and values `[heads * tokens, size]` of a call with other hidden states and weights, in float64."""

    def stop(keys: Tensor, values: Tensor, layer_idx: int | None) -> None:
        raise _KeysFound(keys, values)

    again = ModuleCall(call.names, tuple(call.args), call.kwargs)
    again.set(again.names[0], states)
    again.set(target.cache, None)
    args, kwargs = tree_map(_to_double, again.arguments())
    again = ModuleCall(call.names, args, kwargs)
    again.set(target.cache, target.view(None, 0, stop))
    try:
        functional_call(target.module, weights, *again.arguments())
    except _KeysFound as found:
        return found.keys.flatten(0, 2), found.values.flatten(0, 2)
    raise TurnError(f"{target.name} ({type(target.module).__name__}) has not stored its keys.")


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
