"""Which modules of a backbone take a prefix, in which shapes; what is refused and why.

There is no list of models: a dummy forward shows which modules put keys and values into a cache, and each is tried out
with a prefix before it is trusted.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, get_args, get_type_hints

import torch
import transformers
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..version import __version__
from .attention import (
    CACHE_ARGUMENTS,
    KINDS,
    SHARED_STATES,
    AttentionTarget,
    Call,
    Slot,
    check_implementation,
    implementation_of,
    put_in_front,
    window_of,
)
from .cache import PrefixOf
from .key_values import KeyValueShape, Pair
from .positions import PositionProbe, PositionTarget
from .probe import PROBE_LENGTH, innermost, parameter_names, probe, untouched

_NO_CACHE = "none of its attention modules has an argument for cached keys and values."
_ALTERNATIVES = {
    "encoder": "BERT, RoBERTa, XLM-RoBERTa, ELECTRA or CamemBERT (all-MiniLM is a BERT of DistilBERT's size)",
    "decoder": "Llama, Qwen, GPT-2 or OPT",
    "encoder-decoder": "T5, BART or mBART",
}


class UnsupportedBackboneError(ValueError):
    """The backbone's attention cannot be given `past_key_values`, so it can take no prefix."""

    def __init__(self, model: nn.Module, why: str):
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if getattr(config, "is_encoder_decoder", False):
            family = "encoder-decoder"
        elif model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            family = "decoder"
        else:
            family = "encoder"
        super().__init__(
            f"{type(model).__name__} cannot take a prefix: {why} P-Tuning v2 puts learned keys and values in front of "
            f"every attention layer by way of `past_key_values` (`cache` from transformers 5.24 on). Backbones of the "
            f"same kind that work: {_ALTERNATIVES[family]}. For this one, use another PEFT method (LoRA, for "
            f"instance).{_untested_transformers()}"
        )


