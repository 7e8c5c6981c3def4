"""The prefixes of a model: the parameters of every adapter, and the hooks that put them before attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .attention import AttentionTarget, Call, Slot, find_targets, make_room, put_in_front, was_used
from .config import PrefixTuningV2Config
from .encoder import PrefixEncoder
from .positions import PositionTarget

# PEFT's prefix of this method: it starts the name of every container of parameters.
PREFIX = "prefix_tuning_v2_"
# The name under which a layer is a child of the model that it serves.
LAYER_NAME = "prefix_tuning_v2"


class PrefixNotUsedError(RuntimeError):
    """An attention layer that should have received its prefix did not, so the adapter would have had no effect."""


@dataclass(frozen=True)
class _Adapter:
    """What is to be known of an adapter besides its parameters."""

    length: int
    dropout: float
    shift: int
    columns: dict[Slot, slice]


@dataclass(frozen=True)
class _Piece:
    """The part of a row's prefix that one adapter fills; hidden where the adapter has nothing for the layer."""

    adapter: str | None
    length: int
    shown: bool


@dataclass(frozen=True)
class _Plan:
    """A prefix for a batch: its rows' pieces, the row that each entry of the batch takes, and what it sees of it."""

    length: int
    rows: list[list[_Piece]]
    picked: Tensor | None
    visible: Tensor | None


# The adapters of one row of the batch, from left to right.
_Row = tuple[str, ...]


class _Hook:
    """A hook as an object: unlike a closure it is copied with the model that it hangs on."""

    def __init__(self, layer: PrefixTuningV2Layer, method: str, *target: Any):
        self.layer, self.method, self.target = layer, method, target

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return getattr(self.layer, self.method)(*self.target, *args)


