"""The layer that holds the prefixes of all adapters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..backbone.attention import AttentionTarget, EntryPoint, PrefixSlot, get_implementation
from ..backbone.find import find_targets
from ..backbone.find_attention import find_attention_targets
from ..backbone.linears import LinearLayer, find_linear_layers
from ..backbone.masks import check_bias
from ..backbone.parallel import TensorParallelism, find_tensor_parallelism
from ..backbone.positions import PositionTarget
from ..backbone.unsupported import UnsupportedBackboneError
from ..config import PrefixTuningV2Config
from ..files.check import check_size
from ..files.contents import TensorSpec
from ..private import clear_peft_marks, get_device
from .batch import AdapterInfo, BatchPlanner
from .encoder import EncoderSizes, PrefixEncoder
from .heads import remove_heads
from .hooks import ModelHooks, forget_graphs, get_text_config
from .labels import LabelNames
from .loading import PendingLoad, check_adapter_file
from .low_rank import LowRankHooks
from .names import PREFIX
from .plan import ActivePrefix, Row
from .running import AdapterCall, RunningCalls
from .slots import describe_slots, select_slots
from .values import PrefixValues

NAME_TAKEN = (
    "The model has an adapter {0!r} of another PEFT method already, and its configuration would be lost. Give this "
    "adapter another name."
)


class PrefixTuningV2Layer(nn.Module, BaseTunerLayer):
    """The prefixes of all adapters of a model.

    The layer is a child of the model, so its parameters are saved, moved and frozen like any others. It is never
    called: hooks (hooks.py) insert each attention layer's prefix.

    Args:
        model: The transformers model.
        entry_point: Where its prefixes enter: `"cache"` or `"attention"`.

    Raises:
        UnsupportedBackboneError: If none of its attention modules takes a prefix.
        ValueError: If it is divided over processes in a way that a prefix cannot follow.

    Example:
        ```python
        layer = get_peft_model(model, PrefixTuningV2Config()).base_model.prefix_layer
        layer.encoder_of("default").embedding.weight  # the table, [20, columns]
        ```
    """

    adapter_layer_names = tuple(PREFIX + name for name in PrefixEncoder._fields)
    other_param_names = ("_adapters", "_pending")

    def __init__(self, model: nn.Module, entry_point: EntryPoint = "cache"):
        super().__init__()
        self.entry_point = entry_point
        try:
            self._found = find_attention_targets(model) if entry_point == "attention" else find_targets(model)
        except UnsupportedBackboneError as error:
            error.point_to_inner_model(model)
            error.point_to_processes(find_tensor_parallelism(model))
            raise
        containers = [nn.ModuleDict() for _ in self.adapter_layer_names]
        for name, container in zip(self.adapter_layer_names, containers, strict=True):
            self.add_module(name, container)
        self._adapters: dict[str, AdapterInfo] = {}
        self._pending: dict[str, PendingLoad] = {}
        self._active_adapter: list[str] = []
        # The configs that PEFT keeps for the model, by adapter.
        self.configs: dict[str, Any] = {}
        # PEFT's `disable_input_dtype_casting` sets this in every tuner layer. A prefix has no input.
        self.cast_input_dtype_enabled = True
        self._labels = LabelNames(model)
        self._calls = RunningCalls()
        self._values = PrefixValues(containers, self._adapters, self._found.parallelism)
        self._planner = BatchPlanner(self.targets, self._adapters)
        self._hooks = ModelHooks(
            model,
            self._found,
            self._adapters,
            self._values,
            self._planner,
            self._calls,
            self.get_rows,
            self._begin_forward,
        )
        self._low_rank = LowRankHooks(
            self._adapters, self.encoder_of, self._hooks.get_current_rows, self._calls, self.parallelism
        )
        self._linears: list[LinearLayer] | None = None

    @property
    def model(self) -> nn.Module:
        """The model that has the prefixes."""
        return self._hooks.model

    # ---- What the model offers

    @property
    def targets(self) -> list[AttentionTarget]:
        """The attention modules that take a prefix."""
        return self._found.targets

    @property
    def positions(self) -> list[PositionTarget]:
        """The modules that compute or look up positions."""
        return self._found.positions

    @property
    def parallelism(self) -> TensorParallelism | None:
        """The processes that share the work of the model; `None` if each computes the whole."""
        return self._found.parallelism

    @property
    def kinds(self) -> set[str]:
        """The kinds of attention that take a prefix."""
        return {target.kind for target in self.targets}

    @property
    def unreached(self) -> list[str]:
        """The names of attention modules without a prefix that the probe did not reach."""
        return self._found.unreached

    @property
    def plain_attention(self) -> list[str]:
        """The names of modules without a prefix that compute attention themselves."""
        return self._found.plain

    @property
    def layers_without_prefix(self) -> list[int]:
        """Indices of layers that take no prefix (in hybrid models, for instance), in a model with one stack."""
        config = get_text_config(self.model)
        if getattr(config, "is_encoder_decoder", False) or len(self.kinds - {"cross"}) > 1:
            return []
        layers = range(getattr(config, "num_hidden_layers", None) or 0)
        return sorted(set(layers) - {slot.layer for target in self.targets for slot in target.slots.values()})

    # ---- Adapters

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters by name, without those whose weights are still to be read."""
        if not self._pending:
            return self._adapters
        pending = self.get_pending()
        return {name: adapter for name, adapter in self._adapters.items() if name not in pending}

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, also of those whose weights are still to be read."""
        containers: list[Any] = [getattr(self, name) for name in self.adapter_layer_names]
        return list(dict.fromkeys([*self._adapters, *(name for container in containers for name in container)]))

    def encoder_of(self, adapter_name: str) -> PrefixEncoder:
        """The modules that compute an adapter's prefix."""
        return self._values.get_encoder(adapter_name)

    def dropout_of(self, adapter_name: str) -> float:
        """The dropout probability that applies to an adapter's prefix now: 0 in eval mode."""
        return self._values.get_dropout(adapter_name)

    def update_layer(self, adapter_name: str, config: PrefixTuningV2Config, on_meta: bool = False) -> None:
        """Add the parameters of a new adapter, on the device of the first attention module that it has a prefix for.

        Args:
            adapter_name: Its name.
            config: Its config.
            on_meta: Whether to create the parameters on the meta device, to be loaded later.

        Raises:
            ValueError: If the config names a layer or a kind of attention that the model does not have, was made for a
                model with other layers or asks for an absurd size, or if its file does not fit. Nothing is changed
                then.
        """
        if config.entry_point != self.entry_point:
            raise ValueError(
                f"Adapter {adapter_name!r} has `entry_point={config.entry_point!r}`, and the model's other adapters "
                f"have {self.entry_point!r}. All adapters of a model must have the same. Load the base model anew for "
                "this one."
            )
        slots = select_slots(self.model, self._found, config)
        config.check_layout(type(self.model).__name__, describe_slots(slots), self.unreached)
        config.note_base_labels(self._labels.own)
        columns = dict(zip(slots, _slices([slot.shape.columns for slot in slots]), strict=True))
        end = columns[slots[-1]].stop
        self.check_strengths([config.strength], columns)
        home = next(target for target in self.targets if slots[0] in target.slots.values())
        hidden_size = getattr(get_text_config(self.model), "hidden_size", None) or slots[0].shape.key_columns
        width = (config.encoder_hidden_size or hidden_size) if config.prefix_projection else None
        linears = self._select_linears(columns) if config.lora_r else []
        inputs, outputs = [linear.inputs for linear in linears], [linear.outputs for linear in linears]
        slices = zip(_slices(inputs), _slices(outputs), strict=True)
        low_rank = {linear.name: pair for linear, pair in zip(linears, slices, strict=True)}
        sizes = EncoderSizes(config.num_virtual_tokens, end, hidden_size, width, config.lora_r, inputs, outputs)
        # The table counts too: a small MLP may compute a huge table.
        table = [(config.num_virtual_tokens, end)] if width else []
        check_size(self.model, [*sizes.shapes.values(), *table])
        specs = {name: TensorSpec(shape, home.dtype) for name, shape in sizes.shapes.items()}
        embeddings = check_adapter_file(
            self, self.model, self.targets, adapter_name, config, specs, has_other_adapters=bool(self.adapters)
        )
        with torch.device("meta") if on_meta else nullcontext():
            encoder = PrefixEncoder.new(sizes, config.init_std)
        device = get_device(home.module)
        # As PEFT's other methods: a new adapter is in training mode, and so is one that is loaded to be trained.
        training = self.training or (config.source is not None and not config.inference_mode)
        for container, module in zip(self.adapter_layer_names, encoder, strict=True):
            if module is not None:
                # PEFT's `low_cpu_mem_usage` creates modules on the meta device, and loads them later.
                place = None if module.weight.is_meta else device
                getattr(self, container)[adapter_name] = module.to(place, home.dtype).train(training)
        if self.parallelism is not None and config.source is None and not on_meta:
            # Each process has drawn numbers of its own.
            self.parallelism.broadcast(encoder.parameters())
        self._adapters[adapter_name] = AdapterInfo(
            config.num_virtual_tokens,
            config.prefix_dropout,
            config.shift_positions,
            columns,
            config.strength,
            low_rank,
        )
        if config.source is not None:
            self._pending[adapter_name] = PendingLoad.begin(
                str(config.source), self.model, encoder.parameters(), self.active_adapters, embeddings
            )
        if config.shift_positions:
            self._hooks.positions.register_for_shifts()
        self._planner.clear()
        config.source = None

    def _select_linears(self, slots: Container[PrefixSlot]) -> list[LinearLayer]:
        """The linear layers in the attention modules of some slots. The first call finds those of the model.

        Raises:
            ValueError: If there are none.
        """
        if self._linears is None:
            # At the strength 0 the model is the base model.
            with self.run(self.new_call(strengths=0.0)):
                processes = self.parallelism.size if self.parallelism else 1
                self._linears = find_linear_layers(self.model, self.targets, processes)
            self._low_rank.register(self._linears)
            forget_graphs(self.model)
        selected = [linear for linear in self._linears if any(slot in slots for slot in linear.target.slots.values())]
        if not selected:
            raise ValueError(
                f"`lora_r`: the attention modules of {type(self.model).__name__} call no linear layer. Use `lora_r=0`."
            )
        return selected

    def fold(self, adapter_name: str) -> None:
        """Replace an adapter's MLP by the table that the MLP computes."""
        folded = self.encoder_of(adapter_name).folded()
        for container, module in zip(self.adapter_layer_names, folded, strict=True):
            if module is not None:
                getattr(self, container)[adapter_name] = module
            elif adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]

    def check_strengths(self, strengths: Iterable[float], slots: Container[PrefixSlot]) -> None:
        """Check that attention can have prefixes of some strengths.

        Args:
            strengths: The strengths.
            slots: The slots of the prefixes.

        Raises:
            ValueError: If a strength is neither 0 nor 1, and an attention module adds nothing to the scores.
        """
        if all(strength in (0, 1) for strength in strengths):
            return
        for target in self.targets:
            if not any(slot in slots for slot in target.slots.values()):
                continue
            if not target.takes_strength:
                raise ValueError(
                    f"{target.name} ({type(target.module).__name__}) adds nothing to the scores of a prefix, so the "
                    "`strength` of a prefix must be 0 or 1 there."
                )
            implementation = target.entry and target.entry.implementation
            check_bias(implementation or get_implementation(target.module, self.model))

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Set the strength of an adapter's prefix, where a call sets no other."""
        self._adapters[adapter_name] = replace(self._adapters[adapter_name], strength=strength)
        self._planner.clear()
        self._switch_calls()

    def clear_cache(self) -> None:
        """Drop cached keys and values. Needed only after writing to parameters through `.data`."""
        self._values.clear_cache()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, PEFT chooses another one.

        Raises:
            RuntimeError: If a call that is still running uses the adapter.
        """
        self.check_unused(adapter_name)
        super().delete_adapter(adapter_name)
        self._planner.clear()
        self._values.clear_cache(adapter_name)

    def detach(self) -> None:
        """Remove the layer and its hooks from the model, and the marks of PEFT and transformers if none is left."""
        model = self.model
        if not getattr(model, "peft_config", {}):
            clear_peft_marks(model)
        self.remove_hooks()
        for name, child in list(model.named_children()):
            if child is self:
                delattr(model, name)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model, and give its config the base model's own label names."""
        self._low_rank.remove()
        self._hooks.remove()
        self._labels.show(None)

    # ---- Loading

    def get_pending(self) -> dict[str, PendingLoad]:
        """The adapters whose weights are still to be read, by name."""
        for name, load in list(self._pending.items()):
            if not load.ends_later:
                self.end_load(name)
        return self._pending

    def set_load_ends_later(self, adapter_name: str) -> None:
        """Note that an adapter's loading ends with `end_load`, and not as soon as its weights are there."""
        if adapter_name in self._pending:
            self._pending[adapter_name].ends_later = True

    def end_load(self, adapter_name: str) -> None:
        """Note that loading an adapter has ended, if its weights are there."""
        load = self._pending.get(adapter_name)
        if load is not None and load.has_weights(self.encoder_of(adapter_name).parameters()):
            self._pending.pop(adapter_name, None)

    def drop_failed_loads(self) -> None:
        """Remove the adapters that this thread began to load and that never received their weights."""
        for name, load in list(self.get_pending().items()):
            if not load.in_this_thread:
                continue
            self.drop_adapter(name)
            warnings.warn(
                f"Adapter {name!r} was removed: its weights were never read from {load.source}, because loading "
                "failed or was interrupted. Load it again. (`get_peft_model` makes a new adapter of a config that was "
                "read.)",
                stacklevel=2,
            )

    def drop_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model, loaded or not, with its heads. The last one takes the layer along.

        If this is interrupted, it can be called again.
        """
        model: Any = self.model
        load = self.get_pending().get(adapter_name)
        others = [name for name in self.adapter_names if name != adapter_name]
        active = [name for name in (load.active if load else self.active_adapters) if name in others]
        remove_heads(model, adapter_name, active)
        getattr(model, "peft_config", {}).pop(adapter_name, None)
        if others:
            if adapter_name in self.active_adapters:
                self.set_adapter(active or others[:1])
            self.delete_adapter(adapter_name)
        if load is not None:
            load.restore(model)
        if not others:
            self.detach()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after loading onto the meta device.
        device = device or next(filter(None, (get_device(target.module) for target in self.targets)), None)
        if device is not None and device.type != "meta":
            for module in self.encoder_of(adapter_name):
                if module is not None:
                    module.to(device)

    # ---- Active adapters and running calls

    def new_call(self, names: list[str] | None = None, strengths: float | list[float] | None = None) -> AdapterCall:
        """A call of the model, which keeps the adapters with which it begins.

        Args:
            names: An adapter's name for each row of the batch, `"__base__"` for none; `None` for the active adapters.
            strengths: The strength of the prefixes in each row, or one for all rows; `None` for those of the call
                around this one, or else for each adapter's own.

        Raises:
            ValueError: If there are more or fewer strengths than names.
        """
        outer = self._calls.current
        if strengths is None and outer is not None:
            strengths = outer.strengths
        if names is not None and isinstance(strengths, list) and len(names) != len(strengths):
            raise ValueError(
                f"`adapter_names` has {len(names)} names, and `use_strength` has {len(strengths)} numbers."
            )
        adapters = self._get_adapters_of(names)
        rows = self._get_rows_of(adapters, strengths)
        return AdapterCall(names, strengths, adapters, rows, outer)

    def run(self, call: AdapterCall) -> AbstractContextManager[None]:
        """Inside this context, this thread is in a call of the model."""
        return self._calls.run(call)

    @property
    def current_call(self) -> AdapterCall | None:
        """The running call of this thread."""
        return self._calls.current

    @property
    def active_sets(self) -> list[tuple[str, ...]]:
        """A single entry: the names of the active adapters; none if adapters are disabled."""
        return self._get_adapters_of(None)

    def get_rows(self) -> list[Row]:
        """The prefixes of each row in this thread; a single entry if all rows have the same."""
        call = self._calls.current
        return self._get_rows_of(self.active_sets) if call is None else call.rows

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does. Running calls of other threads keep theirs."""
        super().set_adapter(adapter_names, inference_mode)
        self._switch_calls()
        self._show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as PEFT does. Running calls of other threads keep theirs."""
        super().enable_adapters(enabled)
        self._switch_calls()
        self._show_labels()

    def check_unused(self, adapter_name: str) -> None:
        """Check that no running call, of any thread, uses an adapter that is about to be deleted.

        Raises:
            RuntimeError: If one does.
        """
        self._calls.check_unused(adapter_name)

    def _get_adapters_of(self, names: list[str] | None) -> list[tuple[str, ...]]:
        if self.disable_adapters:
            return [()]
        if names is not None:
            return [() if name == "__base__" else (name,) for name in names]
        return [tuple(name for name in self.active_adapters if name in self.adapters)]

    def _get_rows_of(self, adapters: list[tuple[str, ...]], strengths: float | list[float] | None = None) -> list[Row]:
        """The prefixes of each row: those of strength 0 are left out, as if the adapter were not there."""

        def get_row(names: tuple[str, ...], given: float | None) -> Row:
            row = [ActivePrefix(name, self._adapters[name].strength if given is None else given) for name in names]
            return tuple(prefix for prefix in row if prefix.strength)

        if not isinstance(strengths, list):
            return [get_row(names, strengths) for names in adapters]
        if len(adapters) == 1:
            adapters = adapters * len(strengths)
        return [get_row(names, strength) for names, strength in zip(adapters, strengths, strict=True)]

    def _switch_calls(self) -> None:
        for call in self._calls.list_of_thread():
            adapters = self._get_adapters_of(call.names)
            call.switch(adapters, self._get_rows_of(adapters, call.strengths))

    def keep_base_labels(self) -> None:
        """Leave the base model's own label names in its config, whichever adapter is active."""
        self._labels.keep_own()

    def _show_labels(self) -> None:
        """Show the label names of the active adapters, if they have the same ones."""
        active = [] if self.disable_adapters else self.active_adapters
        names = [getattr(self.configs.get(name), "label_names", None) for name in active]
        found = [each for each in names if each is not None]
        self._labels.show(found[0] if found and all(each == found[0] for each in found) else None)

    def _begin_forward(self) -> list[Row]:
        """Prepare the layer for a forward, and return the adapters of each row.

        Raises:
            ValueError: If an adapter of another method was added under the name of a prefix adapter.
        """
        if self._pending and not torch.compiler.is_compiling():
            self.drop_failed_loads()
        rows = self.get_rows()
        for name in {name for row in rows for name, _ in row}:
            if name in self.configs and not isinstance(self.configs[name], PrefixTuningV2Config):
                # PEFT would not save the prefix.
                raise ValueError(NAME_TAKEN.format(name))
        return rows

    # ---- PEFT's tuner layer, where a prefix differs from a layer around a base layer

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


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def find_prefix_layer(model: nn.Module, adapter_name: str | None = None) -> PrefixTuningV2Layer:
    """The layer with the prefixes of a model.

    Args:
        model: A `PeftModel`, or a transformers model with a prefix in it.
        adapter_name: An adapter that it must have.

    Raises:
        ValueError: If there is no such adapter.
    """
    layer = next((module for module in model.modules() if isinstance(module, PrefixTuningV2Layer)), None)
    if layer is None or adapter_name not in (None, *layer.adapters):
        known = list(layer.adapters) if layer is not None else []
        name = "" if adapter_name is None else f" {adapter_name!r}"
        raise ValueError(f"There is no prefix adapter{name}; there are {known}.")
    return layer
