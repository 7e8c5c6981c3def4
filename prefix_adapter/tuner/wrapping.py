"""Modules whose `forward` is wrapped on the instance, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

from torch import nn

from ..private import get_forward_attribute


@dataclass(eq=False)
class WrappedForward:
    """The wrapped `forward` of one module.

    Attributes:
        module: The module.
        attribute: The attribute with the forward: accelerate keeps it under another name.
        before: The former value of the attribute on the instance; `None` if there was none.
        is_removed: Whether the wrapper was removed. Other code may have wrapped it again; it then does nothing.
    """

    module: nn.Module
    attribute: str
    before: Any
    is_removed: bool = False

    def get_unwrapped(self, module: nn.Module | None = None) -> Callable[..., Any]:
        """The forward without the wrapper.

        Args:
            module: The module that is called, if it is a replica of `nn.DataParallel`.
        """
        if self.before is not None:
            return self.before
        module = module or self.module
        return partial(type(module).forward, module)


class WrappedForwards:
    """The modules whose `forward` a method has wrapped.

    A wrapper is a partial of a bound method, not a closure, so that a copied model has wrappers of its own.
    """

    def __init__(self) -> None:
        self._wrapped: list[tuple[WrappedForward, Any]] = []

    def wrap(self, module: nn.Module, run: Callable[..., Any], *args: Any) -> None:
        """Replace `module.forward` by `run`, which receives `args`, a `WrappedForward` and the call's arguments."""
        attribute = get_forward_attribute(module)
        entry = WrappedForward(module, attribute, vars(module).get(attribute))
        wrapper = update_wrapper(partial(run, *args, entry), getattr(module, attribute))
        self._wrapped.append((entry, wrapper))
        setattr(module, attribute, wrapper)

    def remove(self) -> None:
        """Remove the wrappers. Those that other code has wrapped again stay, and do nothing."""
        for entry, wrapper in self._wrapped:
            entry.is_removed = True
            if vars(entry.module).get(entry.attribute) is not wrapper:
                continue
            if entry.before is None:
                delattr(entry.module, entry.attribute)
            else:
                setattr(entry.module, entry.attribute, entry.before)
        self._wrapped = []
