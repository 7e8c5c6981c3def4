"""Find modules that compute attention without calling an attention function, which an entry could replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class PlainAttentionWatch(TorchFunctionMode):
    """Inside this context, notes the modules of a model that compute attention, but for calls within an entry.

    Args:
        model: The model.
        is_entry: Whether an object is the `self` of a method that calls an attention function for an entry.

    Attributes:
        found: The names of the modules.
    """

    def __init__(self, model: nn.Module, is_entry: Callable[[Any], bool]):
        super().__init__()
        self.found: list[str] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._is_entry = is_entry

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the module that calls a function of torch, if it computes attention with it."""
        if function in _ATTENTION or (function in _SOFTMAX and args and _is_scores(args[0])):
            self._note_caller()
        return function(*args, **(kwargs or {}))

    def _note_caller(self) -> None:
        """Note the innermost module among the objects whose methods are running."""
        name, frame = None, inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if self._is_entry(caller):
                return
            if name is None and isinstance(caller, nn.Module):
                name = self._names.get(caller)
            frame = frame.f_back
        if name and name not in self.found:
            self.found.append(name)


def _is_scores(scores: Tensor) -> bool:
    """Whether a tensor has the form of scores: `[batch, heads, queries, keys]` or `[rows, tokens, tokens]`."""
    return scores.dim() == 4 or (scores.dim() == 3 and scores.shape[1] == scores.shape[2] > 1)
