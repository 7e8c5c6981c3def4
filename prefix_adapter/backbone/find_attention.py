"""Find the attention modules that take a prefix through their attention function (attention_entry.py).

As in find.py there is no list of models: the probe shows which modules call an attention function, and each of them is
verified with a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import KINDS, AttentionEntry, AttentionTarget, PrefixSlot
from .calls import ENCODER_STATES_ARGUMENTS, ModuleCall, forward_pre_hooks, parameter_names
from .disentangled import find_entry
from .find import FoundTargets, check_gradients, find_cache_argument, select_positions, sort_targets
from .key_values import KeyValueShape
from .masks import is_causal
from .parallel import find_tensor_parallelism
from .plain_attention import PlainAttentionWatch
from .positions import PositionProbe, PositionTarget
from .probe import ProbeError, innermost, probe, untouched
from .unsupported import UnsupportedBackboneError
from .verify import Verifier

_NO_FUNCTION = (
    "its attention modules compute attention themselves, or use transformers' attention interface for a part of it."
)


@dataclass
class _AttentionCall:
    """A call of an attention function in the probe.

    Attributes:
        kind: The kind of attention.
        query_heads: Number of query heads.
        shape: Heads and head sizes of keys and values.
        dtype: The dtype of the keys.
        without_gradient: Whether gradients were off.
        windowed: Whether the module passed a sliding window.
    """

    kind: str
    query_heads: int
    shape: KeyValueShape
    dtype: torch.dtype
    without_gradient: bool
    windowed: bool


@dataclass
class _Recorder:
    """Records the calls of one attention module in the probe.

    Attributes:
        target: The module.
        entry: Its entry.
        order: The numbers of the calls of all modules, in order; shared by all recorders.
        calls: For each call of the module, its number in `order`, its arguments, and the calls of the attention
            function within it (several if the module divides its input, as some image encoders do).
    """

    target: AttentionTarget
    entry: AttentionEntry
    order: list[str]
    calls: list[tuple[int, ModuleCall, list[_AttentionCall]]] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the module."""
        self.calls.append((len(self.order), ModuleCall(self.target.names, args, kwargs), []))
        self.order.append(self.target.name)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention function that the module calls."""
        _, call, within = self.calls[-1]
        states = call.get_first(ENCODER_STATES_ARGUMENTS)
        if states is not None or query.shape[2] != key.shape[2]:
            kind = "cross"
        else:
            kind = "decoder" if is_causal(module, kwargs.get("is_causal")) else "encoder"
        shape = KeyValueShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        gradients, window = torch.is_grad_enabled(), bool(kwargs.get("sliding_window"))
        within.append(_AttentionCall(kind, query.shape[1], shape, key.dtype, not gradients, window))
        return self.entry.attend(module, query, key, value, *args, **kwargs)


def find_attention_targets(model: nn.Module) -> FoundTargets:
    """Run the probe, find the modules that call an attention function, and verify each of them with a prefix.

    Raises:
        UnsupportedBackboneError: If there are none, if one of them treats a prefix wrongly, or if the probe fails.
        ValueError: If the attention implementation cannot show a prefix, or the model is divided over processes in a
            way that a prefix cannot follow.
    """
    parallelism = find_tensor_parallelism(model)
    with untouched(model):
        recorders, positions, plain = _run_probe(model)
        processes = parallelism.size if parallelism else 1
        called = [
            recorder
            for recorder in recorders
            if any(within for *_, within in recorder.calls) and _is_over_tokens(recorder, processes)
        ]
        if not called:
            raise UnsupportedBackboneError(model, _NO_FUNCTION, "attention")
        for recorder in called:
            _complete_target(model, recorder)
        _number_layers(called)
        verifier = Verifier(model, parallelism)
        for recorder in called:
            verifier.verify(recorder.target, recorder.calls[0][1])
    targets = [recorder.target for recorder in called]
    sort_targets(targets)
    unreached = [recorder.target.name for recorder in recorders if not recorder.calls]
    return FoundTargets(targets, [], select_positions(model, positions, targets), unreached, plain, parallelism)


def _run_probe(model: nn.Module) -> tuple[list[_Recorder], list[PositionTarget], list[str]]:
    """Run the probe with a recorder at each module that has an entry.

    Returns:
        The recorders, the position modules, and the names of modules that compute attention without an entry.
    """
    order: list[str] = []
    recorders = [
        _Recorder(AttentionTarget(name, module, parameter_names(module), "", False, entry=entry), entry, order)
        for name, module in model.named_modules()
        if (entry := find_entry(module)) is not None
    ]
    if not recorders:
        raise UnsupportedBackboneError(model, _NO_FUNCTION, "attention")
    # Layers with another kind of memory (hybrids) are layers for the search for positions too.
    with_cache = {name: module for name, module in model.named_modules() if find_cache_argument(module)}
    position_probe = PositionProbe(model, {*(recorder.target.name for recorder in recorders), *innermost(with_cache)})
    watch = PlainAttentionWatch(model, lambda caller: isinstance(caller, _Recorder))

    def begin() -> None:
        position_probe.clear()
        watch.found.clear()
        order.clear()
        for recorder in recorders:
            recorder.calls.clear()

    def count_missed() -> int:
        return sum(not recorder.calls for recorder in recorders)

    # Inside `try`, because an interruption may meet the loop.
    try:
        for recorder in recorders:
            recorder.entry.install(recorder.target.module, recorder.attend)
        position_probe.register()
        with forward_pre_hooks((each.target.module, each.before) for each in recorders), watch:
            probe(model, begin, count_missed)
    except ProbeError as error:
        raise UnsupportedBackboneError(model, str(error), "attention") from error
    finally:
        for recorder in recorders:
            recorder.entry.uninstall(recorder.target.module)
        position_probe.remove_hooks()
    return recorders, position_probe.get_found(), watch.found


def _complete_target(model: nn.Module, recorder: _Recorder) -> None:
    """Check the calls of one module, and set the facts about them in its target, but for its slots."""
    target = recorder.target
    recorder.calls = [call for call in recorder.calls if call[2]]
    calls = [call for *_, within in recorder.calls for call in within]
    check_gradients(model, target, any(call.without_gradient for call in calls), "attention")
    if len({(call.kind, call.shape) for call in calls}) > 1:
        raise UnsupportedBackboneError(
            model,
            f"{target.name} ({type(target.module).__name__}) computes attention of several kinds or shapes.",
            "attention",
        )
    target.dtype, target.windowed = calls[0].dtype, calls[0].windowed


def _is_over_tokens(recorder: _Recorder, processes: int) -> bool:
    """Whether a module attends to tokens: its number of query heads is a setting of the module or of its config.

    Some models use the attention interface for other things, such as a choice among earlier layers for each token.

    Args:
        recorder: The recorder of the module.
        processes: The number of processes among which heads may be divided.
    """
    module = recorder.target.module
    parts = [vars(part) for part in (module, getattr(module, "config", None)) if part is not None]
    values = [value for part in parts for name, value in part.items() if "head" in name]
    flat = [n for value in values for n in (value if isinstance(value, (list, tuple)) else [value])]
    numbers = {n for n in flat if isinstance(n, int)}
    heads = {call.query_heads for *_, within in recorder.calls for call in within}
    return heads <= numbers or {processes * each for each in heads} <= numbers


def _number_layers(recorders: list[_Recorder]) -> None:
    """Give the modules their slots: one for each call in a forward.

    A layer has the number that the modules of its kind of attention call `layer_idx`. Without such numbers, layers
    count as the model runs them. A module that serves several layers (ALBERT) has a slot for each of its calls.
    """
    calls = sorted(
        (order, recorder.target, number, within[0])
        for recorder in recorders
        for number, (order, _, within) in enumerate(recorder.calls)
    )
    for kind in KINDS:
        of_kind = [(target, number, call) for _, target, number, call in calls if call.kind == kind]
        own: list[Any] = [getattr(target.module, "layer_idx", None) for target, _, _ in of_kind]
        known = len(set(own)) == len(own) and all(isinstance(index, int) for index in own)
        for order, (target, number, call) in enumerate(of_kind):
            target.slots[number] = PrefixSlot(kind, own[order] if known else order, call.shape)
    for recorder in recorders:
        if len(recorder.calls) == 1:
            recorder.target.slots = {None: recorder.target.slots[0]}