class PrefixTuningV2Layer(nn.Module, BaseTunerLayer):
    """All prefixes of a model.

    It is a child of the model, so its parameters are saved, moved and frozen like any others, but it is never called:
    hooks on the attention modules put each layer's own keys and values in front. A layer computes its part from the
    parameters when it is called. Nothing is kept from a forward, so gradient checkpointing may repeat any of them.

    Args:
        model: the transformers model to serve.

    Raises:
        UnsupportedBackboneError: if none of its attention modules takes a prefix.
    """

    adapter_layer_names = tuple(PREFIX + name for name in PrefixEncoder._fields)
    other_param_names = ("adapters",)

    def __init__(self, model: nn.Module):
        super().__init__()
        found = find_targets(model)
        self.targets: list[AttentionTarget] = found.targets
        self.followers: list[tuple[AttentionTarget, AttentionTarget]] = found.followers
        self.positions: list[PositionTarget] = found.positions
        self.adapters: dict[str, _Adapter] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._active_adapter: list[str] = []
        self._row_adapters: list[_Row] | None = None
        self._ready: dict[tuple[str, Slot], tuple[Any, Tensor]] = {}
        self._served: set[int] | None = None
        self._input_gradients = False
        # In a tuple, or the model would become a child of its own child.
        self._model = (model,)
        self._handles = self._hook(model)

    # ---- Adapters

    def update_layer(self, adapter_name: str, config: PrefixTuningV2Config, low_cpu_mem_usage: bool = False) -> None:
        """Add the parameters of a new adapter.

        Raises:
            ValueError: if `config` names a layer or a kind of attention that the model does not have.
        """
        slots = self._covered(config)
        columns, end = {}, 0
        for slot in slots:
            columns[slot] = slice(end, end + slot.shape.columns)
            end += slot.shape.columns
        home = next(target for target in self.targets if slots[0] in target.slots.values())
        device = next((p.device for p in home.module.parameters()), torch.device("cpu"))
        hidden_size = self._hidden_size(slots[0])
        width = (config.encoder_hidden_size or hidden_size) if config.prefix_projection else None
        with torch.device("meta" if low_cpu_mem_usage else "cpu"):
            encoder = PrefixEncoder.new(config.num_virtual_tokens, end, config.init_std, hidden_size, width)
        for container, module in zip(self.adapter_layer_names, encoder, strict=True):
            if module is not None:
                getattr(self, container)[adapter_name] = module.to(None if low_cpu_mem_usage else device, home.dtype)
        shift = config.num_virtual_tokens if config.shift_positions else 0
        self.adapters[adapter_name] = _Adapter(config.num_virtual_tokens, config.prefix_dropout, shift, columns)

    def _covered(self, config: PrefixTuningV2Config) -> list[Slot]:
        slots = [slot for target in self.targets for slot in target.slots.values()]
        kinds = {slot.kind for slot in slots}
        missing: set[Any] = set(config.target_attention or ()) - kinds
        if missing:
            raise ValueError(
                f"`target_attention` names {sorted(missing)}, but {type(self._model[0]).__name__} has only "
                f"{sorted(kinds)} attention."
            )
        slots = [slot for slot in slots if slot.kind in (config.target_attention or kinds)]
        wanted: Any = config.layers_to_transform
        if wanted is not None:
            known = {slot.layer for slot in slots}
            missing = set(wanted) - known
            if missing:
                raise ValueError(
                    f"`layers_to_transform` names {sorted(missing)}, but the layers of "
                    f"{type(self._model[0]).__name__} that can take a prefix are {sorted(known)}."
                )
            slots = [slot for slot in slots if slot.layer in wanted]
        if config.shift_positions and not self.positions and not any(t.bias or t.shares_bias for t in self.targets):
            raise ValueError(
                f"`shift_positions=True`: no module of {type(self._model[0]).__name__} was found to look positions "
                "up. Use `shift_positions=False`."
            )
        return slots

    def _hidden_size(self, slot: Slot) -> int:
        config: Any = getattr(self._model[0], "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text_config, "hidden_size", None) or slot.shape.key_columns

    @property
    def layers_without(self) -> list[int]:
        """Indices of a decoder's layers that take no prefix, in hybrids for instance."""
        config: Any = getattr(self._model[0], "config", None)
        if getattr(config, "is_encoder_decoder", False) or {target.kind for target in self.targets} != {"decoder"}:
            return []
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = range(getattr(text_config, "num_hidden_layers", None) or 0)
        return sorted(set(layers) - {slot.layer for target in self.targets for slot in target.slots.values()})

    def encoder_of(self, adapter_name: str) -> PrefixEncoder:
        """An adapter's encoder."""
        modules: list[Any] = [dict(getattr(self, name)).get(adapter_name) for name in self.adapter_layer_names]
        return PrefixEncoder(*modules)

    def fold(self, adapter_name: str) -> None:
        """Replace an adapter's MLP by the table that it computes."""
        encoder = self.encoder_of(adapter_name)
        trainable = encoder.embedding.weight.requires_grad
        folded = PrefixEncoder(nn.Embedding.from_pretrained(encoder.fold(), freeze=not trainable))
        for container, module in zip(self.adapter_layer_names, folded, strict=True):
            if module is None:
                del getattr(self, container)[adapter_name]
            else:
                getattr(self, container)[adapter_name] = module

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._ready = {key: value for key, value in self._ready.items() if key[0] != adapter_name}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after loading onto the meta device. There is no one base layer here.
        parameters = (p for target in self.targets for p in target.module.parameters())
        device = device or next((p.device for p in parameters), None)
        if device is not None and device.type != "meta":
            for module in self.encoder_of(adapter_name):
                if module is not None:
                    module.to(device)

    @property
    def weight(self) -> Tensor:
        # BaseTunerLayer's looks for a base layer and would not stop.
        raise AttributeError("A prefix has no base layer, and so no weight of one.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A prefix has no base layer, and so no bias of one.")

    # ---- Which adapters act

    def set_row_adapters(self, names: list[str] | None) -> None:
        """Give each row of the batch an adapter of its own, `"__base__"` for none; `None` ends it."""
        self._row_adapters = None if names is None else [() if name == "__base__" else (name,) for name in names]

    def _rows(self) -> list[_Row]:
        """The adapters of each row; a single entry if all rows have the same."""
        if self._disable_adapters:
            return [()]
        if self._row_adapters is not None:
            return self._row_adapters
        return [tuple(name for name in self.active_adapters if name in self.adapters)]

    def _pieces(self, row: _Row, target: AttentionTarget) -> list[_Piece]:
        pieces = []
        for name in row:
            adapter = self.adapters[name]
            shown = any(slot in adapter.columns for slot in target.slots.values())
            # A stack that computes its position bias once for all layers has the same columns in all of them.
            placed = shown or (target.shares_bias and any(slot.kind == target.kind for slot in adapter.columns))
            if placed:
                pieces.append(_Piece(name, adapter.length, shown))
        return pieces

    # ---- Hooks

    def _hook(self, model: nn.Module) -> list[Any]:
        handles = [
            model.register_forward_pre_hook(_Hook(self, "_before_model"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, "_after_model")),
        ]
        for index, target in enumerate(self.targets):
            before, after = _Hook(self, "_before_attention", index), _Hook(self, "_after_attention", index)
            handles.append(target.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(target.module.register_forward_hook(after, with_kwargs=True))
        for index, (follower, _) in enumerate(self.followers):
            hook = _Hook(self, "_before_follower", index)
            handles.append(follower.module.register_forward_pre_hook(hook, with_kwargs=True))
        for index, position in enumerate(self.positions):
            hook = _Hook(self, "_before_positions", index)
            handles.append(position.module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def remove_hooks(self) -> None:
        """Take the hooks off the model, which then is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _plan(self, target: AttentionTarget, states: Tensor) -> _Plan | None:
        """What to put in front of a target for hidden states `[batch, ...]`; `None` if nothing."""
        rows = [self._pieces(row, target) for row in self._rows()]
        length = max(sum(piece.length for piece in row) for row in rows)
        if length == 0:
            return None
        # Rows with less than the longest are filled on the left, where it is hidden from them.
        rows = [[_Piece(None, length - sum(p.length for p in row), False), *row] for row in rows]
        picked = self._pick_rows(len(rows), states)
        visible = None
        if any(piece.length and not piece.shown for row in rows for piece in row):
            shown = [[piece.shown for piece in row for _ in range(piece.length)] for row in rows]
            visible = torch.tensor(shown, device=states.device)
            visible = visible.expand(states.shape[0], -1) if picked is None else visible[picked]
        return _Plan(length, rows, picked, visible)

    def _before_attention(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.targets[index]
        call = Call(target.names, args, kwargs)
        plan = self._plan(target, call.get(target.names[0]))
        if plan is None:
            return None

        def join(keys: Tensor, values: Tensor, layer_idx: int | None) -> tuple[Tensor, Tensor]:
            slot = target.slot(layer_idx)
            return slot.shape.join(self._prefix(slot, plan, keys), keys, values)

        put_in_front(call, target, self._model[0], plan.length, plan.visible, join)
        return tuple(call.args), call.kwargs

    def _before_follower(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        follower, source = self.followers[index]
        call = Call(follower.names, args, kwargs)
        plan = self._plan(source, call.get(follower.names[0]))
        if plan is None:
            return None
        make_room(call, follower, self._model[0], plan.length, plan.visible)
        return tuple(call.args), call.kwargs

    def _after_attention(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        target = self.targets[index]
        if not was_used(Call(target.names, args, kwargs).get(target.cache)):
            raise PrefixNotUsedError(
                f"{target.name} ({type(target.module).__name__}) was called with a prefix and did not use it: it no "
                "longer asks its cache for keys and values. Its outputs would silently be the base model's."
            )
        if self._served is not None:
            self._served.add(index)

    def _pick_rows(self, count: int, states: Tensor) -> Tensor | None:
        """For each row of the batch the entry that it takes; `None` if there is one for all."""
        if count == 1:
            return None
        batch = states.shape[0]
        if batch % count:
            raise ValueError(f"`adapter_names` has {count} names for a batch of {batch}.")
        # Beams and the choices of a multiple-choice question stand beside each other.
        return torch.arange(count, device=states.device).repeat_interleave(batch // count)

    def _prefix(self, slot: Slot, plan: _Plan, keys: Tensor) -> Tensor:
        """The prefix `[1 or batch, length, columns]` in front of an attention layer's keys."""
        if plan.picked is None:
            return self._row(plan.rows[0], slot, keys)
        # Each distinct row once.
        order = {tuple(row): place for place, row in enumerate(dict.fromkeys(map(tuple, plan.rows)))}
        prefixes = torch.cat([self._row(row, slot, keys) for row in order])
        places = torch.tensor([order[tuple(row)] for row in plan.rows], device=keys.device)
        return prefixes[places[plan.picked]]

    def _row(self, row: Iterable[_Piece], slot: Slot, keys: Tensor) -> Tensor:
        """The prefix of one row `[1, length, columns]`, or `[batch, length, columns]` under dropout."""
        parts = []
        for piece in row:
            if piece.adapter is None or slot not in self.adapters[piece.adapter].columns:
                if piece.length:
                    parts.append(keys.new_zeros(1, piece.length, slot.shape.columns))
                continue
            part = self._columns(piece.adapter, slot).to(keys.device, keys.dtype).unsqueeze(0)
            dropout = self.adapters[piece.adapter].dropout
            if self.training and dropout > 0:
                part = F.dropout(part.expand(keys.shape[0], -1, -1), dropout)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        batch = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

    def _columns(self, adapter_name: str, slot: Slot) -> Tensor:
        encoder = self.encoder_of(adapter_name)
        columns = self.adapters[adapter_name].columns[slot]
        if encoder.output is None or torch.compiler.is_compiling():
            return encoder.encode(columns)
        parameters = [p for module in encoder if module is not None for p in module.parameters()]
        if any(p.requires_grad for p in parameters):
            return encoder.encode(columns)
        # A frozen MLP is run once, until one of its parameters is written to.
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        known = self._ready.get((adapter_name, slot))
        if known is None or known[0] != state:
            with torch.no_grad():
                known = (state, encoder.encode(columns))
            self._ready[(adapter_name, slot)] = known
        return known[1]

    def _before_positions(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.positions[index]
        shifts = [sum(self.adapters[name].shift for name in row) for row in self._rows()]
        given: Any = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is not None and target.limit is not None and not given.is_floating_point():
            self._check_fits(given.shape[-1], target.limit, max(shifts))
        if not any(shifts):
            return None
        if len(set(shifts)) == 1:
            return target.shift(shifts[0], args, kwargs)
        picked = self._pick_rows(len(shifts), given)
        return target.shift(torch.tensor(shifts, device=given.device)[picked].unsqueeze(1), args, kwargs)

    def _check_fits(self, tokens: int, limit: int, shift: int) -> None:
        if tokens + shift > limit:
            moved = f" and `shift_positions` takes {shift} of them" if shift else ""
            raise ValueError(
                f"The input has {tokens} tokens, but {type(self._model[0]).__name__} has {limit} positions{moved}. "
                f"Truncate the input to {limit - shift} tokens."
            )

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model, rows = self._model[0], self._rows()
        self._served = set() if any(rows) and not torch.compiler.is_compiling() else None
        if not any(rows):
            return
        config = getattr(model, "config", None)
        limits = [target.limit for target in self.positions if target.limit is not None]
        if limits and not getattr(config, "is_encoder_decoder", False):
            ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
            tokens = ids.shape[-1] if ids is not None else embeddings.shape[-2] if embeddings is not None else 0
            self._check_fits(tokens, min(limits), max(sum(self.adapters[name].shift for name in row) for row in rows))
        if self.training and getattr(model, "is_gradient_checkpointing", False) and torch.is_grad_enabled():
            self._prepare_checkpointing(model)

    def _prepare_checkpointing(self, model: nn.Module) -> None:
        """Reentrant checkpointing drops the gradient of everything inside a layer whose input needs none.

        Raises:
            ValueError: where it would lose gradients that there is no saving.
        """
        # transformers keeps the function under a private name on every module that checkpoints.
        functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
        reentrant = any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)
        if reentrant and self.followers:
            raise ValueError(
                f"{type(model).__name__} hands keys and values on from layer to layer, and reentrant gradient "
                'checkpointing loses their gradients. Use `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if enable is not None and not self._input_gradients:
            enable()
            self._input_gradients = True

    def _after_model(self, args: tuple[Any, ...], output: Any) -> None:
        served, self._served = self._served, None
        if served is None:
            return
        stacks: dict[str, list[int]] = {}
        active = {name for row in self._rows() for name in row}
        for index, target in enumerate(self.targets):
            if any(slot in self.adapters[name].columns for name in active for slot in target.slots.values()):
                stacks.setdefault(target.stack, []).append(index)
        # A whole stack may rest (an encoder whose states are given), and LayerDrop leaves out layers in training.
        resting = [stack for stack in stacks.values() if not served.intersection(stack)]
        idle = [i for stack in stacks.values() for i in stack if i not in served]
        if len(resting) < len(stacks) and (self._drops_layers() or all(i in sum(resting, []) for i in idle)):
            return
        names = ", ".join(f"{self.targets[i].name} ({type(self.targets[i].module).__name__})" for i in idle)
        raise PrefixNotUsedError(
            f"The forward pass did not reach {names}, so the prefix had no effect there. Were modules replaced after "
            "the adapter was added? Wrap the model again."
        )

    def _drops_layers(self) -> bool:
        config = getattr(self._model[0], "config", None)
        rates = (getattr(config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"))
        return self.training and any(rates)
