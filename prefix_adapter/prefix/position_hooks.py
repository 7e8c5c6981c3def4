"""Hooks on the modules that look up or compute positions: they shift positions, and check the input length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backbone.calls import POSITIONS_ARGUMENT, ModuleCall, get_sequences, parameter_names
from ..backbone.positions import (
    PositionTarget,
    check_fits_table,
    check_input_length,
    count_behind_padding,
    find_counting_module,
)
from ..tuner.running import Row
from .batch import AdapterInfo, pick_outputs
from .state import CurrentForward, ForwardState


class PositionHooks:
    """The hooks on position modules of one model.

    Args:
        model: The model.
        targets: Its position modules.
        first_kind: The kind of attention that reads the model's input: `"encoder"` or `"decoder"`.
        adapters: The model's adapters, by name.
        get_rows: Returns the adapters of each row for this thread.
        current: The forward that this thread is in.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[PositionTarget],
        first_kind: str,
        adapters: Mapping[str, AdapterInfo],
        get_rows: Callable[[], list[Row]],
        current: CurrentForward,
    ):
        self._model, self._targets, self._first_kind = model, targets, first_kind
        self._adapters, self._get_rows, self._current = adapters, get_rows, current
        self._handles: list[RemovableHandle] = []
        # The indices of targets with hooks.
        self._hooked: set[int] = set()
        counting = find_counting_module(model, targets)
        if counting is not None:
            before = partial(self._before_counting, parameter_names(counting))
            self._handles.append(counting.register_forward_pre_hook(before, with_kwargs=True))
        self._register(limited=True)

    def register_for_shifts(self) -> None:
        """Add the hooks that only adapters with `shift_positions` need."""
        self._register(limited=False)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def prepare(self, state: ForwardState, call: ModuleCall) -> None:
        """Compute the shifts of a forward, and check the length of its input, before it runs.

        Args:
            state: The state of the forward.
            call: The call of the model.

        Raises:
            ValueError: If the input is longer than a table of positions.
        """
        if not self._hooked:
            return
        state.shifts = {target.kind: self._get_shifts(target.kind, state) for target in self._targets}
        ids, shape = get_sequences(call)
        if shape:
            shift = max(self._get_shifts(self._first_kind, state))
            given = call.get(POSITIONS_ARGUMENT)
            check_input_length(self._model, ids, shape[-1], self._targets, shift, given)

    def _register(self, limited: bool) -> None:
        # A table of positions has a limit to check. Other modules have hooks only if an adapter shifts positions.
        for index, target in enumerate(self._targets):
            if index not in self._hooked and (target.limit is not None) == limited:
                before, after = partial(self._before, index), partial(self._after, index)
                self._handles += [
                    target.module.register_forward_pre_hook(before, with_kwargs=True),
                    target.module.register_forward_hook(after, with_kwargs=True),
                ]
                self._hooked.add(index)

    def _get_shifts(self, kind: str, state: ForwardState) -> list[int]:
        """The position shift of each row in the encoder or the decoder."""
        if kind in state.shifts:
            return state.shifts[kind]
        rows = state.rows or self._get_rows()
        return [sum(self._adapters[name].get_shift(kind) for name, _ in row) for row in rows]

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shift the positions of a call."""
        target, state = self._targets[index], self._current.get()
        shifts = self._get_shifts(target.kind, state)
        tokens = target.count_if_too_long(args, kwargs, max(shifts))
        check_fits_table(self._model, tokens, target.limit, max(shifts))
        if not any(shifts) or (len(set(shifts)) > 1 and target.has_shared_positions(args, kwargs)):
            return None
        return target.shift(shifts, state.batch, args, kwargs)

    def _after(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """If rows have different shifts and the call has one list of positions, compute each shift and pick rows."""
        target, state = self._targets[index], self._current.get()
        shifts = self._get_shifts(target.kind, state)
        if len(set(shifts)) == 1 or not target.has_shared_positions(args, kwargs):
            return None
        if isinstance(output, Tensor) and output.dim() == 2 and not target.absolute:
            raise ValueError(
                f"{target.name} of {type(self._model).__name__} has the same positions for all rows, so rows whose "
                "adapters move positions by different lengths (`shift_positions`) cannot share a batch. Batch rows of "
                "one length."
            )
        outputs = {}
        for by in set(shifts):
            shifted, named = target.shift([by], None, args, kwargs)
            outputs[by] = module.forward(*shifted, **named)
        return pick_outputs([outputs[by] for by in shifts], state.batch or len(shifts))

    def _before_counting(
        self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let positions start at the first token of each row instead of its padding on the left."""
        if kwargs.get(POSITIONS_ARGUMENT) is not None:
            return None
        active = {name for row in self._get_rows() for name, _ in row}
        # With `shift_positions`, padding is counted as PEFT counts it.
        if not active or any(self._adapters[name].shifts for name in active):
            return None
        call = ModuleCall(names, args, kwargs)
        positions = count_behind_padding(self._targets, call)
        if positions is None:
            return None
        call.set(POSITIONS_ARGUMENT, positions)
        return call.arguments()
