"""The layer that holds the prefixes of all adapters of a model."""

from __future__ import annotations

from collections.abc import Container, Iterable
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

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
from ..tuner.layer import AdapterLayer
from .batch import AdapterInfo, BatchPlanner
from .encoder import EncoderSizes, PrefixEncoder
from .hooks import ModelHooks, forget_graphs, get_text_config
from .low_rank import LowRankHooks
from .names import LAYER_NAME, PREFIX
from .slots import describe_slots, select_slots
from .values import PrefixValues


class PrefixTuningV2Layer(AdapterLayer[AdapterInfo]):
    """The prefixes of all adapters of a model.

    It is never called: hooks (hooks.py) insert each attention layer's prefix.

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

    noun, layer_name, prefix, config_class = "prefix", LAYER_NAME, PREFIX, PrefixTuningV2Config
    adapter_layer_names = tuple(PREFIX + name for name in PrefixEncoder._fields)

    def __init__(self, model: nn.Module, entry_point: EntryPoint = "cache"):
        try:
            found = find_attention_targets(model) if entry_point == "attention" else find_targets(model)
        except UnsupportedBackboneError as error:
            error.point_to_inner_model(model)
            error.point_to_processes(model, find_tensor_parallelism(model))
            raise
        super().__init__(model)
        self.entry_point, self._found = entry_point, found
        self._values = PrefixValues(self.containers, self._adapters, found.parallelism)
        self._planner = BatchPlanner(self.targets, self._adapters)
        self._hooks = ModelHooks(
            model,
            self._found,
            self._adapters,
            self._values,
            self._planner,
            self._calls,
            self.get_rows,
            self.begin_forward,
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
    def is_decoder(self) -> bool:
        """Whether the model has decoder self-attention alone, as Llama and GPT-2 have."""
        return self.kinds == {"decoder"}

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
        sizes = EncoderSizes(
            config.num_virtual_tokens,
            end,
            hidden_size,
            width,
            config.lora_r,
            inputs,
            outputs,
            config.num_frozen_tokens,
        )
        # The table counts too: a small MLP may compute a huge table.
        table = [(config.num_virtual_tokens, end)] if width else []
        check_size(self.model, [*sizes.shapes.values(), *table])
        specs = {name: TensorSpec(shape, home.dtype) for name, shape in sizes.shapes.items()}
        embeddings = self._check_file(adapter_name, config, specs, self.home)
        with torch.device("meta") if on_meta else nullcontext():
            encoder = PrefixEncoder.new(sizes, config.init_std)
        info = AdapterInfo(
            config.num_virtual_tokens,
            self._get_dropout(config),
            config.shift_positions,
            columns,
            config.strength,
            low_rank,
        )
        is_new = config.source is None and not on_meta
        self._add(adapter_name, config, info, encoder, home.module, home.dtype, embeddings)
        if self.parallelism is not None and is_new:
            # Each process has drawn numbers of its own.
            self.parallelism.broadcast(self.encoder_of(adapter_name).tensors())
        if config.shift_positions:
            self._hooks.positions.register_for_shifts()

    def _get_dropout(self, config: PrefixTuningV2Config) -> float:
        """The dropout probability of a config, or else that of the kind of model."""
        if config.prefix_dropout is not None:
            return config.prefix_dropout
        # In a decoder, dropout on the keys turns attention away from the prefix: it hardly learns (docs/learning.md).
        return 0.0 if self.is_decoder else 0.1

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
        self._replace_modules(adapter_name, self.encoder_of(adapter_name).folded())

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
        self.clear_plans()
        self._switch_calls()

    def shift_positions(self, adapter_name: str) -> None:
        """Have the positions of the input start after an adapter's prefix, as with `shift_positions=True`."""
        self._adapters[adapter_name] = replace(self._adapters[adapter_name], shifts=True)
        self.clear_plans()
        self._hooks.positions.register_for_shifts()

    def clear_plans(self) -> None:
        """Drop the plans for the adapters that there were."""
        self._planner.clear()

    def clear_cache(self) -> None:
        """Drop cached keys and values. Needed only after writing to parameters through `.data`."""
        self._values.clear_cache()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, PEFT chooses another one.

        Raises:
            RuntimeError: If a call that is still running uses the adapter.
        """
        super().delete_adapter(adapter_name)
        self._values.clear_cache(adapter_name)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model, and give its config the base model's own label names."""
        self._low_rank.remove()
        self._hooks.remove()
        super().remove_hooks()

    @property
    def home(self) -> list[nn.Module]:
        """The attention modules that take a prefix."""
        return [target.module for target in self.targets]

    def _get_strength(self, adapter_name: str) -> float:
        return self._adapters[adapter_name].strength


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def prefix_layer_or_none(model: nn.Module) -> PrefixTuningV2Layer | None:
    """The layer with the prefixes of a model; `None` if the model has no prefix."""
    return next((module for module in model.modules() if isinstance(module, PrefixTuningV2Layer)), None)


def find_prefix_layer(model: nn.Module, adapter_name: str | None = None, instead: str = "") -> PrefixTuningV2Layer:
    """The layer with the prefixes of a model.

    Args:
        model: A `PeftModel`, or a transformers model with a prefix in it.
        adapter_name: An adapter that it must have.
        instead: What can be done if the adapter is of another method, for the message.

    Raises:
        ValueError: If there is no such adapter.
    """
    layer = prefix_layer_or_none(model)
    if layer is None or adapter_name not in (None, *layer.adapters):
        known = list(layer.adapters) if layer is not None else []
        name = "" if adapter_name is None else f" {adapter_name!r}"
        other = (getattr(model, "peft_config", None) or {}).get(adapter_name)
        kind = getattr(other, "peft_type", None)
        hint = "" if kind is None else f" {adapter_name!r} is a {getattr(kind, 'value', kind)} adapter. {instead}"
        raise ValueError(f"There is no prefix adapter{name}; there are {known}.{hint}".rstrip())
    return layer
