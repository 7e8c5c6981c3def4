"""Which modules of a backbone take a prefix, in which shapes; their arguments and masks; what is refused and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import PrefixCache, PrefixEncoderDecoderCache, with_prefix
from .encoder import KeyValueShape
from .positions import PositionProbe, PositionTarget
from .probe import PROBE_LENGTH, innermost, parameter_names, probe, untouched

# What attention modules call their cache and their masks.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
MASK_ARGUMENTS = ("attention_mask", "mask", "causal_mask", "encoder_attention_mask")
SHARED_STATES = "shared_kv_states"
ENCODER_STATES = ("key_value_states", "encoder_hidden_states")
# Attention implementations whose masks are understood, by the start of their names in transformers.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention")

KINDS = ("encoder", "decoder", "cross")

_ALTERNATIVES = {
    "encoder": "BERT, RoBERTa, XLM-RoBERTa, ELECTRA or CamemBERT (all-MiniLM is a BERT of DistilBERT's size)",
    "decoder": "Llama, Qwen, GPT-2 or OPT",
    "encoder-decoder": "T5, BART or mBART",
}


class UnsupportedBackboneError(ValueError):
    """The backbone's attention cannot be given `past_key_values`, so it can take no prefix."""

    def __init__(self, model: nn.Module, why: str):
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            family = "encoder-decoder"
        elif hasattr(model, "prepare_inputs_for_generation") and getattr(model, "can_generate", bool)():
            family = "decoder"
        else:
            family = "encoder"
        super().__init__(
            f"{type(model).__name__} cannot take a prefix: {why} P-Tuning v2 puts learned keys and values in front of "
            f"every attention layer by way of `past_key_values`. Backbones of the same kind that work: "
            f"{_ALTERNATIVES[family]}. For this one, use another PEFT method (LoRA, for instance)."
        )


@dataclass(frozen=True)
class Slot:
    """One prefix of keys and values.

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
        slots: its prefixes by the layer index with which it updates the cache (more than one where layers share it).
        dtype: of the keys that it computes.
        shares_bias: whether the first layer of its stack computes a position bias for all (T5).
        bias: the argument with ALiBi's biases where the model hands them to each layer; else `None`.
        slopes: `[heads]`, ALiBi's slopes.
        follows: whether it attends to the keys and values of another module instead of its own (Gemma 3n).
        true_hides: whether True in its bool masks hides a key (MPT) instead of showing it.
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

    @property
    def kind(self) -> str:
        """`"encoder"`, `"decoder"` or `"cross"`."""
        return next(iter(self.slots.values())).kind

    @property
    def stack(self) -> str:
        """What names the layers around it and the kind: all of them are called in a forward, or none."""
        return f"{re.sub(r'[.]?[0-9]+([.].*)?$', '', self.name)} ({self.kind} attention)"

    def slot(self, layer_idx: int | None) -> Slot:
        """The prefix for the layer index that the module passes to its cache."""
        return self.slots[layer_idx] if len(self.slots) > 1 else next(iter(self.slots.values()))

    def view(self, inner: Any, length: int, join: Any, cross_join: Any = None) -> Any:
        """What the module is given in place of the cache `inner`."""
        return with_prefix(inner, length, join, cross_join, self.encoder_decoder)


class Call:
    """The arguments of one call of a module, by name, however they were passed."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names, self.args, self.kwargs = names, list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """The argument's value; `None` if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        index = self.names.index(name) if name in self.names else len(self.args)
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


# ---- Finding


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
        call = Call(self.target.names, args, kwargs)
        inner = call.get(self.target.cache)
        self.record.call = Call(self.target.names, args, kwargs)
        self.record.at_once = 0
        self.record.without_gradient = self.record.without_gradient or not torch.is_grad_enabled()
        self.record.cached = self.record.cached or inner is not None
        self.record.biases = {name: call.get(name) for name in ("alibi", "position_bias") if name in call.names}
        call.set(self.target.cache, self.target.view(inner, 0, self._join("self"), self._join("cross")))
        return tuple(call.args), call.kwargs

    def _join(self, side: str) -> Any:
        def join(keys: Tensor, values: Tensor, layer_idx: int | None) -> tuple[Tensor, Tensor]:
            self.record.updates[layer_idx] = (side, keys, values)
            self.record.at_once += 1
            return keys, values

        return join


