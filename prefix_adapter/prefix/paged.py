"""Continuous batching (`generate_batch` and its manager): which adapters it uses, and what it cannot do.

Its forwards run in a thread of its own, and have the tokens of many requests in one row. The keys and values in its
cache are those of the adapters that were active when they were computed, and blocks of one request serve another one
that begins with the same tokens. So all forwards on one cache have the adapters with which the session began.

The forwards of one model take turns while it has such a cache: the engine passes `is_causal`, which transformers
writes into the model's config for the time of the forward, where forwards of other threads read it.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, update_wrapper
from typing import Any

from torch import nn

from ..backbone.attention import AttentionTarget, get_implementation
from ..backbone.cache import is_paged
from ..backbone.calls import CACHE_ARGUMENTS
from ..private import get_attention_implementation
from ..tuner.running import Row
from .values import PrefixValues

# The attribute of a cache with the adapters of its keys and values.
_SESSION = "prefix_session"
_ENTRIES = ("init_continuous_batching", "generate_batch")


class _Turns:
    """The turns of forwards on one model. A copied or unpickled model has its own.

    Attributes:
        lock: It is held in a forward.
        caches: The caches of continuous batching that exist.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PagedSessions:
    """The sessions of continuous batching of one model.

    The entries of continuous batching are wrapped on the instance, because an error in a forward would only appear in
    the results.

    Args:
        model: The model.
        targets: Its attention modules.
        values: The keys and values of its prefixes.
        get_rows: Returns the adapters of each row for this thread.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[AttentionTarget],
        values: PrefixValues,
        get_rows: Callable[[], list[Row]],
    ):
        self._model, self._targets, self._values = model, targets, values
        self._get_rows, self._turns = get_rows, _Turns()
        self._wrapped: dict[str, Any] = {}

    def install(self) -> None:
        """Wrap the entries of continuous batching, if the model has them."""
        for name, run in zip(_ENTRIES, (self._begin, self._generate), strict=True):
            if hasattr(self._model, name):
                self._wrapped[name] = vars(self._model).get(name)
                setattr(self._model, name, update_wrapper(partial(run), getattr(self._model, name)))

    def remove(self) -> None:
        """Unwrap the entries."""
        for name, before in self._wrapped.items():
            if getattr(vars(self._model).get(name), "func", None) in (self._begin, self._generate):
                if before is None:
                    delattr(self._model, name)
                else:
                    setattr(self._model, name, before)
        self._wrapped = {}

    def take_turn(self) -> AbstractContextManager[Any]:
        """Inside this context, no other forward of the model runs, if it has a cache of continuous batching."""
        return self._turns.lock if self._turns.caches else nullcontext()

    def pin_rows(self, kwargs: Mapping[str, Any], rows: list[Row]) -> list[Row]:
        """The adapters of a forward: on a cache of continuous batching, those with which its session began.

        Args:
            kwargs: The arguments of the forward.
            rows: The adapters of each row for this thread.
        """
        for name in CACHE_ARGUMENTS:
            cache = kwargs.get(name)
            if is_paged(cache):
                if not hasattr(cache, _SESSION):
                    self._begin_session(cache, self._describe(rows))
                pinned: list[Row] = getattr(cache, _SESSION)[0]
                return pinned
        return rows

    def _begin_session(self, cache: Any, session: tuple[list[Row], list[Any]]) -> None:
        setattr(cache, _SESSION, session)
        self._turns.caches.add(cache)

    def _describe(self, rows: list[Row]) -> tuple[list[Row], list[Any]]:
        """The adapters of a session, and the state of their parameters."""
        return rows, [self._values.get_writes(active.adapter) for row in rows for active in row]

    def _get_unwrapped(self, name: str) -> Callable[..., Any]:
        before = self._wrapped.get(name)
        return partial(getattr(type(self._model), name), self._model) if before is None else before

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch`, which ignores arguments that it does not know.

        Raises:
            ValueError: If there are names of adapters.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Continuous batching has no place for `adapter_names`: all requests get the active adapter. Activate "
                "it with `set_adapter`, or use `generate`."
            )
        return self._get_unwrapped("generate_batch")(*args, **kwargs)

    def _begin(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`init_continuous_batching`, which returns a manager.

        Raises:
            ValueError: If a prefix does not work with the model or the settings, or if several are set at once.
        """
        begin, rows = self._get_unwrapped("init_continuous_batching"), self._get_rows()
        implementation = get_attention_implementation(getattr(self._model, "config", None))
        if any(rows):
            self._check(rows)
            continuous_batching_config = self._without_flash(generation_config, continuous_batching_config)
        manager = begin(generation_config, continuous_batching_config, *args, **kwargs)
        try:
            graphs = _find_graphs(manager.continuous_batching_config)
            if graphs and any(rows):
                raise ValueError(graphs)
            if not graphs and manager.batch_processor is None:
                manager.warmup()  # Without graphs it runs no forward. It makes the cache, which keeps the adapters.
        except BaseException:
            self._model.set_attn_implementation(implementation)  # type: ignore[operator]
            raise
        # The blocks of a manager of an earlier session may be those of other adapters or of other parameters.
        processor = manager.batch_processor
        if processor is not None and not manager.is_running():
            session = self._describe(rows)
            if getattr(processor.cache, _SESSION, session) != session:
                processor.cache.reset()
            self._begin_session(processor.cache, session)
        return manager

    def _check(self, rows: list[Row]) -> None:
        from transformers.generation.continuous_batching import PagedAttentionCache

        if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
            raise ValueError("Continuous batching with a prefix needs transformers 5.23 or later. Use `generate`.")
        if len(rows) > 1:
            raise ValueError(
                "All requests of continuous batching get the same adapter with the same strength, and "
                f"{len(rows)} are set here. Set one (`set_adapter`, `use_strength(model, number)`), or use `generate`."
            )
        for target in self._targets:
            if target.kind != "decoder" or target.entry or target.own_mask or target.bias or target.shares_bias:
                raise ValueError(
                    f"Continuous batching with a prefix does not work on {target.name} of "
                    f"{type(self._model).__name__}: it needs a decoder whose attention takes a cache "
                    "and has no position biases or masks of its own. Use `generate`."
                )
            if get_implementation(target.module, self._model).startswith("flash_attention"):
                raise ValueError(
                    "Continuous batching with a prefix needs attn_implementation='sdpa' or 'eager': flash attention "
                    "would read a table of blocks, in which a prefix has no place."
                )

    def _without_flash(self, generation_config: Any, settings: Any) -> Any:
        """The settings of continuous batching, without a switch to flash attention."""
        from transformers import ContinuousBatchingConfig

        if settings is None:
            own = generation_config or getattr(self._model, "generation_config", None)
            settings = getattr(own, "continuous_batching_config", None)
        settings = ContinuousBatchingConfig() if settings is None else copy.copy(settings)
        settings.auto_switch_to_flash = False
        return settings


def _find_graphs(settings: Any) -> str | None:
    """Why a prefix does not work with the settings of a manager: a graph keeps the prefix that it was made with.

    Returns:
        The text of an error if forwards are compiled or captured, else `None`.
    """
    graphs = getattr(settings, "use_cuda_graph", None)
    if graphs is True or (isinstance(graphs, tuple) and any(graphs)):
        return "Continuous batching with a prefix runs without CUDA graphs: set `use_cuda_graph=False`."
    if settings.varlen_compile_config is not None or settings.decode_compile_config is not None:
        return (
            "Continuous batching with a prefix is not compiled: leave `varlen_compile_config`, "
            "`decode_compile_config` and `default_compile_level` out."
        )
    return None