def _untested_transformers() -> str:
    """What to do if the installed transformers is newer or older than those that this package was tested with."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("prefix-adapter") or ()]
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return ""
    tested = next(requirement.specifier for requirement in requirements if requirement.name == "transformers")
    if tested.contains(transformers.__version__, prereleases=True):
        return ""
    return (
        f" transformers {transformers.__version__} is installed, and prefix-adapter {__version__} was tested with "
        f"{tested}. A backbone that worked with one of those versions may work again after: "
        f"pip install 'transformers{tested}'."
    )


@dataclass
class _Record:
    """What the probe saw of a module that names a cache."""

    call: Call | None = None
    without_gradient: bool = False
    cached: bool = False
    at_once: int = 0
    updates: dict[int | None, tuple[str, Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)


class _Recorder:
    """Hook of one candidate during the probe: hands it a view that puts nothing in front and notes what comes by."""

    def __init__(self, target: AttentionTarget):
        self.target, self.record = target, _Record()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        call = self.target.call(args, kwargs)
        inner = call.get(self.target.cache)
        self.record.call = self.target.call(args, kwargs)
        self.record.at_once = 0
        self.record.without_gradient = self.record.without_gradient or not torch.is_grad_enabled()
        self.record.cached = self.record.cached or inner is not None
        self.record.biases = {name: call.get(name) for name in ("alibi", "position_bias") if name in call.names}
        call.set(self.target.cache, self.target.view(inner, 0, self._noting("self"), self._noting("cross")))
        return tuple(call.args), call.kwargs

    def _noting(self, side: str) -> PrefixOf:
        def no_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> None:
            self.record.updates[layer_idx] = (side, keys, values)
            self.record.at_once += 1

        return no_prefix


def _shape_of(keys: Tensor, values: Tensor) -> KeyValueShape | None:
    for tensor in (keys, values):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != PROBE_LENGTH:
            return None
    if values is keys:
        # One tensor serves as both (DeepSeek-V4), and so does one prefix.
        return KeyValueShape(keys.shape[1], keys.shape[3], 0, 0)
    return KeyValueShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


@dataclass
class Finding:
    """What a backbone offers to a prefix.

    Attributes:
        targets: its attention modules, encoder before decoder before cross-attention, layer by layer.
        followers: modules that attend to the keys and values of a target instead of their own (Gemma 3n), by target.
        positions: the modules that turn positions into something.
    """

    targets: list[AttentionTarget]
    followers: list[tuple[AttentionTarget, AttentionTarget]]
    positions: list[PositionTarget]


def find_targets(model: nn.Module) -> Finding:
    """Run `model` on a dummy input to find the modules that take a prefix, and try one out on each.

    Raises:
        UnsupportedBackboneError: if none does, if one of them does not do with it what it should, or if the dummy
            input cannot be run.
        ValueError: if the attention implementation is one whose masks are not understood.
    """
    with untouched(model):
        recorders, positions, output = _observe(model)
        targets = [_as_target(model, recorder) for recorder in recorders.values() if recorder.record.updates]
        _check_complete(model, targets, _cache_of(output))
        _describe_biases(targets, {name: recorder.record for name, recorder in recorders.items()})
        for target in targets:
            call = recorders[target.name].record.call
            if call is not None:
                _try_out(model, target, call)
    _number_layers(model, targets)
    followers = []
    for recorder in recorders.values():
        call, target = recorder.record.call, recorder.target
        if not target.slots and call is not None and call.get(SHARED_STATES) is not None:
            source = _source(model, target, targets)
            target.follows, target.slots = True, source.slots
            followers.append((target, source))
    for position in positions:
        position.kind = max((t for t in targets if t.kind != "cross"), key=partial(_nearness, position.name)).kind
    return Finding(targets, followers, positions)


def _nearness(name: str, target: AttentionTarget) -> int:
    """How many steps two modules' names have in common."""
    pairs = zip(name.split("."), target.name.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _observe(model: nn.Module) -> tuple[dict[str, _Recorder], list[PositionTarget], Any]:
    """Probe the backbone: recorders of the modules that may take a prefix, position modules, the backbone's output.

    A module is a candidate if an argument of its `forward` has the type or a known name of a cache. If the probe hands
    a cache to a module under another name, the probe runs again with that name among the known ones.
    """
    modules = dict(model.named_modules())
    known: tuple[str, ...] = CACHE_ARGUMENTS
    recorders = _candidates(model, modules, known)
    while True:
        for recorder in recorders.values():
            check_implementation(implementation_of(recorder.target.module, model))
        handed: set[str] = set()
        note = partial(_note_cache, handed)
        handles: list[Any] = []
        positions: PositionProbe | None = None
        try:
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(recorders.get(name, note), with_kwargs=True))
            positions = PositionProbe(model, recorders)
            output = probe(model)
        except Exception as error:
            why = f"a forward pass on a dummy input failed ({type(error).__name__}: {error})."
            raise UnsupportedBackboneError(model, why if recorders else _NO_CACHE) from error
        finally:
            for handle in handles:
                handle.remove()
            found = positions.found() if positions is not None else []
        known = (*known, *sorted(handed - {*known}))
        before, recorders = recorders, _candidates(model, modules, known)
        if recorders.keys() == before.keys():
            break
    if not before:
        raise UnsupportedBackboneError(model, _NO_CACHE)
    return before, found, output


