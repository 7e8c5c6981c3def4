"""Adapters that are being loaded.

PEFT and transformers put an adapter into the model first and read its weights afterwards. If reading fails, the model
has an adapter with random weights, and PEFT has no call for that moment. So the layer records which adapters wait for
their weights. Such an adapter is never used, and it is removed when the model is used next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..private import get_write_count


@dataclass
class PendingLoad:
    """An adapter whose weights are not read yet, and the state of the model before it was added.

    Attributes:
        source: The place of its weights, for messages.
        parameters: Its own parameters, each with its number of writes.
        active: The adapters that were active.
        requires_grad: Each parameter of the model with its `requires_grad`.
        embeddings: Copies of the base model's embeddings that the adapter's file contains too, by name.
        ends_later: Whether loading ends with a call of `AdapterLayer.end_load`, as PEFT's loading does, and
            not as soon as the weights are there.
        thread: The thread that loads the adapter.
    """

    source: str
    parameters: list[tuple[Tensor, int]]
    active: list[str]
    requires_grad: list[tuple[nn.Parameter, bool]]
    embeddings: dict[str, Tensor]
    ends_later: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def begin(
        cls,
        source: str,
        model: nn.Module,
        parameters: Iterable[Tensor],
        active: list[str],
        embeddings: dict[str, Tensor],
    ) -> PendingLoad:
        """Record the state of an adapter that was just added to the model."""
        return cls(
            source,
            [(parameter, get_write_count(parameter)) for parameter in parameters],
            active,
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            {name: tensor.detach().clone() for name, tensor in embeddings.items()},
        )

    def has_weights(self, parameters: list[Tensor]) -> bool:
        """Whether all of its own parameters were written to or replaced. PEFT loads them after the task heads."""
        if len(parameters) != len(self.parameters):
            return True
        return all(
            new is not old or new.is_inference() or get_write_count(new) != count
            for new, (old, count) in zip(parameters, self.parameters, strict=True)
        )

    @property
    def in_this_thread(self) -> bool:
        """Whether this thread began to load the adapter. Another thread may still be loading it."""
        return self.thread == threading.get_ident()

    def restore(self, model: nn.Module) -> None:
        """Give the base model's parameters the state that they had before."""
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for name, before in self.embeddings.items():
                model.get_parameter(name).copy_(before)
