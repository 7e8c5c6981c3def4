"""Find the modules of a backbone that take a prefix, and the shapes of their prefixes.

There is no list of models. The probe shows which modules put keys and values into a cache, and each of them is
verified with a prefix (verify.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from .attention import KINDS, AttentionTarget, EntryPoint, PrefixSlot, get_implementation, get_window
from .cache import GetPrefix
from .calls import (
    CACHE_ARGUMENTS,
    ENCODER_STATES_ARGUMENTS,
    SHARED_STATES_ARGUMENT,
    ModuleCall,
    count_encoder_tokens,
    forward_pre_hooks,
    parameter_names,
)
from .key_values import KeyValueShape
from .parallel import TensorParallelism, find_tensor_parallelism
from .positions import PositionProbe, PositionTarget
from .probe import ProbeError, innermost, probe, untouched
from .unsupported import UnsupportedBackboneError
from .verify import Verifier

_NO_CACHE = "none of its attention modules has an argument for cached keys and values."
_BIAS_ARGUMENTS = ("alibi", "position_bias")


@dataclass
class FoundTargets:
    """The modules of a backbone that an adapter works on.

    Attributes:
        targets: The attention modules: encoder before decoder before cross-attention, layer by layer.
        followers: Modules that attend to the keys and values of a target (Gemma 3n), each with that target.
        positions: The modules that compute or look up positions.
        unreached: The names of attention modules that the probe did not reach, if the prefix enters through the
            attention function. They take no prefix.
        plain: The names of modules that compute attention themselves, in that case. They take no prefix either.
        parallelism: The processes that share the work of the backbone; `None` if each computes the whole.
    """

    targets: list[AttentionTarget]
    followers: list[tuple[AttentionTarget, AttentionTarget]]
    positions: list[PositionTarget]
    unreached: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    parallelism: TensorParallelism | None = None


def find_targets(model: nn.Module) -> FoundTargets:
    """Run the probe, find the modules that take a prefix, and verify each of them.

    Raises:
        UnsupportedBackboneError: If there are none, if one of them treats a prefix wrongly, or if the probe fails.
        ValueError: If the attention implementation cannot show a prefix, or the model is divided over processes in a
            way that a prefix cannot follow.
    """
    parallelism = find_tensor_parallelism(model)
    with untouched(model):
        recorders, positions, output = _run_probe(model)
        targets = [_as_target(model, recorder) for recorder in recorders.values() if recorder.updates]
        _check_complete(model, targets, _get_cache(output))
        _find_biases(model, targets, recorders)
        verifier = Verifier(model, parallelism)
        for target in targets:
            call = recorders[target.name].call
            if call is not None:
                verifier.verify(target, call)
    _number_layers(model, targets)
    followers = []
    for recorder in recorders.values():
        call, target = recorder.call, recorder.target
        if not target.slots and call is not None and call.get(SHARED_STATES_ARGUMENT) is not None:
            source = _find_source(model, target, targets)
            target.follows, target.slots = True, source.slots
            followers.append((target, source))
    calls = [recorders[target.name].call for target in targets if target.kind != "cross"]
    lengths = {_get_attended(call, "self")[1] for call in calls if call is not None}
    positions = select_positions(model, positions, targets, lengths)
    return FoundTargets(targets, followers, positions, parallelism=parallelism)


def find_cache_argument(module: nn.Module, known: tuple[str, ...] = CACHE_ARGUMENTS) -> str | None:
    """The argument of a module's `forward` that takes a key/value cache: by its type, else by a known name."""
    names, typed = _get_arguments(type(module).forward)
    named = [name for name in known if name in names]
    return next(iter([*(name for name in named if name in typed), *typed, *named]), None)


# ---- The probe


