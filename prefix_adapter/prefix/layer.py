"""The prefixes of a model: the parameters of every adapter, and the hooks that put them before attention."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbone.attention import AttentionTarget, Call, Slot, make_room, put_in_front
from ..backbone.find import UnsupportedBackboneError, find_targets
from ..backbone.key_values import Pair, split_layers
from ..backbone.positions import counting_module, positions_behind_padding
from ..backbone.probe import parameter_names
from ..config import PrefixTuningV2Config
from ..files.check import check_embeddings, check_file, check_size
from ..files.contents import SAVED_ROOT, TensorSpec, find_embeddings, find_heads, tensors_of
from ..messages import shorten
from .batch import Adapter, PerThread, Piece, Plan, Row, RowCall, check_names, describe, make_plan, pick_outputs
from .encoder import PrefixEncoder
from .rollback import Unfinished, drop_unfinished
from .usage import Forward, Watch, check_fits, check_input, sequences

# PEFT's prefix of this method: it starts the name of every container of parameters.
PREFIX = "prefix_tuning_v2_"
# The name under which a layer is a child of the model that it serves.
LAYER_NAME = "prefix_tuning_v2"
NAME_TAKEN = (
    "The model has an adapter {0!r} of another PEFT method already, and its configuration would be lost. Give this "
    "adapter another name."
)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Thread(PerThread):
    """What this thread is in the middle of.

    Attributes:
        call: its innermost call of a `PeftModel`.
        replica: the copy of the model that `nn.DataParallel` is about to call in it.
    """

    call: RowCall | None = None
    replica: nn.Module | None = None


class _Calls:
    """The calls of a model that are running. A copied or unpickled model has none.

    Attributes:
        thread: what the thread that asks is in the middle of.
        mixed: the calls of all threads with `adapter_names`.
        plain: the others.
        own_masks: held by the thread that has changed the own mask of a module, which all threads share.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.mixed: list[RowCall] = []
        self.plain: list[RowCall] = []
        self.own_masks = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(eq=False)
class _WideMask:
    """How much wider a module's own mask has to be: from the hook that knows it to the forward that needs it.

    Attributes:
        module: the module that is called: the target, or a replica of it.
        length: of the prefix.
        used: whether the forward has put it in place.
    """

    module: nn.Module
    length: int
    used: bool = False


def in_place(model: nn.Module) -> nn.Module:
    """A model that `torch.compile` has wrapped, compiled in place instead, as `model.compile()` does it.

    Then names of modules, and of saved tensors, are those of the model.
    """
    # torch has no public names for the wrapped model, for the compiler with its settings, and for what it makes.
    inner, compiler = getattr(model, "_orig_mod", None), vars(model).get("dynamo_ctx")
    if inner is None or compiler is None:
        return model
    inner._compiled_call_impl = compiler(inner._call_impl)
    return inner


def _forget_graphs(model: nn.Module) -> None:
    """Have what is compiled in a model be compiled anew: graphs do not notice that hooks come or go."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        torch.compiler.reset()


def _point_inside(model: nn.Module, error: UnsupportedBackboneError) -> None:
    """Have the error for somebody's own module around transformers models say what to wrap instead."""
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not name.startswith(tuple(f"{part}." for part in parts)):
            parts[name] = module
    if parts and "" not in parts:
        name, part = next(iter(parts.items()))
        error.args = (
            f"{type(model).__name__} is a module around {type(part).__name__} (`{name}`), and cannot be tried out "
            f"with token ids alone. Add the adapter to the model inside: `model.{name} = get_peft_model(model.{name}, "
            f"config)`. What came of trying: {error}",
        )


def _check_undivided(model: nn.Module) -> None:
    """Refuse tensor parallelism, where a process has some of the heads, and its prefix would be taken for the whole.

    Raises:
        ValueError: if weights are divided over processes, and not by FSDP, which puts them together for each forward.
    """
    size = getattr(model, "tp_size", None) or 1
    if size == 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor, Shard

        for parameter in () if any(isinstance(part, FSDPModule) for part in model.modules()) else model.parameters():
            if isinstance(parameter, DTensor) and any(isinstance(place, Shard) for place in parameter.placements):
                size = max(size, parameter.device_mesh.size())
    if size > 1:
        raise ValueError(
            f"{type(model).__name__} is divided over {size} processes by tensor parallelism, which a prefix does not "
            "support. Load it without `tp_plan`; to use several GPUs, use DDP or FSDP2."
        )


