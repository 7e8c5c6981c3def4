"""Never a silent no-op: what is checked before and after each forward of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.attention import AttentionTarget
from ..backbone.positions import PositionTarget
from .batch import PerThread, Row


class PrefixNotUsedError(RuntimeError):
    """An attention layer that should have received its prefix did not, so the adapter would have had no effect."""


@dataclass
class Forward:
    """What is noted in a forward of the whole model.

    Attributes:
        rows: the adapters of each row; a single entry if all rows have the same. Empty in a forward of a part of the
            model, such as an encoder, of which nothing is noted.
        batch: the number of sequences in a batch whose rows have adapters of their own, if it is known.
        shifts: by how much the positions of each row move, by kind of attention.
        called: indices of the targets that were given a view with a prefix.
        served: of those that have asked it.
        memo: what is the same for all of its layers, by whatever tells it apart.
    """

    rows: list[Row] = field(default_factory=list)
    batch: int | None = None
    shifts: dict[str, list[int]] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    served: set[int] = field(default_factory=set)
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _Trace:
    """Of one target: whether it was served when it was compiled."""

    served: bool = False


class _Running(PerThread):
    """The forward that this thread is in; each thread has its own, `nn.DataParallel`'s replicas too."""

    forward: Forward | None = None


class Watch:
    """Sees to it that every layer that should receive a prefix in a forward does.

    A compiled model, or part of one, runs without us; what is traced is checked when it is traced.

    Args:
        targets: the layers that may receive one.
    """

    def __init__(self, targets: list[AttentionTarget]) -> None:
        self._targets = targets
        self._running = _Running()
        # Attributes, not a set: what a graph has read of that, it is compiled anew for when it changes.
        self._traces = [_Trace() for _ in targets]
        self._input_gradients = False
        self._may_checkpoint: list[Any] | None = None

    @property
    def current(self) -> Forward | None:
        """The forward of the whole model that this thread is in."""
        return self._running.forward

    @current.setter
    def current(self, forward: Forward | None) -> None:
        self._running.forward = forward

    @property
    def forward(self) -> Forward:
        """The same; if there is none, a new one that nobody keeps."""
        return Forward() if torch.compiler.is_compiling() else self.current or Forward()

    def served(self, index: int, forward: Forward) -> None:
        """A target has asked for its prefix."""
        if torch.compiler.is_compiling():
            self._traces[index].served = True
        else:
            forward.served.add(index)

    def check(
        self, forward: Forward, expected: list[int], left_out: Callable[[], set[int]], drops_layers: bool
    ) -> None:
        """Check a forward that is over.

        Args:
            forward: what was noted in it.
            expected: indices of the targets with a prefix.
            left_out: gives the indices of those that the model was told to leave out.
            drops_layers: whether the model leaves out layers at random (LayerDrop).

        Raises:
            PrefixNotUsedError: if one of them was not reached, or did not ask for it. A whole stack may rest, such as
                cross-attention without an encoder, but not all of them.
        """
        if len(forward.served) == len(expected):
            return
        unused = forward.called - forward.served
        if unused:
            raise PrefixNotUsedError(
                f"{self._names(unused)} was called with a prefix and did not use it: it no longer asks its cache for "
                "keys and values. Its outputs would silently be the base model's."
            )
        served = forward.served | {index for index, trace in enumerate(self._traces) if trace.served}
        skipped = left_out()
        expected = [index for index in expected if index not in skipped]
        active = {self._targets[index].stack for index in expected if index in served}
        missed = [
            index for index in expected if index not in served and (self._targets[index].stack in active or not active)
        ]
        if missed and not (drops_layers and active):
            raise PrefixNotUsedError(
                f"The forward pass did not reach {self._names(missed)}, so the prefix had no effect there. Were "
                "modules replaced after the adapter was added? Wrap the model again."
            )

    def _names(self, indices: Iterable[int]) -> str:
        targets = [self._targets[index] for index in sorted(indices)]
        return ", ".join(f"{target.name} ({type(target.module).__name__})" for target in targets)

    def prepare_checkpointing(self, model: nn.Module, shares_keys: bool) -> None:
        """See to it that gradient checkpointing loses no gradient.

        Args:
            shares_keys: whether the model hands keys and values on from layer to layer.

        Raises:
            ValueError: where that cannot be helped.
        """
        if self._may_checkpoint is None:
            # To go through all modules takes its time, and what can be switched on says so from the beginning.
            self._may_checkpoint = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        modules = [module for module in self._may_checkpoint if module.gradient_checkpointing]
        if not modules:
            return
        # transformers keeps the function, with its settings, under a private name.
        functions = (getattr(module, "_gradient_checkpointing_func", None) for module in modules)
        reentrant = any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)
        if reentrant and shares_keys:
            raise ValueError(
                f"{type(model).__name__} hands keys and values on from layer to layer, and reentrant gradient "
                'checkpointing loses their gradients. Use `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        # Reentrant checkpointing drops the gradient of everything inside a layer whose input needs none. PEFT sees to
        # that only if checkpointing is on before wrapping. A second call would lose the handles of the first, which
        # transformers keeps under a private name.
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if reentrant and enable is not None and not getattr(model, "_require_grads_hooks", None):
            enable()
            self._input_gradients = True

    def release(self, model: Any) -> None:
        """Undo what was done to the model."""
        if self._input_gradients:
            model.disable_input_require_grads()
            self._input_gradients = False


def check_fits(model: nn.Module, tokens: int, limit: int | None, shift: int) -> None:
    """Refuse an input that is longer than a table of positions, before it ends in an index error.

    Raises:
        ValueError: if it is.
    """
    if limit is not None and tokens + shift > limit:
        moved = f" and `shift_positions` takes {shift} of them" if shift else ""
        raise ValueError(
            f"The input has {tokens} tokens, but {type(model).__name__} has {limit} positions{moved}. Truncate the "
            f"input to {limit - shift} tokens."
        )


def sequences(args: tuple[Any, ...], kwargs: dict[str, Any], side: str = "") -> tuple[Tensor | None, tuple[int, ...]]:
    """The token ids that a model is given, and their shape or that of their embeddings: batch, any choices, tokens.

    `side` is `"decoder_"` for those of an encoder-decoder's decoder. The shape is empty if there are none.
    """
    ids, embeddings = kwargs.get(f"{side}input_ids", args[0] if args else None), kwargs.get(f"{side}inputs_embeds")
    if ids is not None:
        return ids, tuple(ids.shape)
    return None, tuple(embeddings.shape[:-1]) if embeddings is not None else ()


def check_input(
    model: nn.Module, ids: Tensor | None, tokens: int, positions: list[PositionTarget], shift: int
) -> None:
    """`check_fits` for the input of a model with one stack; an encoder-decoder has one for each of its inputs."""
    tables = [target for target in positions if target.limit is not None]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    for table in tables:
        needed = tokens
        if tokens + shift > (table.limit or 0) and table.padding is not None and ids is not None:
            needed = int((ids != table.padding).sum(-1).max())
        check_fits(model, needed, table.limit, shift)