@dataclass
class _Recorder:
    """A forward pre-hook that records the calls of one module in the probe.

    The module receives a view of its cache that adds nothing, and records the updates.

    Attributes:
        target: The module.
        call: Its last call.
        without_gradient: Whether gradients were off in one of its calls.
        cached: Whether it received a cache.
        updates_per_call: How often its last call updated a cache.
        updates: The part of the cache (`"self"` or `"cross"`), keys and values, by layer index.
        biases: Position biases in its last call, by argument.
    """

    target: AttentionTarget
    call: ModuleCall | None = None
    without_gradient: bool = False
    cached: bool = False
    updates_per_call: int = 0
    updates: dict[int | None, tuple[str, Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        call = self.target.call(args, kwargs)
        inner = call.get(self.target.cache)
        self.call = self.target.call(args, kwargs)
        self.updates_per_call = 0
        self.without_gradient = self.without_gradient or not torch.is_grad_enabled()
        self.cached = self.cached or inner is not None
        self.biases = {name: call.get(name) for name in _BIAS_ARGUMENTS if name in call.names}
        call.set(self.target.cache, self.target.view(inner, 0, self._record("self"), self._record("cross")))
        return call.arguments()

    def clear(self) -> None:
        """Forget all calls."""
        self.call, self.without_gradient, self.cached, self.updates_per_call = None, False, False, 0
        self.updates, self.biases = {}, {}

    def _record(self, part: str) -> GetPrefix:
        def get_no_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> None:
            # Cross-attention may use a cache of one part (BLIP).
            crosses = self.call is not None and self.call.get_first(ENCODER_STATES_ARGUMENTS) is not None
            self.updates[layer_idx] = ("cross" if crosses else part, keys, values)
            self.updates_per_call += 1

        return get_no_prefix


def _run_probe(model: nn.Module) -> tuple[dict[str, _Recorder], list[PositionTarget], Any]:
    """Run the probe.

    A module may take a prefix if an argument of its `forward` has the type or a known name of a cache. If the probe
    sees a cache under another name, it runs again with that name among the known ones.

    Returns:
        The recorders of modules that may take a prefix, the position modules, and the output of the backbone.
    """
    modules = dict(model.named_modules())
    known: tuple[str, ...] = CACHE_ARGUMENTS
    recorders = _make_recorders(model, modules, known)
    while True:
        passed: set[str] = set()
        positions, output = _run_with_recorders(model, modules, recorders, passed)
        known = (*known, *sorted(passed - {*known}))
        before, recorders = recorders, _make_recorders(model, modules, known)
        if recorders.keys() == before.keys():
            break
    if not before:
        raise UnsupportedBackboneError(model, _NO_CACHE)
    return before, positions, output


def _run_with_recorders(
    model: nn.Module, modules: dict[str, nn.Module], recorders: dict[str, _Recorder], passed: set[str]
) -> tuple[list[PositionTarget], Any]:
    """Run the probe with hooks: the recorders, and one on each other module that adds cache arguments to `passed`."""
    for recorder in recorders.values():
        get_implementation(recorder.target.module, model)
    position_probe = PositionProbe(model, recorders)
    others = partial(_note_cache_argument, passed)

    def begin() -> None:
        position_probe.clear()
        for recorder in recorders.values():
            recorder.clear()

    def count_missed() -> int:
        return sum(recorder.call is None for recorder in recorders.values())

    try:
        with forward_pre_hooks((module, recorders.get(name, others)) for name, module in modules.items()):
            position_probe.register()
            output = probe(model, begin, count_missed)
    except ProbeError as error:
        raise UnsupportedBackboneError(model, str(error) if recorders else _NO_CACHE) from error
    finally:
        position_probe.remove_hooks()
    return position_probe.get_found(), output


def _note_cache_argument(passed: set[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that notes the names of arguments that carry a cache."""
    for name, value in (*zip(parameter_names(module), args, strict=False), *kwargs.items()):
        if isinstance(value, Cache):
            passed.add(name)


def _make_recorders(model: nn.Module, modules: dict[str, nn.Module], known: tuple[str, ...]) -> dict[str, _Recorder]:
    """Recorders for the innermost modules that take a cache.

    Args:
        model: The model.
        modules: Its modules by name.
        known: Names of arguments that take a cache.
    """
    config = getattr(model, "config", None)
    two_parts = bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))
    arguments = {n: argument for n, module in modules.items() if (argument := find_cache_argument(module, known))}
    # A backbone may have a cache argument though its layers have none. It is no attention module.
    return {
        name: _Recorder(AttentionTarget(name, module, parameter_names(module), arguments[name], two_parts))
        for name, module in innermost({name: modules[name] for name in arguments}).items()
        if not hasattr(module, "get_input_embeddings")
    }


@lru_cache(maxsize=1024)
def _get_arguments(forward: Any) -> tuple[list[str], list[str]]:
    """The names of all arguments of a function, and the names of those with the type of a cache."""
    names = list(inspect.signature(forward).parameters)
    try:
        types = get_type_hints(forward)
    except Exception:  # an annotation is code, and may name something that is not imported
        types = {}
    return names, [name for name in names if any(map(_is_cache_type, (types.get(name), *get_args(types.get(name)))))]


def _is_cache_type(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Cache)


def _get_cache(output: Any) -> Any:
    """The cache in a backbone's output: `cache` from transformers 5.24 on, `past_key_values` before."""
    if not isinstance(output, dict):
        return None
    # Only names that it has: transformers 5.24 warns when it is asked for the old one.
    return next((output[name] for name in ("cache", "past_key_values") if name in list(output)), None)


# ---- From records to targets


def _as_target(model: nn.Module, recorder: _Recorder) -> AttentionTarget:
    """Complete the target of a recorder from its records."""
    target = recorder.target
    if recorder.updates_per_call > 1:
        raise UnsupportedBackboneError(
            model,
            f"{target.name} ({type(target.module).__name__}) keeps the keys and values of several layers at once.",
        )
    check_gradients(model, target, recorder.without_gradient, "cache")
    for layer_idx, (part, keys, values) in recorder.updates.items():
        batch, tokens = (0, 0) if recorder.call is None else _get_attended(recorder.call, part)
        shape = _get_shape(keys, values, batch, tokens)
        if shape is None:
            raise UnsupportedBackboneError(
                model,
                f"{target.name} ({type(target.module).__name__}) caches keys of shape {tuple(keys.shape)} and values "
                f"of {tuple(values.shape)} for {batch} x {tokens} hidden states, not [batch, heads, tokens, size].",
            )
        # The probe asks for a cache, and a backbone passes it to the layers of its decoder alone.
        kind = "cross" if part == "cross" else "decoder" if recorder.cached else "encoder"
        target.slots[layer_idx] = PrefixSlot(kind, -1 if layer_idx is None else layer_idx, shape)
        target.dtype = keys.dtype
    target.own_mask, target.windowed = _find_own_mask(target.module), bool(get_window(target.module))
    return target


def _get_attended(call: ModuleCall, part: str) -> tuple[int, int]:
    """The rows and tokens of the hidden states `[batch, tokens, ...]` that a module computes its keys from."""
    states = call.get(call.names[0])
    if not isinstance(states, Tensor) or states.dim() < 3:
        return 0, 0
    if part == "cross" and call.get_first(ENCODER_STATES_ARGUMENTS) is not None:
        return states.shape[0], count_encoder_tokens(call)
    return states.shape[0], states.shape[1]


def _get_shape(keys: Tensor, values: Tensor, batch: int, tokens: int) -> KeyValueShape | None:
    for tensor in (keys, values):
        if tensor.dim() != 4 or tensor.shape[0] != batch or tensor.shape[2] != tokens:
            return None
    if values is keys:
        # The keys serve as values too (DeepSeek-V4), so the prefix is one tensor as well.
        return KeyValueShape(keys.shape[1], keys.shape[3], 0, 0)
    return KeyValueShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


def _find_own_mask(module: nn.Module) -> str | None:
    """The name of a module's buffer `[1, 1, tokens, tokens]` that says which keys a token sees, if it has one."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype == torch.bool and buffer.dim() == 4 and buffer.shape[2] == buffer.shape[3] > 1:
            return name
    return None


def _find_biases(model: nn.Module, targets: list[AttentionTarget], recorders: dict[str, _Recorder]) -> None:
    """Set the targets' `bias`, `slopes` and `shares_bias`."""
    stacks: dict[str, list[AttentionTarget]] = {}
    for target in targets:
        stacks.setdefault(target.stack, []).append(target)
    for stack in stacks.values():
        for target in stack:
            for name, bias in recorders[target.name].biases.items():
                if recorders[stack[0].name].biases.get(name) is None:
                    # The first layer computes the bias, with the prefix in view, and passes it on.
                    target.shares_bias = True
                elif bias is not None:
                    steps = bias.detach().diff(dim=-1)
                    linear = bias.is_meta or torch.allclose(steps, steps[..., -1:].expand_as(steps), rtol=5e-2)
                    if not linear:
                        raise UnsupportedBackboneError(
                            model, f"{target.name} adds position biases of which those of a prefix do not follow."
                        )
                    target.bias, target.slopes = name, steps[..., -1].reshape(-1)


def _number_layers(model: nn.Module, targets: list[AttentionTarget]) -> None:
    """Give layers without an index the next index of their kind, and sort the targets."""
    for kind in KINDS:
        unnumbered = [target for target in targets if target.kind == kind and target.slots.keys() == {None}]
        for order, target in enumerate(unnumbered):
            target.slots = {None: replace(target.slots[None], layer=order)}
    sort_targets(targets)
    slots = [(slot.kind, slot.layer) for target in targets for slot in target.slots.values()]
    if len(set(slots)) < len(slots):
        raise UnsupportedBackboneError(model, "several of its attention modules share one layer of the cache.")


def sort_targets(targets: list[AttentionTarget]) -> None:
    """Sort targets: encoder before decoder before cross-attention, layer by layer."""
    targets.sort(key=lambda target: (KINDS.index(target.kind), min(slot.layer for slot in target.slots.values())))


def check_gradients(
    model: nn.Module, target: AttentionTarget, without_gradient: bool, entry_point: EntryPoint
) -> None:
    """Check that the probe did not find gradients turned off in a module.

    Raises:
        UnsupportedBackboneError: If they were off in one of its calls.
    """
    if without_gradient and not torch.is_inference_mode_enabled():
        raise UnsupportedBackboneError(
            model,
            f"it runs {target.name} without gradients in part, so a prefix there could not be trained.",
            entry_point,
        )


def _check_complete(model: nn.Module, targets: list[AttentionTarget], cache: Any) -> None:
    """Refuse a backbone with layers that store keys and values unseen: those would silently have no prefix."""
    if not targets:
        raise UnsupportedBackboneError(model, "none of its attention modules puts its keys and values into a cache.")
    # A cache of one part has the layers of cross-attention too (Mllama).
    kinds = ("decoder",) if isinstance(cache, EncoderDecoderCache) else ("decoder", "cross")
    cache = getattr(cache, "self_attention_cache", cache)
    stored = {
        index
        for index, layer in enumerate(getattr(cache, "layers", []))
        if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()
    }
    missed = stored - {index for target in targets for index in target.slots if target.kind in kinds}
    if missed:
        raise UnsupportedBackboneError(
            model, f"its layers {sorted(missed)} cache keys and values in a way that leaves no room for a prefix."
        )


def _find_source(model: nn.Module, follower: AttentionTarget, targets: list[AttentionTarget]) -> AttentionTarget:
    """The target whose keys and values a follower attends to: the last one before it with its type of attention.

    transformers passes them on in a dictionary by layer type (`KVSharingDict`), without their source.
    """
    layer_type, index = getattr(follower.module, "layer_type", None), getattr(follower.module, "layer_idx", -1)
    before = [
        target
        for target in targets
        if getattr(target.module, "layer_type", None) == layer_type and getattr(target.module, "layer_idx", -1) < index
    ]
    if not before:
        raise UnsupportedBackboneError(
            model, f"{follower.name} shares the keys and values of a layer that is not known."
        )
    return before[-1]


def select_positions(
    model: nn.Module, positions: list[PositionTarget], targets: list[AttentionTarget], lengths: Collection[int] = ()
) -> list[PositionTarget]:
    """The position modules of texts, with their kinds: that of the self-attention with the nearest name.

    Those of other parts of the model, such as a vision tower, are left out. Its limits say nothing about texts, and
    patches stay where they are.

    Args:
        model: The model.
        positions: The position modules that the probe called.
        targets: The attention modules.
        lengths: The numbers of tokens that the targets attended to in the probe, if they are known. Modules that place
            other numbers belong to other parts.
    """
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}

    def is_of_text(position: PositionTarget) -> bool:
        if lengths and position.tokens is not None and position.tokens not in lengths:
            return False
        around = [name for name in models if not name or position.name.startswith(f"{name}.")]
        # Without a model around it, the module stands in a model of the user's own.
        innermost = max(around, key=len, default=None)
        return innermost is None or models[innermost].main_input_name == "input_ids"

    selected = [position for position in positions if is_of_text(position)]
    for position in selected:
        position.kind = max((t for t in targets if t.kind != "cross"), key=partial(_nearness, position.name)).kind
    return selected


def _nearness(name: str, target: AttentionTarget) -> int:
    """How many parts two modules' names have in common."""
    pairs = zip(name.split("."), target.name.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