class PrefixTuningV2Layer(nn.Module, BaseTunerLayer):
    """All prefixes of a model.

    It is a child of the model, so its parameters are saved, moved and frozen like any others, but it is never called:
    hooks on the attention modules put each layer's own keys and values in front. What learns is encoded when a forward
    begins and dropped when it ends; a layer that gradient checkpointing repeats encodes its own part anew.

    The model's `forward` is wrapped, on the instance: torch runs no hooks after a KeyboardInterrupt or SystemExit, and
    nothing of a forward may be left for the next one.

    Args:
        model: the transformers model to serve.

    Raises:
        UnsupportedBackboneError: if none of its attention modules takes a prefix.
        ValueError: if its attention is divided over processes by tensor parallelism.
    """

    adapter_layer_names = tuple(PREFIX + name for name in PrefixEncoder._fields)
    other_param_names = ("_adapters", "_unfinished")

    def __init__(self, model: nn.Module):
        super().__init__()
        _check_undivided(model)
        try:
            found = find_targets(model)
        except UnsupportedBackboneError as error:
            _point_inside(model, error)
            raise
        self.targets, self.followers, self.positions = found.targets, found.followers, found.positions
        self._adapters: dict[str, Adapter] = {}
        # Those that PEFT or transformers has yet to read the weights of.
        self._unfinished: dict[str, Unfinished] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._active_adapter: list[str] = []
        # The configurations that PEFT keeps for the model, by adapter.
        self.configs: dict[str, Any] = {}
        # PEFT's `disable_input_dtype_casting` switches it in every tuner layer; a prefix has no input.
        self.cast_input_dtype_enabled = True
        self._calls = _Calls()
        self._ready: dict[str, tuple[Any, dict[Slot, Pair]]] = {}
        # A generation asks for the same plans at every token. Those of mixed batches are kept in the `RowCall`.
        self._plans: dict[Any, Plan | None] = {}
        self._expectations: dict[Any, list[int]] = {}
        self._watch = Watch(self.targets)
        # In a tuple, or the model would become a child of its own child.
        self._model = (model,)
        self._depth = getattr(self._text_config, "num_hidden_layers", None)
        self._handles: list[Any] = []
        # Modules whose `forward` is wrapped, with the attribute that holds it and what was there before.
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        # Positions with hooks, by their index.
        self._hooked: set[int] = set()
        self._removed = False
        try:
            self._hook(model)
        except BaseException:
            self.remove_hooks()
            raise
        _forget_graphs(model)

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

    def update_layer(self, adapter_name: str, config: PrefixTuningV2Config, on_meta: bool = False) -> None:
        """Add the parameters of a new adapter, where the first layer that it fills is.

        Args:
            adapter_name: its name.
            config: its configuration.
            on_meta: whether to make the parameters on the meta device, to be loaded later.

        Raises:
            ValueError: if `config` names a layer or a kind of attention that the model does not have, was made for a
                model with other layers or asks for an absurd size, or if the file that it was read with does not fit.
                Nothing is changed then.
        """
        slots = self._slots_of(config)
        config.check_layout(type(self.model).__name__, describe(slots))
        columns, end = {}, 0
        for slot in slots:
            columns[slot] = slice(end, end + slot.shape.columns)
            end += slot.shape.columns
        home = next(target for target in self.targets if slots[0] in target.slots.values())
        hidden_size = getattr(self._text_config, "hidden_size", None) or slots[0].shape.key_columns
        width = (config.encoder_hidden_size or hidden_size) if config.prefix_projection else None
        shapes = PrefixEncoder.shapes(config.num_virtual_tokens, end, hidden_size, width)
        # A small MLP may compute a huge table.
        table = [(config.num_virtual_tokens, end)] if width else []
        check_size(self.model, [*shapes.values(), *table])
        embeddings = self._check_file(
            adapter_name, config, {name: TensorSpec(shape, home.dtype) for name, shape in shapes.items()}
        )
        with torch.device("meta") if on_meta else nullcontext():
            encoder = PrefixEncoder.new(config.num_virtual_tokens, end, config.init_std, hidden_size, width)
        device = next((p.device for p in home.module.parameters()), None)
        # A new layer is in training mode, and what is loaded to be trained, as PEFT's other methods are.
        training = self.training or (config.source is not None and not config.inference_mode)
        for container, module in zip(self.adapter_layer_names, encoder, strict=True):
            if module is not None:
                # PEFT's low_cpu_mem_usage puts whatever is made here on the meta device, to be loaded later.
                place = None if module.weight.is_meta else device
                getattr(self, container)[adapter_name] = module.to(place, home.dtype).train(training)
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
        self, adapter_name: str, config: PrefixTuningV2Config, encoder: dict[str, TensorSpec]
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
        needed = {f"{SAVED_ROOT}{LAYER_NAME}.{PREFIX}{name}": spec for name, spec in encoder.items()}
        for name, head in heads.items():
            parameters = head.state_dict(keep_vars=True)
            needed |= {f"{SAVED_ROOT}{name}.{key}": TensorSpec.of(tensor) for key, tensor in parameters.items()}
        # PEFT saves what all methods have under a name with each of them.
        others = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m is not self]
        found = tensors_of(self.model, adapter_name, others)
        allowed = {SAVED_ROOT + name.replace(f".{adapter_name}.", ".", 1): spec for name, spec in found.items()}
        embeddings, unread = find_embeddings(self.model, SAVED_ROOT, heads)
        path = config.source.find_weights()
        written = check_file(path, needed, allowed | unread, self.model, embeddings)
        if written and self.adapters:
            check_embeddings(path, self.model, heads, "the other adapters of this model")
        return {
            name.removeprefix(SAVED_ROOT).replace(".original_module.", "."): tensor for name, tensor in written.items()
        }

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
        fixed = [position.name for position in self.positions if not position.movable]
        if config.shift_positions and fixed:
            raise ValueError(
                f"`shift_positions=True`: {', '.join(fixed)} of {name} counts positions in a way that cannot "
                "be moved. Use `shift_positions=False`."
            )
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

    def dropout_of(self, adapter_name: str) -> float:
        """The probability with which elements of an adapter's prefix are dropped now: 0 in eval mode."""
        dropout = self.adapters[adapter_name].dropout
        return dropout if dropout and self.encoder_of(adapter_name).embedding.training else 0.0

    def fold(self, adapter_name: str) -> None:
        """Replace an adapter's MLP by the table that it computes."""
        encoder = self.encoder_of(adapter_name)
        trainable = encoder.embedding.weight.requires_grad
        folded = PrefixEncoder(nn.Embedding.from_pretrained(encoder.fold(), freeze=not trainable))
        folded.embedding.train(encoder.embedding.training)
        for container, module in zip(self.adapter_layer_names, folded, strict=True):
            if module is None:
                del getattr(self, container)[adapter_name]
            else:
                getattr(self, container)[adapter_name] = module

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; PEFT chooses another one to be active if it was.

        Raises:
            RuntimeError: if a call that is still running has the adapter.
        """
        self.check_unused(adapter_name)
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

    def unmerge(self) -> None:
        """Do nothing: a prefix is never merged (see `PrefixTuningV2Model.merge_and_unload`)."""

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

    @contextmanager
    def call_with(self, names: list[str] | None, count_rows: bool = False) -> Iterator[None]:
        """Around one call of the model in this thread, which is to keep the adapters with which it begins.

        Args:
            names: an adapter's name for each row of the batch, `"__base__"` for none; `None` for the active adapters.
            count_rows: whether the rows still have to be counted when the model is called.
        """
        compiling = torch.compiler.is_compiling()
        if names is None and compiling:
            # A graph reads the active adapters, and is compiled anew when they change.
            yield
            return
        thread = self._calls.thread
        call = RowCall(names, self._rows_of(names), None if compiling else thread.call, count_rows)
        calls = self._calls.plain if names is None else self._calls.mixed
        try:
            calls.append(call)
            if not compiling:
                thread.call = call
            yield
        finally:
            if not compiling:
                thread.call = call.outer
            calls.remove(call)

    def _rows_of(self, names: list[str] | None) -> list[Row]:
        """The adapters of each row by `adapter_names`, or the active ones in a single entry."""
        if self._disable_adapters:
            return [()]
        if names is not None:
            return [() if name == "__base__" else (name,) for name in names]
        return [tuple(name for name in self.active_adapters if name in self.adapters)]

    @property
    def call(self) -> RowCall | None:
        """The running call of this thread.

        Raises:
            RuntimeError: in a compiled graph, which cannot tell threads apart, if another thread is in a call as well.
        """
        calls = self._calls
        if not torch.compiler.is_compiling():
            return calls.thread.call
        if not calls.mixed:
            return None
        if len(calls.mixed) + len(calls.plain) > 1:
            raise RuntimeError(
                "A compiled model was called with `adapter_names` while another thread is in a call of it. Let the "
                "threads take turns, or do not compile the model."
            )
        return calls.mixed[0]

    @property
    def active_rows(self) -> list[Row]:
        """A single entry: the active adapters, none if they are disabled."""
        return self._rows_of(None)

    def _rows(self) -> list[Row]:
        """The adapters of each row; a single entry if all rows have the same."""
        call = self.call
        return self.active_rows if call is None else call.rows

    def _switched(self) -> None:
        """The active adapters were switched: that goes for the calls of this thread, and not for those of others."""
        call = self._calls.thread.call
        while call is not None:
            call.switch(self._rows_of(call.names))
            call = call.outer

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does."""
        super().set_adapter(adapter_names, inference_mode)
        self._switched()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as PEFT does."""
        super().enable_adapters(enabled)
        self._switched()

    def check_unused(self, adapter_name: str) -> None:
        """See to it that no running call, of any thread, has an adapter that is about to be deleted.

        Raises:
            RuntimeError: if one has.
        """
        for call in [*self._calls.mixed, *self._calls.plain]:
            if any(adapter_name in row for row in call.rows):
                raise RuntimeError(
                    f"Adapter {adapter_name!r} is in use by a call of the model that is still running. Delete it when "
                    "the call is over."
                )

    def _plan(self, index: int, states: Tensor, forward: Forward) -> Plan | None:
        """What to put in front of a target that is given hidden states `[batch, ...]`; `None` if nothing."""
        rows = forward.rows or self._rows()
        mixed = len(rows) > 1
        key = (index, states.device, states.shape[0]) if mixed else (index, rows[0])
        call = self.call if mixed else None
        plans = self._plans if call is None else call.plans
        if key in plans:
            return plans[key]
        plan = make_plan(rows, self.adapters, self.targets[index], states)
        if mixed or plan is None or plan.visible is None:
            plans[key] = plan
        return plan

    def _prefix(self, slot: Slot, plan: Plan, keys: Tensor, forward: Forward) -> Pair:
        """The prefix `[1 or batch, heads, length, size]` in front of an attention layer's keys and values."""
        if plan.picked is None:
            row = plan.rows[0]
            # The same pair for the same prefix: the cache's view goes by that.
            return self._piece(row[0], slot, keys, forward) if len(row) == 1 else self._row(row, slot, keys, forward)
        call = self.call
        pairs = {} if call is None else call.pairs
        key = (slot, keys.device, keys.dtype, keys.shape[0])
        if key not in pairs:
            rows = [self._row(row, slot, keys, forward) for row in plan.rows]
            prefix_keys, prefix_values = (
                torch.cat(side).to(keys.dtype)[plan.picked] for side in zip(*rows, strict=True)
            )
            pairs[key] = prefix_keys, prefix_values
        return pairs[key]

    def _row(self, row: tuple[Piece, ...], slot: Slot, keys: Tensor, forward: Forward) -> Pair:
        """The prefix of one row `[1, heads, length, size]`, or `[batch, heads, length, size]` under dropout."""
        parts = [self._piece(piece, slot, keys, forward) for piece in row]
        batch = max(part.shape[0] for part, _ in parts)
        joined = [torch.cat([part.expand(batch, -1, -1, -1) for part in side], 2) for side in zip(*parts, strict=True)]
        return joined[0], joined[1]

    def _piece(self, piece: Piece, slot: Slot, keys: Tensor, forward: Forward) -> Pair:
        name = piece.adapter
        if name is None:
            return slot.shape.split(keys.new_zeros(1, piece.length, slot.shape.columns))
        dropout = self.dropout_of(name)
        if dropout:
            part = self._encode(name, slot, forward).to(keys.device, keys.dtype)
            return slot.shape.split(F.dropout(part.expand(keys.shape[0], -1, -1), dropout))
        pairs = self._pairs(name, forward)
        pair = slot.shape.split(self._encode(name, slot, forward)) if pairs is None else pairs[slot]
        return pair if pair[0].device == keys.device else (pair[0].to(keys.device), pair[1].to(keys.device))

    def _pairs(self, adapter_name: str, forward: Forward) -> dict[Slot, Pair] | None:
        """Keys and values of all layers, if they are known or can be made at once by whichever layer asks first."""
        pairs = forward.memo.get(("pairs", adapter_name))
        if pairs is not None:
            return pairs
        state, known = self._state(adapter_name), self._ready.get(adapter_name)
        if state is not None:
            if known is None or known[0] != state:
                with torch.no_grad():
                    known = self._ready[adapter_name] = state, self._split(adapter_name)
            pairs = known[1]
        elif torch.is_grad_enabled() or not forward.rows:
            return None
        else:
            pairs = self._split(adapter_name)
        forward.memo["pairs", adapter_name] = pairs
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
        if learns or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]

    def _encode_whole(self, row: Row, forward: Forward) -> None:
        """Encode what learns of a row's adapters for all layers at once, for this forward.

        A layer's own columns have a gradient as large as the whole table, which is zero but for them, and each layer
        would run the MLP's first half anew.
        """
        for name in row:
            adapter = self.adapters[name]
            if self._pairs(name, forward) is not None:
                continue
            if self.dropout_of(name):
                parts = self.encoder_of(name).encode(slice(None)).split([s.shape.columns for s in adapter.columns], 1)
                forward.memo["encoded", name] = dict(zip(adapter.columns, parts, strict=True))
            else:
                forward.memo["pairs", name] = self._split(name)

    def _encode(self, adapter_name: str, slot: Slot, forward: Forward) -> Tensor:
        """An adapter's prefix for a slot, `[1, n, columns]`."""
        whole = forward.memo.get(("encoded", adapter_name))
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
        before = "register_forward_pre_hook"
        hooks: list[tuple[nn.Module, str, Any]] = [(model, before, self._note_replica)]
        self._wrap_forward(model, self._run_model)
        counting = counting_module(model, self.positions)
        if counting is not None:
            hooks.append((counting, before, partial(self._before_counting, parameter_names(counting))))
        for index, target in enumerate(self.targets):
            hooks.append((target.module, before, partial(self._before_attention, index)))
            if target.own_mask is not None:
                self._wrap_forward(target.module, self._run_with_own_mask, index)
        for follower, source in self.followers:
            index = next(index for index, target in enumerate(self.targets) if target is source)
            hooks.append((follower.module, before, partial(self._before_follower, follower, index)))
        self._handles = [getattr(module, register)(hook, with_kwargs=True) for module, register, hook in hooks]
        self._hook_positions(limited=True)

    def _wrap_forward(self, module: nn.Module, run: Any, *args: Any) -> None:
        """Have `module.forward` be `run`, after `args` given the index in `_wrapped` of what it replaces."""
        # accelerate keeps the forward under a private name, and calls that when the weights are in place.
        name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        wrapper = partial(run, *args, len(self._wrapped))
        self._wrapped.append((module, name, vars(module).get(name)))
        setattr(module, name, update_wrapper(wrapper, getattr(module, name)))

    def _unwrapped(self, entry: int, module: nn.Module) -> Any:
        """What `_wrap_forward` has replaced: the class's own `forward`, for the module that is called, or another."""
        _, _, before = self._wrapped[entry]
        return partial(type(module).forward, module) if before is None else before

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
        self._handles, self._removed = [], True
        for module, name, before in self._wrapped:
            # If somebody has wrapped it once more, it stays, and does nothing.
            if getattr(vars(module).get(name), "func", None) in (self._run_model, self._run_with_own_mask):
                if before is None:
                    delattr(module, name)
                else:
                    setattr(module, name, before)
        self._watch.release(self.model)
        _forget_graphs(self.model)

    def _note_replica(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model:
            self._calls.thread.replica = module

    def _run_model(self, entry: int, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with a record of what happens in it that ends with it, however it ends."""
        compiling, module = torch.compiler.is_compiling(), self.model
        if not compiling and self._calls.thread.replica is not None:
            module, self._calls.thread.replica = self._calls.thread.replica, None
        if self._unfinished and not compiling:
            drop_unfinished(self)
        run = self._unwrapped(entry, module)
        if torch.jit.is_tracing():
            # Each trace of a model is to be the same: `torch.jit.trace` makes two, and compares them.
            self._forget_plans()
        rows: list[Row] = [()] if self._removed else self._rows()
        forward = Forward(rows)
        if compiling:
            if any(rows):
                self._before_model(forward, module, args, kwargs)
            return run(*args, **kwargs)
        before = self._watch.current
        try:
            self._watch.current = forward if any(rows) else None
            if any(rows):
                self._before_model(forward, module, args, kwargs)
            output = run(*args, **kwargs)
            if any(rows):
                self._after_model(forward, kwargs)
            return output
        finally:
            self._watch.current = before

    def _before_model(
        self, forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for name in {name for row in forward.rows for name in row}:
            if name in self.configs and not isinstance(self.configs[name], PrefixTuningV2Config):
                # Another method was added under the same name since, and PEFT would not save the prefix.
                raise ValueError(NAME_TAKEN.format(name))
        call = self.call
        mixed = call is not None and call.names is not None
        if not mixed and not torch.compiler.is_compiling():
            self._encode_whole(forward.rows[0], forward)
        if self._hooked:
            forward.shifts = {target.kind: self._shifts(target.kind, forward) for target in self.positions}
            ids, shape = sequences(args, kwargs)
            if shape:
                shift = max(self._shifts(self.targets[0].kind, forward))
                check_input(self.model, ids, shape[-1], self.positions, shift)
        if call is not None and mixed:
            shape = sequences(args, kwargs)[1]
            if shape and call.count_rows:
                check_names(len(call.names or ()), shape[0], replica=module is not self.model)
            # An encoder-decoder's rows are those that it decodes: beams come after the encoder.
            shape = sequences((), kwargs, "decoder_")[1] or shape
            forward.batch = math.prod(shape[:-1]) if shape else None
        if self.model.training and torch.is_grad_enabled():
            self._watch.prepare_checkpointing(self.model, shares_keys=bool(self.followers))

    def _before_counting(
        self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs.get("position_ids") is not None:
            return None
        active = {name for row in self._rows() for name in row}
        # With `shift_positions` padding is counted as PEFT counts it.
        if not active or any(self.adapters[name].shifts for name in active):
            return None
        call = Call(names, args, kwargs)
        positions = positions_behind_padding(self.positions, call)
        if positions is None:
            return None
        call.set("position_ids", positions)
        return tuple(call.args), call.kwargs

    def _after_model(self, forward: Forward, kwargs: dict[str, Any]) -> None:
        drops_layers = False
        if self.model.training:
            config = getattr(self.model, "config", None)
            names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
            drops_layers = any(getattr(config, name, 0) for name in names)
        expected = self._expected(forward.rows, kwargs.get("encoder_outputs") is not None)
        self._watch.check(forward, expected, self._left_out, drops_layers)

    def _expected(self, rows: list[Row], encoder_rests: bool) -> list[int]:
        """Indices of the targets that are to use a prefix."""
        call, key = self.call, (encoder_rests, rows[0])
        known = self._expectations if call is None or len(rows) == 1 else call.expectations
        if key not in known:
            adapters = [self.adapters[name] for row in rows for name in row]
            known[key] = [
                index
                for index, target in enumerate(self.targets)
                if any(adapter.fills(target) for adapter in adapters)
                and not (encoder_rests and target.kind == "encoder")
            ]
        return known[key]

    def _left_out(self) -> set[int]:
        """Indices of the targets in layers that the model leaves out, having been told a smaller depth than it has.

        transformers does so to guess tokens ahead with a model's own first layers (`assistant_early_exit`).
        """
        depth = getattr(self._text_config, "num_hidden_layers", None)
        if self._depth is None or depth is None or depth >= self._depth:
            return set()
        return {i for i, t in enumerate(self.targets) if all(slot.layer >= depth for slot in t.slots.values())}

    def _before_attention(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, forward = self.targets[index], self._watch.forward
        call = target.call(args, kwargs)
        plan = self._plan(index, call.get(target.names[0]), forward)
        if plan is None:
            return None
        forward.called.add(index)
        wide: _WideMask | None = None

        def prefix_of(keys: Tensor, values: Tensor, layer_idx: int | None) -> Pair:
            if wide is not None and not wide.used:
                raise RuntimeError(
                    f"{target.name}: its `forward` was replaced after the adapter was added, and hides the prefix. "
                    "Add the adapter after whatever replaces it."
                )
            self._watch.served(index, forward)
            return self._prefix(target.slot(layer_idx), plan, keys, forward)

        put_in_front(call, target, self.model, plan.length, plan.visible, prefix_of, forward.memo)
        if target.own_mask is not None:
            wide = _WideMask(module, plan.length)
            call.kwargs["wide_mask"] = wide
        return tuple(call.args), call.kwargs

    def _run_with_own_mask(
        self, index: int, entry: int, *args: Any, wide_mask: _WideMask | None = None, **kwargs: Any
    ) -> Any:
        """The forward of a module with a mask of its own (GPT-Neo), which is wider while it runs with a prefix."""
        target = self.targets[index]
        run = self._unwrapped(entry, target.module if wide_mask is None else wide_mask.module)
        if torch.compiler.is_compiling():
            return self._swap_mask(target, wide_mask, run, args, kwargs)
        # Threads share the module, and with it the mask.
        with self._calls.own_masks:
            return self._swap_mask(target, wide_mask, run, args, kwargs)

    def _swap_mask(
        self, target: AttentionTarget, wide: _WideMask | None, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if wide is None or target.own_mask is None:
            return run(*args, **kwargs)
        own = getattr(wide.module, target.own_mask)
        try:
            # Made here, under the lock: outside of it, another thread may have widened the mask.
            setattr(wide.module, target.own_mask, F.pad(own, (wide.length, 0, wide.length, 0), value=True))
            wide.used = True
            return run(*args, **kwargs)
        finally:
            setattr(wide.module, target.own_mask, own)

    def _before_follower(
        self,
        follower: AttentionTarget,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call, forward = Call(follower.names, args, kwargs), self._watch.forward
        plan = self._plan(index, call.get(follower.names[0]), forward)
        if plan is None:
            return None
        make_room(call, follower, self.model, plan.length, plan.visible, forward.memo)
        return tuple(call.args), call.kwargs

    def _shifts(self, kind: str, forward: Forward) -> list[int]:
        """By how much the positions of each row move in the encoder or the decoder."""
        if kind in forward.shifts:
            return forward.shifts[kind]
        return [sum(self.adapters[name].shift(kind) for name in row) for row in forward.rows or self._rows()]

    def _before_positions(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.positions[index]
        forward = self._watch.forward
        shifts = self._shifts(target.kind, forward)
        check_fits(self.model, target.too_many(args, kwargs, max(shifts)), target.limit, max(shifts))
        if not any(shifts) or (len(set(shifts)) > 1 and target.for_all_rows(args, kwargs)):
            return None
        return target.shift(shifts, forward.batch, args, kwargs)

    def _after_positions(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        target, forward = self.positions[index], self._watch.forward
        shifts = self._shifts(target.kind, forward)
        if len(set(shifts)) == 1 or not target.for_all_rows(args, kwargs):
            return None
        if isinstance(output, Tensor) and output.dim() == 2 and not target.absolute:
            raise ValueError(
                f"{target.name} of {type(self.model).__name__} has the same positions for all rows, so rows whose "
                "adapters move positions by different lengths (`shift_positions`) cannot share a batch. Batch rows of "
                "one length."
            )
        # Compute what each shift gives for all rows, and pick.
        outputs = {}
        for by in set(shifts):
            shifted, named = target.shift([by], None, args, kwargs)
            outputs[by] = module.forward(*shifted, **named)
        return pick_outputs([outputs[by] for by in shifts], forward.batch or len(shifts))
