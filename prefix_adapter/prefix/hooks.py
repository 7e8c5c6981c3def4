"""The hooks on a model: they insert prefixes into attention calls, and hold the state of each forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backbone.attention import AttentionTarget, PrefixSlot
from ..backbone.attention_entry import attend_with_prefix
from ..backbone.calls import ModuleCall, get_batch_size, get_sequences, parameter_names
from ..backbone.checkpointing import CheckpointingGuard
from ..backbone.dummy_inputs import count_codebooks
from ..backbone.find import FoundTargets
from ..backbone.insert import insert_prefix
from ..backbone.key_values import KeyValues
from ..backbone.masks import widen_masks
from ..backbone.own_mask import OwnMasks, WiderMask
from ..private import has_compiled_parts
from ..tuner.running import Row, RunningCalls
from ..tuner.wrapping import WrappedForward, WrappedForwards
from .batch import AdapterInfo, BatchPlanner
from .paged import PagedSessions
from .position_hooks import PositionHooks
from .state import CurrentForward, ForwardState
from .usage import PrefixNotUsedError, UsageCheck
from .values import PrefixValues


class ModelHooks:
    """All hooks on one model.

    The model's `forward` is wrapped on the instance. A forward hook would not do: torch runs no hooks after a
    KeyboardInterrupt or SystemExit, and no state of a forward may outlive it. Hooks are bound methods and partials,
    not closures, so that a copied model has hooks of its own.

    Args:
        model: The model.
        found: The modules that take a prefix.
        adapters: The model's adapters, by name.
        values: The keys and values of its prefixes.
        planner: The plans of its batches.
        calls: Its running calls.
        get_rows: Returns the adapters of each row for this thread.
        begin_forward: Called at the begin of each forward. Returns the same as `get_rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        found: FoundTargets,
        adapters: Mapping[str, AdapterInfo],
        values: PrefixValues,
        planner: BatchPlanner,
        calls: RunningCalls,
        get_rows: Callable[[], list[Row]],
        begin_forward: Callable[[], list[Row]],
    ):
        self.model, self._targets, self._followers = model, found.targets, found.followers
        self._values, self._planner, self._calls = values, planner, calls
        self._get_rows, self._begin_forward = get_rows, begin_forward
        self._usage, self._current, self._own_masks = UsageCheck(found.targets), CurrentForward(), OwnMasks()
        self._checkpointing = CheckpointingGuard(
            model, [target.module for target in found.targets], shares_keys=bool(found.followers)
        )
        # The same as `ForwardState.calls`, for a graph that is being compiled.
        self._traced_calls: dict[int, int] = {}
        # A forward with `*args` alone names no argument: the first one is its token ids.
        self._names = parameter_names(model) or ["input_ids"]
        # PEFT's classes for texts pass these as None to every model. Whisper would pass them on to its decoder.
        self._unnamed_inputs = tuple({"input_ids", "inputs_embeds"} - {*self._names}) if parameter_names(model) else ()
        self._main_input = str(getattr(model, "main_input_name", "input_ids"))
        self._codebooks = count_codebooks(model)
        self._paged = PagedSessions(model, found.targets, values, get_rows)
        self._num_layers = getattr(get_text_config(model), "num_hidden_layers", None)
        self._handles: list[RemovableHandle] = []
        self._wrapped = WrappedForwards()
        try:
            first_kind = found.targets[0].kind
            self.positions = PositionHooks(model, found.positions, first_kind, adapters, get_rows, self._current)
            self._register()
        except BaseException:
            self.remove()
            raise
        forget_graphs(model)

    def _register(self) -> None:
        self._add_pre_hook(self.model, self._note_replica)
        self._wrapped.wrap(self.model, self._run_model)
        self._paged.install()
        for index, target in enumerate(self._targets):
            if target.entry is not None:
                target.entry.install(target.module, partial(self._attend, index))
                if len(target.slots) > 1:
                    self._add_pre_hook(target.module, partial(self._count_call, index))
                continue
            self._add_pre_hook(target.module, partial(self._before_attention, index))
            if target.own_mask is not None:
                self._wrapped.wrap(target.module, self._run_with_own_mask, index)
        for follower, source in self._followers:
            index = next(index for index, target in enumerate(self._targets) if target is source)
            self._add_pre_hook(follower.module, partial(self._before_follower, follower, index))

    def _add_pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks. The model is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if hasattr(self, "positions"):
            self.positions.remove()
        for target in self._targets:
            if target.entry is not None:
                target.entry.uninstall(target.module)
        self._wrapped.remove()
        self._paged.remove()
        self._checkpointing.release()
        forget_graphs(self.model)

    def get_current_rows(self) -> list[Row]:
        """The adapters of each row in the forward that this thread is in, or, outside of one, for this thread."""
        return self._current.get().rows or self._get_rows()

    # ---- A forward of the model

    def _note_replica(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a replica that `nn.DataParallel` calls: its wrapped forward is that of the original.

        Raises:
            RuntimeError: Inside `use_strength`, which has no effect on the threads of replicas.
        """
        if module is not self.model:
            call = self._calls.current
            if self._calls.has_strengths and (call is None or call.strengths is None):
                raise RuntimeError(
                    "`use_strength` has no effect on the threads of `nn.DataParallel`. Call the model without it, or "
                    "use `set_strength`."
                )
            self._calls.thread.replica = module

    def _run_model(self, wrapped: WrappedForward, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward, with a state that ends with the forward, however that ends."""
        compiling, module = torch.compiler.is_compiling(), self.model
        if not compiling and self._calls.thread.replica is not None:
            module, self._calls.thread.replica = self._calls.thread.replica, None
        forward = wrapped.get_unwrapped(module)
        for name in self._unnamed_inputs:
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        if torch.jit.is_tracing():
            # `torch.jit.trace` runs the model twice and compares: no run may use plans of an earlier one.
            self._planner.clear()
        rows: list[Row] = [()] if wrapped.is_removed else self._begin_forward()
        state = ForwardState(rows if compiling else self._paged.pin_rows(kwargs, rows))
        active = any(state.rows)
        if compiling:
            self._traced_calls.clear()
            if active:
                self._before_model(state, module, args, kwargs)
            return forward(*args, **kwargs)
        outer = self._current.state
        try:
            self._current.state = state
            with self._paged.take_turn():
                if active:
                    self._before_model(state, module, args, kwargs)
                output = forward(*args, **kwargs)
            if active:
                self._after_model(state, kwargs)
            return output
        finally:
            self._current.state = outer

    def _before_model(
        self, state: ForwardState, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        call = self._calls.current
        mixed = call is not None and call.mixed
        if not torch.compiler.is_compiling():
            if call is not None and mixed:
                self._values.drop_outdated(call)
            else:
                self._values.encode_row(state.rows[0], state)
        inputs = ModuleCall(self._names, args, kwargs)
        self.positions.prepare(state, inputs)
        if call is not None and mixed:
            names = len(call.rows)
            batch = get_batch_size(inputs, self._main_input)
            if batch is not None and call.count_rows and batch != names * self._codebooks:
                call.check_row_count(batch, replica=module is not self.model)
            # In an encoder-decoder the rows are those of the decoder: beams are added after the encoder.
            shape = get_sequences(inputs, "decoder_")[1] or get_sequences(inputs)[1]
            state.batch = self._count_rows(shape, names) if shape else batch
        self._checkpointing.prepare(self.model.training and torch.is_grad_enabled())

    def _count_rows(self, shape: tuple[int, ...], names: int) -> int:
        """The rows of a batch with token ids of this shape, for `names` adapters.

        With several codebooks the ids are `[batch, tokens, codebooks]`, or `[batch * codebooks, tokens]` (MusicGen).
        """
        if self._codebooks > 1 and shape[-1] == self._codebooks:
            return shape[0]
        rows = math.prod(shape[:-1])
        return rows if rows % (names * self._codebooks) else rows // self._codebooks

    def _after_model(self, state: ForwardState, kwargs: dict[str, Any]) -> None:
        """Check that each prefix was used."""
        for index, calls in state.calls.items():
            target = self._targets[index]
            if calls != len(target.slots):
                raise PrefixNotUsedError(
                    f"{target.name} serves {len(target.slots)} layers, each with a prefix of its own, and was called "
                    f"{calls} times. Was the number of layers changed after the adapter was added? Wrap the model "
                    "again."
                )
        drops_layers = False
        if self.model.training:
            config = getattr(self.model, "config", None)
            names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
            drops_layers = any(getattr(config, name, 0) for name in names)
        encoder_rests = kwargs.get("encoder_outputs") is not None
        expected = self._planner.get_expected(state.rows, self._calls.current, encoder_rests)
        self._usage.check(state, expected, self._get_left_out, drops_layers)

    def _get_left_out(self) -> set[int]:
        """The indices of targets in layers beyond the config's number of layers.

        transformers lowers that number to generate drafts with a model's first layers (`assistant_early_exit`).
        """
        num_layers = getattr(get_text_config(self.model), "num_hidden_layers", None)
        if self._num_layers is None or num_layers is None or num_layers >= self._num_layers:
            return set()
        return {
            index
            for index, target in enumerate(self._targets)
            if all(slot.layer >= num_layers for slot in target.slots.values())
        }

    # ---- A call of an attention module

    def _before_attention(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Insert the prefix into the arguments of an attention module."""
        target, state = self._targets[index], self._current.get()
        rows = state.rows or self._get_rows()
        running = self._calls.current if len(rows) > 1 else None
        call = target.call(args, kwargs)
        plan = self._planner.plan(index, call.get(target.names[0]), rows, running)
        if plan is None:
            return None
        state.called.add(index)
        wider = WiderMask(module, plan.columns.length) if target.own_mask is not None else None

        def get_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> KeyValues:
            if wider is not None:
                wider.check_applied(target)
            self._usage.note_served(index, state)
            return self._values.get(target.get_slot(layer_idx), plan, keys, state, running)

        insert_prefix(call, target, self.model, plan.columns, get_prefix, state.shared)
        if wider is not None:
            call.kwargs["wider_mask"] = wider
        return call.arguments()

    def _run_with_own_mask(
        self, index: int, wrapped: WrappedForward, *args: Any, wider_mask: WiderMask | None = None, **kwargs: Any
    ) -> Any:
        """The forward of a module with a mask of its own."""
        target = self._targets[index]
        forward = wrapped.get_unwrapped(target.module if wider_mask is None else wider_mask.module)
        return self._own_masks.run(target, wider_mask, forward, args, kwargs)

    def _count_call(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the calls of a module that serves several layers."""
        calls = self._traced_calls if torch.compiler.is_compiling() else self._current.get().calls
        calls[index] = calls.get(index, 0) + 1

    def _get_called_slot(self, index: int, state: ForwardState) -> PrefixSlot:
        """The slot for the running call of a module that serves several layers.

        Raises:
            PrefixNotUsedError: If the call was not counted, or the module was called more often than in the probe.
        """
        target = self._targets[index]
        calls = self._traced_calls if torch.compiler.is_compiling() else state.calls
        number = calls.get(index, 0) - 1
        if number not in target.slots:
            raise PrefixNotUsedError(
                f"{target.name} serves {len(target.slots)} layers, each with a prefix of its own, and it is "
                "unknown which of them runs. Call the whole model, with as many layers as when the adapter was "
                "added, and without gradient checkpointing."
            )
        return target.slots[number]

    def _attend(
        self, index: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the attention function of a module, with the prefix in front of keys and values."""
        target, state = self._targets[index], self._current.get()
        rows = state.rows or self._get_rows()
        running = self._calls.current if len(rows) > 1 else None
        assert target.entry is not None
        plan = None
        if any(rows):
            slot = self._get_called_slot(index, state) if len(target.slots) > 1 else target.get_slot(None)
            plan = self._planner.plan(index, key, rows, running, slot)
        if plan is None:
            return target.entry.attend(module, query, key, value, *args, **kwargs)
        prefix = self._values.get(slot, plan, key, state, running)
        self._usage.note_served(index, state)
        return attend_with_prefix(
            prefix, plan.columns, target, state.shared, module, query, key, value, *args, **kwargs
        )

    def _before_follower(
        self,
        follower: AttentionTarget,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Widen the masks of a module that attends to the keys of the target with the given index."""
        call, state = ModuleCall(follower.names, args, kwargs), self._current.get()
        states, rows = call.get(follower.names[0]), state.rows or self._get_rows()
        plan = self._planner.plan(index, states, rows, self._calls.current)
        if plan is None:
            return None
        widen_masks(call, follower, self.model, plan.columns, state.shared)
        return call.arguments()


def get_text_config(model: nn.Module) -> Any:
    """The config of the text model in a model; `None` if the model has no config."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several text models (MusicGen)
        return config


def forget_graphs(model: nn.Module) -> None:
    """Have compiled parts of a model compiled again: graphs do not notice that hooks come or go."""
    if has_compiled_parts(model):
        torch.compiler.reset()
