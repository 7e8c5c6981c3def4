"""The calls of a model that are running, in each thread, and the adapters of their rows."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ActiveAdapter(NamedTuple):
    """An adapter in a row of a batch.

    Attributes:
        adapter: The adapter's name.
        strength: The factor of its effect, for methods that have one; above 0.
    """

    adapter: str
    strength: float = 1.0


# The adapters of one row of a batch, from left to right. Empty for the base model.
Row = tuple[ActiveAdapter, ...]


class PerThread(threading.local):
    """Attributes with a value for each thread.

    A copied or unpickled model starts with the defaults: the running calls are calls of the original.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(eq=False)
class AdapterCall:
    """One call of the model in one thread: `forward` or `generate` of a `PeftModel`, or a call of an `AdapterPool`.

    It keeps the adapters with which it began: another thread that switches adapters does not change it.

    Attributes:
        names: The `adapter_names` of the call; `None` if it uses the active adapters.
        strengths: The strength of the adapters in each row, or one for all rows; `None` for each adapter's own.
        adapters: The names of each row's adapters; a single entry if all rows have the same.
        rows: The adapters of each row, without those of strength 0; a single entry if all rows have the same.
        outer: The call of the same thread around this one.
        count_rows: Whether the number of rows must still be compared with the number of names.
        plans: Cached plans of a mixed batch, by module and batch.
        tensors: Cached prefixes of a mixed batch, by slot and batch, and low-rank matrices, by linear layer and batch.
        expected: Cached indices of the targets that must use a prefix.
        written: The state of the parameters that `tensors` were computed from, by adapter.
    """

    names: list[str] | None
    strengths: float | list[float] | None
    adapters: list[tuple[str, ...]]
    rows: list[Row]
    outer: AdapterCall | None = None
    count_rows: bool = False
    plans: dict[Hashable, Any] = field(default_factory=dict)
    tensors: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    expected: dict[Hashable, list[int]] = field(default_factory=dict)
    written: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def is_set(self) -> bool:
        """Whether the call sets adapters or strengths, which may differ from those of the model."""
        return self.names is not None or self.strengths is not None

    @property
    def mixed(self) -> bool:
        """Whether rows have adapters or strengths of their own."""
        return self.names is not None or isinstance(self.strengths, list)

    def check_row_count(self, batch: int, replica: bool) -> None:
        """Compare the number of adapters or strengths that the call sets with the number of rows.

        Args:
            batch: The number of rows.
            replica: Whether the model is a copy that `nn.DataParallel` has made for a part of the batch.

        Raises:
            ValueError: If they differ.
        """
        if len(self.rows) != batch:
            what, entries = ("use_strength", "numbers") if self.names is None else ("adapter_names", "names")
            split = f" `nn.DataParallel` splits the batch but not the {entries}: call the model without it."
            raise ValueError(
                f"`{what}` has {len(self.rows)} {entries} for a batch of {batch}.{split if replica else ''}"
            )

    def switch(self, adapters: list[tuple[str, ...]], rows: list[Row]) -> None:
        """Continue with other adapters."""
        self.adapters, self.rows = adapters, rows
        self.plans, self.tensors, self.expected = {}, {}, {}


def get_tensor_cache(call: AdapterCall | None) -> dict[Hashable, tuple[Tensor, Tensor]]:
    """The cached tensors of a call. With gradients there are none: they belong to the graph of one forward."""
    return {} if call is None or torch.is_grad_enabled() else call.tensors


class _Thread(PerThread):
    """The state of one thread.

    Attributes:
        call: Its innermost call of a `PeftModel`.
        replica: The copy of the model that `nn.DataParallel` is about to call in it.
    """

    call: AdapterCall | None = None
    replica: nn.Module | None = None


class RunningCalls:
    """The calls of one model that are running, in all threads. A copied or unpickled model has none.

    Attributes:
        thread: The state of the thread that asks.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        # The innermost calls of all threads. A graph cannot tell threads apart, so it uses the only one of `_set`:
        # calls that set adapters or strengths. In the others the active adapters count.
        self._set: list[AdapterCall] = []
        self._plain: list[AdapterCall] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def run(self, call: AdapterCall) -> Iterator[None]:
        """Inside this context, this thread is in a call."""
        compiling = torch.compiler.is_compiling()
        if compiling and not call.is_set:
            # A graph reads the active adapters, and is compiled again when they change.
            yield
            return
        try:
            self._replace(call.outer, call)
            if not compiling:
                self.thread.call = call
            yield
        finally:
            if not compiling:
                self.thread.call = call.outer
            self._replace(call, call.outer)

    def _replace(self, old: AdapterCall | None, new: AdapterCall | None) -> None:
        """Replace the innermost call of a thread. A Ctrl-C may come between any two lines, so each looks first."""
        for calls in (self._set, self._plain):
            if new is not None and new not in calls and new.is_set == (calls is self._set):
                calls.append(new)
            if old is not None and old in calls:
                calls.remove(old)

    @property
    def current(self) -> AdapterCall | None:
        """The innermost running call of this thread.

        Raises:
            RuntimeError: In a compiled graph, which cannot tell threads apart, if another thread is in a call too.
        """
        if not torch.compiler.is_compiling():
            return self.thread.call
        if not self._set:
            return None
        if len(self._set) + len(self._plain) > 1:
            raise RuntimeError(
                "A compiled model was called with `adapter_names`, or inside `use_strength`, while another thread is "
                "in a call of it. Let the threads take turns, or do not compile the model."
            )
        return self._set[0]

    @property
    def has_strengths(self) -> bool:
        """Whether a call of any thread sets strengths."""
        return any(call.strengths is not None for call in self._set)

    def list_of_thread(self) -> list[AdapterCall]:
        """The running calls of this thread, innermost first."""
        calls, call = [], self.thread.call
        while call is not None:
            calls.append(call)
            call = call.outer
        return calls

    def check_unused(self, adapter_name: str) -> None:
        """Check that no running call uses an adapter that is about to be deleted.

        Raises:
            RuntimeError: If a call of any thread uses it.
        """
        call: AdapterCall | None
        for call in [*self._set, *self._plain]:
            while call is not None:
                if any(adapter_name in names for names in call.adapters):
                    raise RuntimeError(
                        f"Adapter {adapter_name!r} is in use by a call of the model that is still running. Delete it "
                        "when the call is over."
                    )
                call = call.outer


def pick_rows(entries: list[int], states: Tensor) -> Tensor | None:
    """The entry for each row of a batch `[batch, ...]`; `None` if all are the same.

    Args:
        entries: An entry for each name. A batch may have several rows for each name: beams and the choices of a
            multiple-choice question are next to each other.
        states: A tensor of the batch.

    Raises:
        ValueError: If the batch is no multiple of the number of names.
    """
    batch = states.shape[0]
    if len(entries) > 1 and batch % len(entries):
        raise ValueError(f"There are adapters or strengths for {len(entries)} rows, and the batch has {batch}.")
    if len(set(entries)) == 1:
        return None
    return torch.tensor(entries, device=states.device).repeat_interleave(batch // len(entries))
