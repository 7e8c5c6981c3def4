"""Check that every prefix is used: a prefix without an effect is an error, never silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..backbone.attention import AttentionTarget
from .state import ForwardState


class PrefixNotUsedError(RuntimeError):
    """An attention layer did not use its prefix, so the adapter would have had no effect there.

    Example:
        ```python
        model.base_model.model.encoder.layer[0] = other_layer  # replaced after the adapter was added
        model(**batch)  # PrefixNotUsedError: The forward pass did not reach encoder.layer.0.attention.self ...
        ```
    """


@dataclass
class _Trace:
    """Whether a target used its prefix when the compiler traced it."""

    served: bool = False


class UsageCheck:
    """Checks after each forward that every attention module with a prefix used it.

    A compiled model runs without Python, so it is checked when it is traced.

    Args:
        targets: The attention modules of the model.
    """

    def __init__(self, targets: list[AttentionTarget]) -> None:
        self._targets = targets
        # Objects with an attribute, not a set: a graph is compiled again when an attribute changes that it has read.
        self._traces = [_Trace() for _ in targets]

    def note_served(self, index: int, state: ForwardState) -> None:
        """Note that a target asked for its prefix."""
        if torch.compiler.is_compiling():
            self._traces[index].served = True
        else:
            state.served.add(index)

    def check(
        self, state: ForwardState, expected: list[int], get_left_out: Callable[[], set[int]], drops_layers: bool
    ) -> None:
        """Check a forward at its end.

        Args:
            state: The state of the forward.
            expected: The indices of targets with a prefix.
            get_left_out: Returns the indices of targets that the model was told to leave out.
            drops_layers: Whether the model leaves out layers at random (LayerDrop).

        Raises:
            PrefixNotUsedError: If a target was not called, or did not ask for its prefix. A whole stack may rest, such
                as cross-attention without an encoder, but not all of them.
        """
        if len(state.served) == len(expected):
            return
        unused = state.called - state.served
        if unused:
            raise PrefixNotUsedError(
                f"{self._describe(unused)} was called with a prefix and did not use it: it no longer asks its cache "
                "for keys and values. Its outputs would silently be the base model's."
            )
        served = state.served | {index for index, trace in enumerate(self._traces) if trace.served}
        left_out = get_left_out()
        expected = [index for index in expected if index not in left_out]
        active = {self._targets[index].stack for index in expected if index in served}
        missed = [
            index for index in expected if index not in served and (self._targets[index].stack in active or not active)
        ]
        if missed and not (drops_layers and active):
            raise PrefixNotUsedError(
                f"The forward pass did not reach {self._describe(missed)}, so the prefix had no effect there. Were "
                "modules replaced after the adapter was added? Wrap the model again."
            )

    def _describe(self, indices: Iterable[int]) -> str:
        targets = [self._targets[index] for index in sorted(indices)]
        return ", ".join(f"{target.name} ({type(target.module).__name__})" for target in targets)
