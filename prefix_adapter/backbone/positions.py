"""Where a backbone turns positions into something: the tables that limit its input, and how to shift them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import CACHE_ARGUMENTS, Call
from .probe import PROBE_LENGTH, innermost, input_embeddings, is_count, parameter_names

_IDS, _TABLE = "position_ids", "input"
# The number of tokens before, for modules that count positions themselves: `cache_length` from transformers 5.24 on.
_PASTS = ("cache_length", "past_key_values_length")


@dataclass
class PositionTarget:
    """A module that looks positions up or computes with them.

    Attributes:
        names: the arguments of its `forward`, in order.
        positions: which of them are the positions, if they are given.
        limit: how many positions it has; `None` if it computes them.
        absolute: whether what it gives is as wide as the hidden states, to be added to them.
        kind: the self-attention, `"encoder"` or `"decoder"`, whose input it places.
        column: whether its positions are `[tokens, 1]`, the same for all rows (Pegasus-X).
        axes: whether its positions have several axes `[axes, batch, tokens]`, for the time, height and width of images
            (Qwen2-VL), which the backbone makes as long as nobody gives any.
        counts: whether the positions of a text are 0, 1, 2, ... if nobody gives any.
        movable: whether a call says where positions start: positions are given, or the number of tokens before.
    """

    name: str
    module: nn.Module
    names: list[str]
    positions: str
    limit: int | None
    absolute: bool = False
    kind: str = ""
    column: bool = False
    axes: bool = False
    counts: bool = True
    movable: bool = True

    @property
    def padding(self) -> int | None:
        """The position of padding, where padding has no positions of its own (RoBERTa)."""
        padding: Any = getattr(self.module, "padding_idx", None)
        return padding if self.names == [_TABLE] else None

    @property
    def past(self) -> str | None:
        """The argument with the number of tokens before, from which the module counts positions if none are given."""
        return next((name for name in _PASTS if name in self.names), None)

    @property
    def relative(self) -> bool:
        """Whether only differences of positions count, as with rotary embeddings: there is no table, nor sinusoids."""
        return self.limit is None and not self.absolute and self.positions in self.names

    def shift(
        self, shifts: list[int], batch: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """The call's arguments with higher positions.

        Args:
            shifts: by how much they move in each row, or in all; not different ones if the call is `for_all_rows`.
            batch: the number of rows, if it is known.
            args: the call's own.
            kwargs: the call's own.
        """
        call = Call(self.names, args, kwargs)
        positions = call.get(self.positions)
        if positions is not None:
            by: Any = shifts[0]
            if len(set(shifts)) > 1:
                rows = max(positions.shape[-2], batch or len(shifts))
                positions = positions.expand(*positions.shape[:-2], rows, positions.shape[-1])
                by = positions.new_tensor(shifts).repeat_interleave(rows // len(shifts)).unsqueeze(-1)
            moved = positions + by
            if self.padding is not None:
                moved = torch.where(positions == self.padding, positions, moved)
            call.set(self.positions, moved)
        elif self.past is not None:
            # The module counts positions itself, from the number of tokens before.
            call.set(self.past, (call.get(self.past) or 0) + shifts[0])
        return tuple(call.args), call.kwargs

    def for_all_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has positions that are the same for all rows: `[tokens]`, or a number to count from."""
        positions = Call(self.names, args, kwargs).get(self.positions)
        return positions.dim() < 2 or self.column if isinstance(positions, Tensor) else self.past is not None

    def too_many(self, args: tuple[Any, ...], kwargs: dict[str, Any], shift: int) -> int:
        """How many tokens the call has, if with the shift there are not enough positions for them; else 0."""
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self.limit is None or given is None:
            return 0
        tokens = given.shape[1] if given.dim() > 1 else len(given)
        if tokens + shift > self.limit and self.padding is not None:
            tokens = int((given != self.padding).sum(-1).max())
        return tokens if tokens + shift > self.limit else 0


