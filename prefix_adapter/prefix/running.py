"""The calls of a model that are running, in each thread, and the adapters of their rows."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backbone.key_values import KeyValues
from .plan import BatchPlan, Row


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
        rows: The adapters of each row; a single entry if all rows have the same.
        outer: The call of the same thread around this one.
        count_rows: Whether the number of rows must still be compared with the number of names.
        plans: Cached plans of a mixed batch, by target and batch.
        prefixes: Cached prefixes of a mixed batch, by slot and batch.
        expected: Cached indices of the targets that must use a prefix.
    """

    names: list[str] | None
    rows: list[Row]
    outer: AdapterCall | None = None
    count_rows: bool = False
    plans: dict[Hashable, BatchPlan | None] = field(default_factory=dict)
    prefixes: dict[Hashable, KeyValues] = field(default_factory=dict)
    expected: dict[Hashable, list[int]] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether rows have adapters of their own."""
        return self.names is not None

    def switch(self, rows: list[Row]) -> None:
        """Continue with other adapters."""
        self.rows, self.plans, self.prefixes, self.expected = rows, {}, {}, {}


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
        self._mixed: list[AdapterCall] = []
        self._plain: list[AdapterCall] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def run(self, names: list[str] | None, rows: list[Row], count_rows: bool = False) -> Iterator[None]:
        """Inside this context, this thread is in a call.

        Args:
            names: The `adapter_names` of the call; `None` for the active adapters.
            rows: The adapters of each row; a single entry if all rows have the same.
            count_rows: Whether the rows must still be counted when the model is called.
        """
        compiling = torch.compiler.is_compiling()
        if names is None and compiling:
            # A graph reads the active adapters, and is compiled again when they change.
            yield
            return
        thread = self.thread
        call = AdapterCall(names, rows, None if compiling else thread.call, count_rows)
        calls = self._plain if names is None else self._mixed
        try:
            calls.append(call)
            if not compiling:
                thread.call = call
            yield
        finally:
            if not compiling:
                thread.call = call.outer
            calls.remove(call)

    @property
    def current(self) -> AdapterCall | None:
        """The innermost running call of this thread.

        Raises:
            RuntimeError: In a compiled graph, which cannot tell threads apart, if another thread is in a call too.
        """
        if not torch.compiler.is_compiling():
            return self.thread.call
        if not self._mixed:
            return None
        if len(self._mixed) + len(self._plain) > 1:
            raise RuntimeError(
                "A compiled model was called with `adapter_names` while another thread is in a call of it. Let the "
                "threads take turns, or do not compile the model."
            )
        return self._mixed[0]

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
        for call in [*self._mixed, *self._plain]:
            if any(adapter_name in row for row in call.rows):
                raise RuntimeError(
                    f"Adapter {adapter_name!r} is in use by a call of the model that is still running. Delete it when "
                    "the call is over."
                )