def _shape_of(keys: Tensor, values: Tensor) -> KeyValueShape | None:
    for tensor in (keys, values):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != PROBE_LENGTH:
            return None
    if values is keys:
        # One tensor serves as both (DeepSeek-V4), and so does one prefix.
        return KeyValueShape(keys.shape[1], keys.shape[3], 0, 0)
    return KeyValueShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


def implementation_of(module: nn.Module, model: nn.Module) -> str:
    """The attention implementation in use, which says what its mask looks like.

    transformers keeps it in the config under a private name; there is no public way to read it back.
    """
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


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
    recorders = _candidates(model)
    if not recorders:
        raise UnsupportedBackboneError(
            model, "none of its attention modules has an argument for cached keys and values."
        )
    for recorder in recorders.values():
        check_implementation(implementation_of(recorder.target.module, model))
    positions = PositionProbe(model, recorders)
    handles = [r.target.module.register_forward_pre_hook(r, with_kwargs=True) for r in recorders.values()]
    with untouched(model):
        try:
            output = probe(model)
        except Exception as error:
            raise UnsupportedBackboneError(
                model, f"a forward pass on a dummy input failed ({type(error).__name__}: {error})."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            position_targets = positions.found()
        targets = [_as_target(model, recorder) for recorder in recorders.values() if recorder.record.updates]
        _check_complete(model, targets, getattr(output, "past_key_values", None))
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
    return Finding(targets, followers, position_targets)


def _candidates(model: nn.Module) -> dict[str, _Recorder]:
    config = getattr(model, "config", None)
    two_sided = bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))
    named = {}
    for name, module in model.named_modules():
        names = parameter_names(module)
        cache = next((argument for argument in CACHE_ARGUMENTS if argument in names), None)
        if cache is not None:
            named[name] = AttentionTarget(name, module, names, cache, two_sided)
    candidates = innermost({name: target.module for name, target in named.items()})
    # A backbone whose layers take no cache may name one itself, and is no attention module.
    return {
        name: _Recorder(named[name])
        for name, module in candidates.items()
        if not hasattr(module, "get_input_embeddings")
    }


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
    return target


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


@torch.no_grad()
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

        def join(keys: Tensor, values: Tensor, _: int | None) -> tuple[Tensor, Tensor]:
            return slot.shape.join(drawn[:, :length], keys, values)

        put_in_front(call, target, model, length, visible, join)
        output = target.module(*call.args, **call.kwargs)
        return (output[0] if isinstance(output, tuple) else output).float()

    def gap(one: Tensor, other: Tensor) -> float:
        return (one - other).abs().max().item() / max(other.abs().max().item(), 1e-6)

    shown = torch.ones(1, PROBE_LENGTH, dtype=torch.bool, device=states.device)
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 5e-2
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
        elif gap(plain, without) == 0:
            why = "does not see it"
        else:
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


# ---- Masks


def check_implementation(implementation: str) -> None:
    """Refuse attention implementations whose masks we cannot widen."""
    if not implementation.startswith(IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported with a prefix. Load the model, or call "
            "`model.set_attn_implementation`, with 'sdpa' or 'eager'."
        )


def put_in_front(
    call: Call, target: AttentionTarget, model: nn.Module, length: int, visible: Tensor | None, join: Any
) -> None:
    """Change a module's arguments so that it sees `length` keys and values more, which `join` puts in front."""
    if length:
        make_room(call, target, model, length, visible)
    call.set(target.cache, target.view(call.get(target.cache), length, join))


