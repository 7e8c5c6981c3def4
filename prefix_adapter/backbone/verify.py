"""Verify that an attention module treats a prefix as it should, before the module is trusted with one.

This finds unforeseen uses of masks at wrap time, in place of wrong results in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..private import get_forward_attribute
from .attention import AttentionEntry, AttentionTarget
from .attention_entry import attend_with_prefix
from .calls import CACHE_ARGUMENTS, ModuleCall
from .insert import insert_prefix
from .key_values import HeadShare, KeyValues, KeyValueShape
from .masks import PrefixColumns, SharedValues
from .parallel import TensorParallelism
from .unsupported import UnsupportedBackboneError

# Relative difference of outputs. Wide enough for half precision and TF32: an error in a mask has the size of the
# outputs.
_TOLERANCE = 5e-2
# Tokens of the prefix with which a module is tried.
_PREFIX_LENGTH = 4
# A prefix is tried at these scales. Without a scale in its attention (T5), a module may give all of the softmax to one
# token, and nothing to a prefix with smaller scores.
_SCALES = (1.0, 8.0, 64.0, 512.0)
# The size of a step of the prefix, beside the prefix, in the check of gradients under tensor parallelism.
_STEP = 0.2
# Attributes of a module that tell layers of one kind apart and do not change what they compute.
_LAYER_INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number")


class Verifier:
    """Verifies the attention modules of one model.

    Modules of one class with the same settings behave alike, so only the first of them is run. That bounds the time
    for a large model, in particular if its weights are loaded from the CPU or the disk for each call.

    Args:
        model: The model.
        parallelism: The processes that share the work of the model.
    """

    def __init__(self, model: nn.Module, parallelism: TensorParallelism | None = None):
        self._model, self._parallelism = model, parallelism
        # Results by the settings of a module: `mask_true_means_hidden`, `groups`, `takes_strength` and its share.
        self._results: dict[Hashable, tuple[bool, int, bool, HeadShare | None]] = {}

    def verify(self, target: AttentionTarget, recorded: ModuleCall) -> None:
        """Repeat a recorded call with a prefix, and set what the target does with masks.

        A hidden prefix must change nothing. A visible one must change something, and must give the same with a mask
        that shows it as without a mask. If something can be added to its scores, two copies of it at half the strength
        are equal to it. Where positions matter, which differ between the copies, adding nothing to the scores must
        change nothing, and a large negative number must hide the prefix. If processes divide the heads among them,
        their gradients must add up to the whole gradient of the prefix.

        Args:
            target: The attention module.
            recorded: A call of the module in the probe.

        Raises:
            UnsupportedBackboneError: If the module does something else.
        """
        states = recorded.get(target.names[0])
        if not isinstance(states, Tensor) or states.device.type == "meta":
            return
        key = _get_settings(target, recorded)
        if key not in self._results:
            share = self._run(target, recorded, states)
            self._results[key] = target.mask_true_means_hidden, target.groups, target.takes_strength, share
        target.mask_true_means_hidden, target.groups, target.takes_strength, share = self._results[key]
        if share is not None:
            target.divide(share)

    @torch.enable_grad()
    def _run(self, target: AttentionTarget, recorded: ModuleCall, states: Tensor) -> HeadShare | None:
        shape = next(iter(target.slots.values())).shape
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(1, _PREFIX_LENGTH, shape.columns, generator=generator, device="cpu")
        drawn = drawn.to(states.device, target.dtype)
        own: list[KeyValues] = []

        shown = torch.ones(states.shape[0], _PREFIX_LENGTH, dtype=torch.bool, device=states.device)
        whole, why = PrefixColumns(_PREFIX_LENGTH), ""
        for scale in _SCALES:
            attend = partial(self._attend, target, recorded, own, scale * drawn)
            unseen = False
            for target.mask_true_means_hidden in (False, True):
                try:
                    without, plain = attend(PrefixColumns(0)), attend(whole)
                    hidden = attend(PrefixColumns(_PREFIX_LENGTH, visible=~shown))
                    visible = attend(PrefixColumns(_PREFIX_LENGTH, visible=shown))
                except Exception as error:
                    why = f"fails with one ({type(error).__name__}: {error})"
                    continue
                if not _difference(hidden, without) <= _TOLERANCE:
                    why = "sees a prefix that its mask hides"
                elif not _difference(visible, plain) <= _TOLERANCE:
                    why = "computes something else where a mask shows the prefix than where there is no mask"
                elif _difference(plain, without) == 0 and without.any():
                    why, unseen = "does not see it", True
                else:
                    if target.entry is None:
                        target.groups = getattr(target.module, "num_key_value_groups", 1)
                    if target.groups > 1 and not (plain.any() and _difference(attend(whole), plain) <= _TOLERANCE):
                        target.groups = 1  # the module does not repeat key heads in transformers' usual way
                    if target.shares_bias or target.bias or target.own_mask:
                        cases = [(1, 0.0, plain), (1, -1e4, without)]
                    else:
                        cases = [(2, -math.log(2), plain)]
                    target.takes_strength = all(_takes_bias(attend, *case) for case in cases)
                    if self._parallelism is None:
                        return None
                    attend_with = partial(self._attend, target, recorded, own, columns=whole)
                    try:
                        return _find_share(self._parallelism, attend_with, scale * drawn, shape, own[-1])
                    except ValueError as error:
                        why = f"cannot have one under tensor parallelism: {error}"
                        break
            if not unseen:
                break
        raise UnsupportedBackboneError(
            self._model,
            f"tried with a prefix, {target.name} ({type(target.module).__name__}) {why}.",
            "cache" if target.entry is None else "attention",
        )

    def _attend(
        self,
        target: AttentionTarget,
        recorded: ModuleCall,
        own: list[KeyValues],
        tokens: Tensor,
        columns: PrefixColumns,
    ) -> Tensor:
        """Repeat a recorded call with a prefix of copies of `tokens` `[1, n, columns]`.

        The keys and values that the module computes are appended to `own`.
        """
        prefix = next(iter(target.slots.values())).shape.split(tokens.repeat(1, columns.length // _PREFIX_LENGTH, 1))
        call = ModuleCall(recorded.names, tuple(recorded.args), recorded.kwargs)
        if target.entry is not None:
            for name in CACHE_ARGUMENTS:
                if call.get(name) is not None:
                    call.set(name, None)
            return _run_with_entry(target, target.entry, call, prefix, columns, own)
        call.set(target.cache, None)
        if target.shares_bias:
            # The recorded bias has no columns for a prefix. Each layer can compute the bias itself.
            call.set("position_bias", None)

        def get_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> KeyValues:
            own.append((keys, values))
            return prefix

        insert_prefix(call, target, self._model, columns, get_prefix)
        return _run_module(target, call)


def _run_module(target: AttentionTarget, call: ModuleCall) -> Tensor:
    output = target.module(*call.args, **call.kwargs)
    return (output[0] if isinstance(output, tuple) else output).float()


def _run_with_entry(
    target: AttentionTarget,
    entry: AttentionEntry,
    call: ModuleCall,
    prefix: KeyValues,
    columns: PrefixColumns,
    own: list[KeyValues],
) -> Tensor:
    """Run a module whose prefix enters through its attention function. Without a prefix the module is as it was.

    The keys and values that the module computes are appended to `own`.
    """
    if not columns.length:
        return _run_module(target, call)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        own.append((key, value))
        # A module may divide a batch, or receive the patches of all images in one row.
        visible = None if columns.visible is None else columns.visible[:1].expand(key.shape[0], -1)
        shown = replace(columns, visible=visible)
        return attend_with_prefix(prefix, shown, target, SharedValues(), module, query, key, value, *args, **kwargs)

    entry.install(target.module, attend)
    try:
        return _run_module(target, call)
    finally:
        entry.uninstall(target.module)


def _find_share(
    parallelism: TensorParallelism,
    attend: Callable[[Tensor], Tensor],
    drawn: Tensor,
    shape: KeyValueShape,
    own: KeyValues,
) -> HeadShare:
    """Find out which heads of a module this process computes, and how processes share the gradient of its prefix.

    Args:
        parallelism: The processes.
        attend: Computes the outputs of the module with a prefix.
        drawn: The prefix `[1, n, columns]` of this process, the same in all processes.
        shape: The heads of this process.
        own: Keys and values that the module computes.

    Raises:
        ValueError: If the processes cannot have one prefix together.
    """
    index, parts = parallelism.find_share(own)
    start = drawn.detach().requires_grad_()
    step = _STEP * drawn.flip(-1)
    change = (attend(drawn + step) - attend(drawn - step)).detach() / 2
    (gradient,) = torch.autograd.grad(attend(start), start, change)
    sizes = [shape.key_columns, shape.columns - shape.key_columns]
    sides = [side for side in gradient.split(sizes, -1) if side.numel()]
    copies = [parallelism.count_copies(side) for side in sides]
    products = [(g * s).sum() / n for g, s, n in zip(sides, step.split(sizes, -1), copies, strict=False)]
    parallelism.check_gradient(sum(products, start=gradient.new_zeros(())), change.square().sum())
    return HeadShare(index, parts, copies[0], copies[-1])


def _takes_bias(attend: Callable[[PrefixColumns], Tensor], copies: int, bias: float, expected: Tensor) -> bool:
    """Whether copies of the prefix with something added to their scores have the expected outputs."""
    length = copies * _PREFIX_LENGTH
    try:
        output = attend(PrefixColumns(length, bias=torch.full((1, 1, length), bias, device=expected.device)))
    except Exception:  # any error of a backbone means that it cannot add something
        return False
    return _difference(output, expected) <= _TOLERANCE


def _difference(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return (one - other).abs().max().item() / max(other.abs().max().item(), 1e-6)


def _get_settings(target: AttentionTarget, recorded: ModuleCall) -> Hashable:
    """Everything but the weights that decides how a module treats a prefix. Any doubt makes the settings unique."""
    module = target.module
    # The forward functions are compared, because a user may have patched the forward of one instance.
    bound = [getattr(part, get_forward_attribute(part)) for part in module.modules()]
    forwards = [id(getattr(forward, "__func__", forward)) for forward in bound]
    plain = [
        (name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, type(None))) and name not in _LAYER_INDICES
    ]
    passed = {**dict(zip(recorded.names, recorded.args, strict=False)), **recorded.kwargs}
    inputs = [
        (name, tuple(value.shape), value.dtype, value.device)
        if isinstance(value, Tensor)
        else (name, value if isinstance(value, (bool, int, float, str)) else type(value))
        for name, value in passed.items()
        if name not in _LAYER_INDICES
    ]
    shapes = tuple(slot.shape for slot in target.slots.values())
    places = [(name, str(getattr(each, "placements", None))) for name, each in module.named_parameters()]
    found = target.kind, target.dtype, target.cache, target.bias, target.shares_bias, target.own_mask, target.windowed
    return (type(module), tuple(plain), tuple(inputs), tuple(forwards), tuple(places), shapes, found)
