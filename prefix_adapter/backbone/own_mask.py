"""Modules with a mask of their own in a buffer (GPT-Neo): the mask is wider while the module runs with a prefix."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttentionTarget


@dataclass(eq=False)
class WiderMask:
    """A request for a wider mask, from the hook that knows the prefix to the module's forward.

    Attributes:
        module: The module that is called: the target's, or a replica of it.
        length: Prefix length in tokens.
        applied: Whether the forward has seen the request.
    """

    module: nn.Module
    length: int
    applied: bool = False

    def check_applied(self, target: AttentionTarget) -> None:
        """Check, when the module asks for its prefix, that its mask shows the prefix.

        Raises:
            RuntimeError: If it does not.
        """
        if not self.applied:
            raise RuntimeError(
                f"{target.name}: its `forward` was replaced after the adapter was added, and hides the prefix. "
                "Add the adapter after whatever replaces it."
            )


class OwnMasks:
    """Runs modules with wider masks. Threads share a module and its mask, so they take turns."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A lock cannot be copied, and a copied model needs one of its own.
        return type(self), ()

    def run(
        self,
        target: AttentionTarget,
        request: WiderMask | None,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module's forward, with a wider mask if there is a request."""
        # A compiled graph takes no lock.
        with nullcontext() if torch.compiler.is_compiling() else self._lock:
            if request is None or target.own_mask is None:
                return forward(*args, **kwargs)
            # Read under the lock: another thread may have widened the mask before.
            own = getattr(request.module, target.own_mask)
            try:
                wide = F.pad(own, (request.length, 0, request.length, 0), value=True)
                setattr(request.module, target.own_mask, wide)
                request.applied = True
                return forward(*args, **kwargs)
            finally:
                setattr(request.module, target.own_mask, own)