def make_room(call: Call, target: AttentionTarget, model: nn.Module, length: int, visible: Tensor | None) -> None:
    """Widen what a module is given for its keys, masks and biases, on the left by a prefix's columns.

    Args:
        call: the module's arguments, with its own cache still in place; changed in place.
        length: the number of columns.
        visible: bool `[batch, length]` where rows see different parts of the prefix; `None` if all is visible.
    """
    implementation = implementation_of(target.module, model)
    check_implementation(implementation)
    flash = implementation.startswith("flash_attention")
    if flash and getattr(target.module, "sliding_window", None):
        raise ValueError(
            f"{target.name}: flash attention with a sliding window would hide the prefix behind the window. Use "
            "attn_implementation='sdpa' or 'eager'."
        )
    given = [name for name in MASK_ARGUMENTS if call.get(name) is not None]
    for name in given:
        call.set(name, widen_mask(call.get(name), length, visible, target.true_hides))
    if not given:
        mask = _missing_mask(call, target, implementation, length, visible)
        if mask is not None:
            names = [name for name in MASK_ARGUMENTS if name in call.names]
            # A module that names both (GPT-2) takes the encoder's for cross-attention.
            call.set(names[-1] if target.kind == "cross" else names[0], mask)
    if target.bias is not None and target.slopes is not None:
        call.set(target.bias, _widen_bias(call.get(target.bias), target.slopes, length))


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
    columns = torch.where(visible, seen, hidden).to(mask.dtype).view(batch, *(1 for _ in rest), length)
    return torch.cat([columns.expand(batch, *rest, length), mask.expand(batch, *mask.shape[1:])], dim=-1)


def _missing_mask(
    call: Call, target: AttentionTarget, implementation: str, length: int, visible: Tensor | None
) -> Tensor | None:
    """The mask where the backbone gave none because a kernel's own rule would do; `None` where it still does.

    sdpa aligns its causal rule to the upper left corner, where the prefix now is, so it needs a mask; flash attention
    aligns to the lower right. Without causality a mask is needed only to hide parts of a prefix.
    """
    states = call.get(call.names[0])
    batch, queries = states.shape[:2]
    causal = call.get("is_causal")
    if causal is None:
        causal = getattr(target.module, "is_causal", True)
    causal = bool(causal) and target.kind != "cross" and queries > 1 and implementation == "sdpa"
    if visible is None and not causal:
        return None
    inner = call.get(target.cache)
    past, keys, offset = 0, queries, 0
    if target.kind == "cross":
        keys = call.first(ENCODER_STATES).shape[1]
    elif target.follows:
        # What it follows has put the prefix in already. There is no past where there is no mask.
        shared = call.get(SHARED_STATES)[getattr(target.module, "layer_type", None)]
        keys = shared[0].shape[2] - length
    elif inner is not None:
        # Of this layer: those before it have already stored this call's keys, as it has in earlier rounds itself.
        layer_idx = min((index or 0 for index in target.slots), key=inner.get_seq_length)
        past = inner.get_seq_length(layer_idx)
        keys, offset = inner.get_mask_sizes(queries, layer_idx)
    device = states.device
    if implementation.startswith("flash_attention"):
        return widen_mask(torch.ones(batch, keys, dtype=torch.bool, device=device), length, visible)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        positions = torch.arange(queries, device=device) + past
        mask = mask & (torch.arange(keys, device=device) + offset <= positions[:, None])
    mask = widen_mask(mask, length, visible)
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    return mask


def _widen_bias(bias: Tensor, slopes: Tensor, length: int) -> Tensor:
    """ALiBi (Press et al. 2022) with the prefix right in front of the first key: its biases go on to the left."""
    distance = torch.arange(-length, 0, device=bias.device)
    steps = slopes.to(bias).repeat(bias.numel() // bias.shape[-1] // slopes.numel())
    columns = bias[..., :1] + steps.view(*bias.shape[:-1], 1) * distance
    return torch.cat([columns.to(bias.dtype), bias], dim=-1)


def was_used(cache: Any) -> bool:
    """Whether a module asked the view that it was given; True for what is no view of ours."""
    return cache.used if isinstance(cache, (PrefixCache, PrefixEncoderDecoderCache)) else True