def _note_cache(handed: set[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that notes under which name a module is handed a cache."""
    for name, value in (*zip(parameter_names(module), args, strict=False), *kwargs.items()):
        if isinstance(value, Cache):
            handed.add(name)


def _candidates(model: nn.Module, modules: dict[str, nn.Module], known: tuple[str, ...]) -> dict[str, _Recorder]:
    """Recorders of the innermost modules that take a cache.

    Args:
        known: names of arguments that take one.
    """
    config = getattr(model, "config", None)
    two_sided = bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))
    arguments = {name: argument for name, module in modules.items() if (argument := cache_argument(module, known))}
    # A backbone whose layers take no cache may name one itself, and is no attention module.
    return {
        name: _Recorder(AttentionTarget(name, module, parameter_names(module), arguments[name], two_sided))
        for name, module in innermost({name: modules[name] for name in arguments}).items()
        if not hasattr(module, "get_input_embeddings")
    }


def cache_argument(module: nn.Module, known: tuple[str, ...] = CACHE_ARGUMENTS) -> str | None:
    """The argument of a module's `forward` that takes a key/value cache: by its type, else by a known name."""
    names, typed = _arguments(type(module).forward)
    named = [name for name in known if name in names]
    return next(iter([*(name for name in named if name in typed), *typed, *named]), None)


@lru_cache(maxsize=1024)
def _arguments(forward: Any) -> tuple[list[str], list[str]]:
    """The names of all arguments of a function, and of those that have a cache's type."""
    names = list(inspect.signature(forward).parameters)
    try:
        types = get_type_hints(forward)
    except Exception:  # annotations are code, and may name what is not imported
        types = {}
    return names, [name for name in names if any(map(_is_cache_type, (types.get(name), *get_args(types.get(name)))))]


def _is_cache_type(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Cache)


def _cache_of(output: Any) -> Any:
    """The cache in a backbone's output: `cache` from transformers 5.24 on, `past_key_values` before."""
    return output.get("cache", output.get("past_key_values")) if isinstance(output, dict) else None


def _as_target(model: nn.Module, recorder: _Recorder) -> AttentionTarget:
    target, record = recorder.target, recorder.record
    if record.at_once > 1:
        raise UnsupportedBackboneError(
            model,
            f"{target.name} ({type(target.module).__name__}) keeps the keys and values of several layers at once.",
        )
    if record.without_gradient and not torch.is_inference_mode_enabled():
        raise UnsupportedBackboneError(
            model, f"it runs {target.name} without gradients in part, so a prefix there could not be trained."
        )
    for layer_idx, (side, keys, values) in record.updates.items():
        shape = _shape_of(keys, values)
        if shape is None:
            raise UnsupportedBackboneError(
                model,
                f"{target.name} ({type(target.module).__name__}) caches keys of shape {tuple(keys.shape)} and values "
                f"of {tuple(values.shape)} for an input of {PROBE_LENGTH} tokens, not [batch, heads, tokens, size].",
            )
        # A backbone that was asked for a cache gives one to its decoder's layers alone.
        kind = "cross" if side == "cross" else "decoder" if record.cached else "encoder"
        target.slots[layer_idx] = Slot(kind, -1 if layer_idx is None else layer_idx, shape)
        target.dtype = keys.dtype
    target.own_mask, target.windowed = _own_mask(target.module), bool(window_of(target.module))
    return target


def _own_mask(module: nn.Module) -> str | None:
    """The name of a module's buffer `[1, 1, tokens, tokens]` that says which keys a token sees, if it has one."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype == torch.bool and buffer.dim() == 4 and buffer.shape[2] == buffer.shape[3] > 1:
            return name
    return None


def _number_layers(model: nn.Module, targets: list[AttentionTarget]) -> None:
    """Give layers that know no index of their own the next one of their kind, and sort."""
    for kind in KINDS:
        unnumbered = [target for target in targets if target.kind == kind and target.slots.keys() == {None}]
        for order, target in enumerate(unnumbered):
            target.slots = {None: replace(target.slots[None], layer=order)}
    targets.sort(key=lambda target: (KINDS.index(target.kind), min(slot.layer for slot in target.slots.values())))
    slots = [(slot.kind, slot.layer) for target in targets for slot in target.slots.values()]
    if len(set(slots)) < len(slots):
        raise UnsupportedBackboneError(model, "several of its attention modules share one layer of the cache.")


def _check_complete(model: nn.Module, targets: list[AttentionTarget], cache: Any) -> None:
    """Refuse a backbone with layers that store keys and values behind our back: they would silently have no prefix."""
    if not targets:
        raise UnsupportedBackboneError(model, "none of its attention modules puts its keys and values into a cache.")
    cache = getattr(cache, "self_attention_cache", cache)
    stored = {
        index
        for index, layer in enumerate(getattr(cache, "layers", []))
        if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()
    }
    missed = stored - {index for target in targets for index in target.slots if target.kind == "decoder"}
    if missed:
        raise UnsupportedBackboneError(
            model, f"its layers {sorted(missed)} cache keys and values in a way that leaves no room for a prefix."
        )


def _source(model: nn.Module, follower: AttentionTarget, targets: list[AttentionTarget]) -> AttentionTarget:
    """The layer whose keys and values another one attends to: the last before it that has its type of attention.

    transformers hands them on in a dictionary by layer type (`KVSharingDict`) and does not say who put them there.
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


@torch.enable_grad()
def _try_out(model: nn.Module, target: AttentionTarget, recorded: Call) -> None:
    """Repeat a recorded call with a prefix: a hidden one must change nothing, a visible one something.

    Whatever a module does with its masks that was not foreseen comes out here, and not in somebody's training.
    """
    states = recorded.get(target.names[0])
    if not isinstance(states, Tensor) or states.device.type == "meta":
        return
    slot = next(iter(target.slots.values()))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1, PROBE_LENGTH, slot.shape.columns, generator=generator).to(states.device, target.dtype)

    def run(length: int, visible: Tensor | None) -> Tensor:
        call = Call(recorded.names, tuple(recorded.args), recorded.kwargs)
        call.set(target.cache, None)
        if target.shares_bias:
            # The recorded one was computed without a prefix; each layer can do so itself.
            call.set("position_bias", None)

        def prefix_of(*_: Any) -> Pair:
            return slot.shape.split(drawn[:, :length])

        put_in_front(call, target, model, length, visible, prefix_of)
        output = target.module(*call.args, **call.kwargs)
        return (output[0] if isinstance(output, tuple) else output).detach().float()

    def gap(one: Tensor, other: Tensor) -> float:
        return (one - other).abs().max().item() / max(other.abs().max().item(), 1e-6)

    shown = torch.ones(1, PROBE_LENGTH, dtype=torch.bool, device=states.device)
    # Wide enough for half precision and TF32: a mask that is misread is off by the size of the outputs.
    tolerance = 5e-2
    why = ""
    for target.true_hides in (False, True):
        try:
            without, plain = run(0, None), run(PROBE_LENGTH, None)
            hidden, visible = run(PROBE_LENGTH, ~shown), run(PROBE_LENGTH, shown)
        except Exception as error:
            why = f"fails with one ({type(error).__name__}: {error})"
            continue
        if not gap(hidden, without) <= tolerance:
            why = "sees a prefix that its mask hides"
        elif not gap(visible, plain) <= tolerance:
            why = "computes something else where a mask shows the prefix than where there is no mask"
        elif gap(plain, without) == 0 and without.any():
            why = "does not see it"
        else:
            target.groups = getattr(target.module, "num_key_value_groups", 1)
            if target.groups > 1 and not (plain.any() and gap(run(PROBE_LENGTH, None), plain) <= tolerance):
                target.groups = 1  # it does not repeat them, or not as all do
            return
    raise UnsupportedBackboneError(
        model, f"tried with a prefix, {target.name} ({type(target.module).__name__}) {why}."
    )


def _describe_biases(targets: list[AttentionTarget], records: dict[str, _Record]) -> None:
    stacks: dict[str, list[AttentionTarget]] = {}
    for target in targets:
        stacks.setdefault(target.stack, []).append(target)
    for stack in stacks.values():
        for target in stack:
            for name, bias in records[target.name].biases.items():
                if records[stack[0].name].biases.get(name) is None:
                    # The first layer computes it, with the prefix in view, and hands it on.
                    target.shares_bias = True
                elif bias is not None:
                    target.bias = name
                    steps = bias[..., -1] - bias[..., -2]
                    target.slopes = steps.reshape(-1).detach()
