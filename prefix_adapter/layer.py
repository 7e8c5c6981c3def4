"""The prefixes of a model: the parameters of every adapter, and the hooks that put them before attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .attention import AttentionTarget, Call, Slot, make_room, put_in_front, widen_own_mask
from .check import (
    SAVED,
    Spec,
    check_embeddings,
    check_file,
    check_size,
    find_embeddings,
    find_heads,
    shorten,
    tensors_of,
)
from .config import PrefixTuningV2Config
from .encoder import Pair, PrefixEncoder, split_layers
from .find import find_targets
from .positions import positions_behind_padding
from .probe import parameter_names
from .rollback import Unfinished, drop_unfinished
from .rows import Adapter, Piece, Plan, Row, describe, make_plan, pick_outputs
from .watch import Watch, check_fits, check_input, sequences

# PEFT's prefix of this method: it starts the name of every container of parameters.
PREFIX = "prefix_tuning_v2_"
# The name under which a layer is a child of the model that it serves.
LAYER_NAME = "prefix_tuning_v2"


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class PrefixTuningV2Layer(nn.Module, BaseTunerLayer):
    """All prefixes of a model.

    It is a child of the model, so its parameters are saved, moved and frozen like any others, but it is never called:
    hooks on the attention modules put each layer's own keys and values in front. What learns is encoded when a forward
    begins and forgotten when it ends; a layer that gradient checkpointing repeats encodes its own part anew.

    Args:
        model: the transformers model to serve.

    Raises:
        UnsupportedBackboneError: if none of its attention modules takes a prefix.
    """

    adapter_layer_names = tuple(PREFIX + name for name in PrefixEncoder._fields)
    other_param_names = ("_adapters", "_unfinished")

    def __init__(self, model: nn.Module):
        super().__init__()
        found = find_targets(model)
        self.targets, self.followers, self.positions = found.targets, found.followers, found.positions
        self._adapters: dict[str, Adapter] = {}
        # Those that PEFT or transformers has yet to read the weights of.
        self._unfinished: dict[str, Unfinished] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._active_adapter: list[str] = []
        self._row_adapters: list[Row] | None = None
        self.count_rows = False
        self._batch: int | None = None
        self._ready: dict[str, tuple[Any, dict[Slot, Pair]]] = {}
        # A generation asks for the same at every token. Of a mixed batch for as long as its names are set.
        self._plans: dict[Any, Plan | None] = {}
        self._expectations: dict[Any, list[int]] = {}
        self._mixed: dict[Any, Pair] = {}
        self._own_masks: dict[int, Tensor] = {}
        self._watch = Watch(self.targets)
        # In a tuple, or the model would become a child of its own child.
        self._model = (model,)
        self._handles: list[Any] = []
        # Positions with hooks, by their index.
        self._hooked: set[int] = set()
        try:
            self._hook(model)
        except BaseException:
            self.remove_hooks()
            raise

    @property
    def model(self) -> nn.Module:
        """The model that it serves."""
        return self._model[0]

    # ---- Adapters

    @property
    def adapters(self) -> dict[str, Adapter]:
        """What is known of each adapter, by name; not of one whose weights are still to be read."""
        if not self._unfinished:
            return self._adapters
        unfinished = self.find_unfinished()
        return {name: adapter for name, adapter in self._adapters.items() if name not in unfinished}

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, also of those whose weights are still to be read."""
        containers: list[Any] = [getattr(self, name) for name in self.adapter_layer_names]
        return list(dict.fromkeys([*self._adapters, *(name for container in containers for name in container)]))

    def find_unfinished(self) -> dict[str, Unfinished]:
        """The adapters whose weights are still to be read, by name."""
        for name, entry in list(self._unfinished.items()):
            if not entry.ends_later:
                self.finish(name)
        return self._unfinished

    def load_ends_later(self, adapter_name: str) -> None:
        """Note that an adapter's loading is over when `finish` is called, and not as soon as its weights are there."""
        if adapter_name in self._unfinished:
            self._unfinished[adapter_name].ends_later = True

    def finish(self, adapter_name: str) -> None:
        """Note that loading an adapter has ended, if its weights are there."""
        entry = self._unfinished.get(adapter_name)
        if entry is not None and entry.is_loaded(self.encoder_of(adapter_name).parameters()):
            self._unfinished.pop(adapter_name, None)

    def update_layer(self, adapter_name: str, config: PrefixTuningV2Config) -> None:
        """Add the parameters of a new adapter, where the first layer that it fills is.

        Raises:
            ValueError: if `config` names a layer or a kind of attention that the model does not have, was made for a
                model with other layers or asks for an absurd size, or if the file that it was read with does not fit.
                Nothing is changed then.
        """
        slots = self._slots_of(config)
        config.wraps(type(self.model).__name__, describe(slots))
        columns, end = {}, 0
        for slot in slots:
            columns[slot] = slice(end, end + slot.shape.columns)
            end += slot.shape.columns
        home = next(target for target in self.targets if slots[0] in target.slots.values())
        hidden_size = getattr(self._text_config, "hidden_size", None) or slots[0].shape.key_columns
        width = (config.encoder_hidden_size or hidden_size) if config.prefix_projection else None
        shapes = PrefixEncoder.shapes(config.num_virtual_tokens, end, hidden_size, width)
        check_size(self.model, shapes.values())
        embeddings = self._check_file(
            adapter_name, config, {name: Spec(shape, home.dtype) for name, shape in shapes.items()}
        )
        encoder = PrefixEncoder.new(config.num_virtual_tokens, end, config.init_std, hidden_size, width)
        device = next((p.device for p in home.module.parameters()), None)
        for container, module in zip(self.adapter_layer_names, encoder, strict=True):
            if module is not None:
                # PEFT's low_cpu_mem_usage puts whatever is made here on the meta device, to be loaded later.
                place = None if module.weight.is_meta else device
                getattr(self, container)[adapter_name] = module.to(place, home.dtype)
        self._adapters[adapter_name] = Adapter(
            config.num_virtual_tokens, config.prefix_dropout, config.shift_positions, columns
        )
        if config.source is not None:
            self._unfinished[adapter_name] = Unfinished.of(
                str(config.source), self.model, encoder.parameters(), self.active_adapters, embeddings
            )
        if config.shift_positions:
            self._hook_positions(limited=False)
        self._forget_plans()
        config.source = None

    def _check_file(
        self, adapter_name: str, config: PrefixTuningV2Config, encoder: dict[str, Spec]
    ) -> dict[str, Tensor]:
        """If an adapter is being loaded, hold its file against the parameters that it is going to fill.

        Returns:
            The embeddings of the base model that it is going to fill, by name.
        """
        containers = [f"{LAYER_NAME}.{name}" for name in self.adapter_layer_names]
        own = [LAYER_NAME, *containers, *(f"{name}.{adapter_name}" for name in containers)]
        attention = [target.module for target in self.targets]
        heads = find_heads(self.model, config.modules_to_save or (), attention, own, config.task_type)
        if config.source is None:
            return {}
        needed = {f"{SAVED}{LAYER_NAME}.{PREFIX}{name}": spec for name, spec in encoder.items()}
        for name, head in heads.items():
            parameters = head.state_dict(keep_vars=True)
            needed |= {f"{SAVED}{name}.{key}": Spec.of(tensor) for key, tensor in parameters.items()}
        # PEFT saves what all methods have under a name with each of them.
        others = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m is not self]
        found = tensors_of(self.model, adapter_name, others)
        allowed = {SAVED + name.replace(f".{adapter_name}.", ".", 1): spec for name, spec in found.items()}
        embeddings, unread = find_embeddings(self.model, SAVED, heads)
        path = config.source.weights()
        written = check_file(path, needed, allowed | unread, self.model, embeddings)
        if written and self.adapters:
            check_embeddings(path, self.model, heads, "the other adapters of this model")
        return {name.removeprefix(SAVED).replace(".original_module.", "."): tensor for name, tensor in written.items()}

    def _slots_of(self, config: PrefixTuningV2Config) -> list[Slot]:
        name = type(self.model).__name__
        slots = [slot for target in self.targets for slot in target.slots.values()]
        kinds = {slot.kind for slot in slots}
        absent = sorted(set(config.target_attention or ()) - kinds)
        if absent:
            raise ValueError(f"`target_attention` names {absent}, but {name} has only {sorted(kinds)} attention.")
        slots = [slot for slot in slots if slot.kind in (config.target_attention or kinds)]
        wanted: Any = config.layers_to_transform
        if wanted is not None:
            known = {slot.layer for slot in slots}
            unknown = sorted(set(wanted) - known)
            if unknown:
                raise ValueError(
                    f"`layers_to_transform` names {shorten(unknown)}, but the layers of {name} that can take a prefix "
                    f"are {sorted(known)}."
                )
            slots = [slot for slot in slots if slot.layer in wanted]
        relative = any(target.bias or target.shares_bias for target in self.targets)
        if config.shift_positions and not self.positions and not relative:
            raise ValueError(
                f"`shift_positions=True`: no module of {name} was found to look positions up. Use "
                "`shift_positions=False`."
            )
        return slots

    @property
    def _text_config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def layers_without(self) -> list[int]:
        """Indices of layers that take no prefix, in hybrids for instance, of a model with one stack."""
        if getattr(self._text_config, "is_encoder_decoder", False) or len(self.kinds - {"cross"}) > 1:
            return []
        layers = range(getattr(self._text_config, "num_hidden_layers", None) or 0)
        return sorted(set(layers) - {slot.layer for target in self.targets for slot in target.slots.values()})

    @property
    def kinds(self) -> set[str]:
        """The kinds of attention that take a prefix."""
        return {target.kind for target in self.targets}

    def encoder_of(self, adapter_name: str) -> PrefixEncoder:
        """An adapter's encoder."""
        containers: list[Any] = [getattr(self, name) for name in self.adapter_layer_names]
        modules: list[Any] = [c[adapter_name] if adapter_name in c else None for c in containers]  # noqa: SIM401
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
        """Delete an adapter; PEFT chooses another one to be active if it was."""
        super().delete_adapter(adapter_name)
        self._forget_plans()
        self._ready.pop(adapter_name, None)

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
        """BaseTunerLayer looks for a base layer here, and would not stop."""
        raise AttributeError("A prefix has no base layer, and so no weight of one.")

    @property
    def bias(self) -> Tensor:
        """As `weight`."""
        raise AttributeError("A prefix has no base layer, and so no bias of one.")

    # ---- The prefix of a layer

    def _forget_plans(self) -> None:
        self._plans, self._expectations = {}, {}

    def set_row_adapters(self, names: list[str] | None) -> None:
        """Give each row of the batch an adapter of its own, `"__base__"` for none; `None` ends it."""
        self._row_adapters = None if names is None else [() if name == "__base__" else (name,) for name in names]
        self._batch = None
        self._forget_plans()
        self._mixed = {}
        if names is None:
            self.count_rows = False

    def _rows(self) -> list[Row]:
        """The adapters of each row; a single entry if all rows have the same."""
        if self._disable_adapters:
            return [()]
        if self._row_adapters is not None:
            return self._row_adapters
        return [tuple(name for name in self.active_adapters if name in self.adapters)]

    def _plan(self, index: int, states: Tensor, memo: dict[Any, Any]) -> Plan | None:
        """What to put in front of a target that is given hidden states `[batch, ...]`; `None` if nothing."""
        rows = memo.get("rows") or self._rows()
        mixed = len(rows) > 1
        key = (index, states.device, states.shape[0]) if mixed else (index, rows[0])
        if key in self._plans:
            return self._plans[key]
        plan = make_plan(rows, self.adapters, self.targets[index], states)
        if mixed or plan is None or plan.visible is None:
            self._plans[key] = plan
        return plan

    def _prefix(self, slot: Slot, plan: Plan, keys: Tensor, memo: dict[Any, Any]) -> Pair:
        """The prefix `[1 or batch, heads, length, size]` in front of an attention layer's keys and values."""
        if plan.picked is None:
            row = plan.rows[0]
            # The same pair for the same prefix: the cache's view goes by that.
            return self._piece(row[0], slot, keys, memo) if len(row) == 1 else self._row(row, slot, keys, memo)
        key = (slot, keys.device, keys.dtype, keys.shape[0])
        if key not in self._mixed:
            rows = [self._row(row, slot, keys, memo) for row in plan.rows]
            prefix_keys, prefix_values = (
                torch.cat(side).to(keys.dtype)[plan.picked] for side in zip(*rows, strict=True)
            )
            self._mixed[key] = prefix_keys, prefix_values
        return self._mixed[key]

    def _row(self, row: tuple[Piece, ...], slot: Slot, keys: Tensor, memo: dict[Any, Any]) -> Pair:
        """The prefix of one row `[1, heads, length, size]`, or `[batch, heads, length, size]` under dropout."""
        parts = [self._piece(piece, slot, keys, memo) for piece in row]
        batch = max(part.shape[0] for part, _ in parts)
        joined = [torch.cat([part.expand(batch, -1, -1, -1) for part in side], 2) for side in zip(*parts, strict=True)]
        return joined[0], joined[1]

    def _piece(self, piece: Piece, slot: Slot, keys: Tensor, memo: dict[Any, Any]) -> Pair:
        name = piece.adapter
        if name is None:
            return slot.shape.split(keys.new_zeros(1, piece.length, slot.shape.columns))
        dropout = self.adapters[name].dropout if self.training else 0.0
        if dropout:
            part = self._encode(name, slot, memo).to(keys.device, keys.dtype)
            return slot.shape.split(F.dropout(part.expand(keys.shape[0], -1, -1), dropout))
        pairs = self._pairs(name, memo)
        pair = slot.shape.split(self._encode(name, slot, memo)) if pairs is None else pairs[slot]
        return pair if pair[0].device == keys.device else (pair[0].to(keys.device), pair[1].to(keys.device))

    def _pairs(self, adapter_name: str, memo: dict[Any, Any]) -> dict[Slot, Pair] | None:
        """Keys and values of all layers, if they are known or can be made at once by whichever layer asks first."""
        pairs = memo.get(("pairs", adapter_name))
        if pairs is not None:
            return pairs
        state, known = self._state(adapter_name), self._ready.get(adapter_name)
        if state is not None:
            if known is None or known[0] != state:
                with torch.no_grad():
                    known = self._ready[adapter_name] = state, self._split(adapter_name)
            pairs = known[1]
        elif torch.is_grad_enabled() or "rows" not in memo:
            return None
        else:
            pairs = self._split(adapter_name)
        memo["pairs", adapter_name] = pairs
        return pairs

    def _split(self, adapter_name: str) -> dict[Slot, Pair]:
        """Keys and values of all layers, encoded anew."""
        columns = self.adapters[adapter_name].columns
        whole = self.encoder_of(adapter_name).encode(slice(None))
        return dict(zip(columns, split_layers(whole, [slot.shape for slot in columns]), strict=True))

    def _state(self, adapter_name: str) -> Any:
        """What changes when an adapter's parameters do, if its pairs may be kept until then; else `None`.

        Of a table they are views. A frozen MLP is run once, until one of its parameters is written to: autograd counts
        that in `_version`, which has no public name.
        """
        encoder = self.encoder_of(adapter_name)
        parameters = encoder.parameters()
        learns = (encoder.output is not None or torch.is_grad_enabled()) and any(p.requires_grad for p in parameters)
        if learns or torch.compiler.is_compiling():
            return None
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]

    def _encode_whole(self, row: Row, memo: dict[Any, Any]) -> None:
        """Encode what learns of a row's adapters for all layers at once, for this forward.

        A layer's own columns have a gradient as large as the whole table, which is zero but for them, and each layer
        would run the MLP's first half anew.
        """
        for name in row:
            adapter = self.adapters[name]
            if self._pairs(name, memo) is not None:
                continue
            if self.training and adapter.dropout:
                parts = self.encoder_of(name).encode(slice(None)).split([s.shape.columns for s in adapter.columns], 1)
                memo["encoded", name] = dict(zip(adapter.columns, parts, strict=True))
            else:
                memo["pairs", name] = self._split(name)

    def _encode(self, adapter_name: str, slot: Slot, memo: dict[Any, Any]) -> Tensor:
        """An adapter's prefix for a slot, `[1, n, columns]`."""
        whole = memo.get(("encoded", adapter_name))
        if whole is not None:
            return whole[slot].unsqueeze(0)
        encoder, columns = self.encoder_of(adapter_name), self.adapters[adapter_name].columns[slot]
        if encoder.output is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return encoder.encode(columns).unsqueeze(0)
        # A layer by itself: checkpointing repeats it. That counts what is kept for the backward pass, which has to be
        # what it was in the forward, and there the encoder was run before.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return encoder.encode(columns).unsqueeze(0)

    def forget(self) -> None:
        """Drop what is kept of prefixes; needed only after writing to their parameters through `.data`."""
        self._ready.clear()

    # ---- Hooks

    def _hook(self, model: nn.Module) -> None:
        # Methods and what they are given first: unlike closures they are copied with the model that they hang on.
        before, after = "register_forward_pre_hook", "register_forward_hook"
        always: list[Any] = []
        hooks: list[tuple[nn.Module, str, Any]] = [
            (model, before, self._before_model),
            (model, after, self._after_model),
        ]
        backbone: Any = getattr(model, "base_model", model)
        self._backbone_names = parameter_names(backbone)
        if "position_ids" in self._backbone_names:
            hooks.append((backbone, before, self._before_backbone))
        for index, target in enumerate(self.targets):
            hooks.append((target.module, before, partial(self._before_attention, index)))
            if target.own_mask is not None:
                restore = partial(self._restore_own_mask, index)
                always.append(target.module.register_forward_hook(restore, always_call=True))
        for follower, source in self.followers:
            index = next(index for index, target in enumerate(self.targets) if target is source)
            hooks.append((follower.module, before, partial(self._before_follower, follower, index)))
        handles = [getattr(module, register)(hook, with_kwargs=True) for module, register, hook in hooks]
        self._handles = [*always, *handles]
        self._hook_positions(limited=True)
        # Behind those, as it ends what they look at; also of a forward that fails.
        self._handles.append(model.register_forward_hook(self._forget_forward, always_call=True))

    def _hook_positions(self, limited: bool) -> None:
        """Hooks where positions are looked up in a table; without a limit there is nothing to do until they shift."""
        for index, position in enumerate(self.positions):
            if index not in self._hooked and (position.limit is not None) == limited:
                before, after = partial(self._before_positions, index), partial(self._after_positions, index)
                self._handles += [
                    position.module.register_forward_pre_hook(before, with_kwargs=True),
                    position.module.register_forward_hook(after, with_kwargs=True),
                ]
                self._hooked.add(index)

    def remove_hooks(self) -> None:
        """Take the hooks off the model, which then is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watch.release(self.model)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._unfinished:
            drop_unfinished(self)
        rows = self._rows()
        if not any(rows):
            return
        self._watch.begin()
        memo = self._watch.forward.memo
        memo["rows"] = rows
        if self._row_adapters is None and not torch.compiler.is_compiling():
            self._encode_whole(rows[0], memo)
        if self._hooked:
            memo["shifts"] = {target.kind: self._shifts(target.kind) for target in self.positions}
            ids, shape = sequences(args, kwargs)
            if shape:
                check_input(self.model, ids, shape[-1], self.positions, max(self._shifts(self.targets[0].kind)))
        if self._row_adapters is not None:
            self._count_rows(rows, args, kwargs)
        if self.training and torch.is_grad_enabled():
            self._watch.prepare_checkpointing(self.model, shares_keys=bool(self.followers))

    def _count_rows(self, rows: list[Row], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = sequences(args, kwargs)[1]
        if shape and self.count_rows and shape[0] != len(rows):
            raise ValueError(f"`adapter_names` has {len(rows)} names for a batch of {shape[0]}.")
        # An encoder-decoder's rows are those that it decodes: beams come after the encoder.
        shape = sequences((), kwargs, "decoder_")[1] or shape
        self._batch = math.prod(shape[:-1]) if shape else None

    def _before_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_ids") is not None:
            return None
        active = {name for row in self._rows() for name in row}
        # With `shift_positions` padding is counted as PEFT counts it.
        if not active or any(self.adapters[name].shifts for name in active):
            return None
        call = Call(self._backbone_names, args, kwargs)
        positions = positions_behind_padding(self.positions, call)
        if positions is None:
            return None
        call.set("position_ids", positions)
        return tuple(call.args), call.kwargs

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = self._watch.forward.memo.get("rows")
        if rows is None:
            return
        drops_layers = False
        if self.training:
            config = getattr(self.model, "config", None)
            names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
            drops_layers = any(getattr(config, name, 0) for name in names)
        self._watch.end(self._expected(rows, kwargs.get("encoder_outputs") is not None), drops_layers)

    def _expected(self, rows: list[Row], encoder_rests: bool) -> list[int]:
        """Indices of the targets that are to use a prefix."""
        key = (encoder_rests, rows[0] if len(rows) == 1 else None)
        if key not in self._expectations:
            adapters = [self.adapters[name] for row in rows for name in row]
            self._expectations[key] = [
                index
                for index, target in enumerate(self.targets)
                if any(adapter.fills(target) for adapter in adapters)
                and not (encoder_rests and target.kind == "encoder")
            ]
        return self._expectations[key]

    def _forget_forward(self, *_: Any) -> None:
        self._watch.forget()

    def _before_attention(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, forward = self.targets[index], self._watch.forward
        call = Call(target.names, args, kwargs)
        plan = self._plan(index, call.get(target.names[0]), forward.memo)
        if plan is None:
            return None
        forward.called.add(index)

        def prefix_of(keys: Tensor, values: Tensor, layer_idx: int | None) -> Pair:
            self._watch.served(index, forward)
            return self._prefix(target.slot(layer_idx), plan, keys, forward.memo)

        put_in_front(call, target, self.model, plan.length, plan.visible, prefix_of, forward.memo)
        if target.own_mask is not None:
            self._own_masks[index] = widen_own_mask(target, target.own_mask, plan.length)
        return tuple(call.args), call.kwargs

    def _restore_own_mask(self, index: int, *_: Any) -> None:
        if index in self._own_masks:
            target: Any = self.targets[index]
            setattr(target.module, target.own_mask, self._own_masks.pop(index))

    def _before_follower(
        self,
        follower: AttentionTarget,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call, memo = Call(follower.names, args, kwargs), self._watch.forward.memo
        plan = self._plan(index, call.get(follower.names[0]), memo)
        if plan is None:
            return None
        make_room(call, follower, self.model, plan.length, plan.visible, memo)
        return tuple(call.args), call.kwargs

    def _shifts(self, kind: str) -> list[int]:
        """By how much the positions of each row move in the encoder or the decoder."""
        shifts = self._watch.forward.memo.get("shifts")
        if shifts is not None and kind in shifts:
            return shifts[kind]
        return [sum(self.adapters[name].shift(kind) for name in row) for row in self._rows()]

    def _before_positions(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.positions[index]
        shifts = self._shifts(target.kind)
        check_fits(self.model, target.too_many(args, kwargs, max(shifts)), target.limit, max(shifts))
        if len(set(shifts)) == 1 and shifts[0]:
            return target.shift(shifts[0], args, kwargs)
        return None

    def _after_positions(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        target = self.positions[index]
        shifts = self._shifts(target.kind)
        if len(set(shifts)) == 1:
            return None
        # Positions are often the same for all rows, `[1, tokens]`: compute what each shift gives, and pick.
        outputs = {}
        for by in set(shifts):
            shifted, named = target.shift(by, args, kwargs) if by else (args, kwargs)
            outputs[by] = target.module.forward(*shifted, **named)
        return pick_outputs([outputs[by] for by in shifts], self._batch or len(shifts))