class PositionProbe:
    """Finds a model's position targets while `probe` runs: set up before, asked after.

    Args:
        model: the model that will be probed.
        attention: names of its attention modules. What has one inside is a layer, which passes positions on.
    """

    def __init__(self, model: nn.Module, attention: Iterable[str]):
        self._attention = set(attention)
        layers = {name.rpartition(".")[0] for name in self._attention}
        while inner := {name.rpartition(".")[0] for name in layers} - layers:
            layers |= inner
        modules = dict(model.named_modules())
        self._tables: dict[str, PositionTarget] = {}
        # Those of `_named` that were called.
        self._called: dict[str, PositionTarget] = {}
        self._width = getattr(input_embeddings(model), "embedding_dim", None)
        self._named = {
            name: module
            for name, module in modules.items()
            if name not in layers and {_IDS, *_PASTS} & set(parameter_names(module))
        }
        self._handles = [
            module.register_forward_pre_hook(self._look_at_table(name))
            for name, module in modules.items()
            if type(module).forward is nn.Embedding.forward
        ] + [
            module.register_forward_hook(self._note_call(name), with_kwargs=True)
            for name, module in self._named.items()
        ]

    def _look_at_table(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # The probe's tokens are all the same, so a table that is asked for consecutive rows is one of positions.
            first = is_count(args[0]) if args else None
            if first is not None and isinstance(module, nn.Embedding):
                limit = module.num_embeddings - first
                self._tables[name] = PositionTarget(name, module, [_TABLE], _TABLE, limit)

        return hook

    def _note_call(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            limit = module.num_embeddings - getattr(module, "offset", 0) if isinstance(module, nn.Embedding) else None
            target = PositionTarget(name, module, parameter_names(module), _IDS, limit)
            target.absolute = isinstance(output, Tensor) and output.shape[-1] == self._width
            positions = Call(target.names, args, kwargs).get(_IDS)
            if isinstance(positions, Tensor):
                target.column = positions.shape == (PROBE_LENGTH, 1)
                target.axes = positions.dim() > 2
                rows = positions.reshape(-1, PROBE_LENGTH) if positions.numel() % PROBE_LENGTH == 0 else [positions]
                target.counts = positions.device.type == "meta" or all(is_count(row) == 0 for row in rows)
            else:
                target.movable = target.past is not None
            self._called[name] = target

        return hook

    def found(self) -> list[PositionTarget]:
        """The targets, once `probe` has run; removes the hooks."""
        for handle in self._handles:
            handle.remove()
        tables = {name: target.module for name, target in self._tables.items()}
        # An attention module that was given no positions got them in another way, such as rotary embeddings.
        called = {n: t for n, t in self._called.items() if t.movable or n not in self._attention}
        known = {**called, **self._tables}
        return [known[name] for name in innermost({**self._named, **tables}) if name in known]


def counting_module(model: nn.Module, targets: list[PositionTarget]) -> nn.Module | None:
    """The module that counts the positions of a text if nobody gives any; `None` if none takes any from outside.

    It is the backbone, but not where positions have several axes. There the backbone makes those of images itself as
    long as nobody gives any, and the text model inside counts where the backbone makes none.
    """
    backbone: nn.Module = getattr(model, "base_model", model)
    if not any(target.axes for target in targets):
        return backbone if _IDS in parameter_names(backbone) else None
    wanted = {_IDS, "attention_mask", "inputs_embeds"}
    named = {name: module for name, module in backbone.named_modules() if wanted <= set(parameter_names(module))}
    axes = {id(target.module) for target in targets if target.axes}
    inner = [m for m in innermost(named).values() if any(id(part) in axes for part in m.modules())]
    return inner[0] if len(inner) == 1 else None


def positions_behind_padding(targets: list[PositionTarget], call: Call) -> Tensor | None:
    """Positions `[batch, tokens]` that start at each row's first token instead of its padding on the left.

    `None` if there is nothing to do: no row is padded on the left, the caller gives positions, or positions are looked
    up in a table. It is all the same to rotary embeddings where a row starts, but not to a prefix, which stands before
    the first token. transformers' generate passes such positions itself.
    """
    mask, past = call.get("attention_mask"), call.first(CACHE_ARGUMENTS)
    inputs = call.first(("input_ids", "inputs_embeds"))
    if not targets or not all(target.relative and target.counts for target in targets) or call.get(_IDS) is not None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or inputs is None or mask.shape[1] < inputs.shape[1]:
        return None
    if past is not None and mask.shape[1] == inputs.shape[1]:
        # It may or may not cover what is in the cache.
        return None
    if not torch.compiler.is_compiling() and bool((mask[:, 0] != 0).all()):
        return None
    padding = (mask != 0).int().argmax(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)[:, -inputs.shape[1] :]
