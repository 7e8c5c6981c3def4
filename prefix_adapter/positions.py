"""Where a backbone turns positions into something: the tables that limit its input, and how to shift them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import CACHE_ARGUMENTS, Call
from .probe import innermost, is_count, parameter_names

_IDS, _TABLE = "position_ids", "input"
# How many tokens came before, for modules that count positions themselves: `cache_length` from transformers 5.24 on.
_PAST = ("cache_length", "past_key_values_length")


@dataclass
class PositionTarget:
    """A module that looks positions up or computes with them.

    Attributes:
        names: the arguments of its `forward`, in order.
        positions: which of them are the positions, if they are given.
        limit: how many positions it has; `None` if it computes them.
        absolute: whether what it gives is as wide as the hidden states, to be added to them.
        kind: the self-attention, `"encoder"` or `"decoder"`, whose input it places.
    """

    name: str
    module: nn.Module
    names: list[str]
    positions: str
    limit: int | None
    absolute: bool = False
    kind: str = ""

    @property
    def padding(self) -> int | None:
        """The position of padding, where padding has no positions of its own (RoBERTa)."""
        padding: Any = getattr(self.module, "padding_idx", None)
        return padding if self.names == [_TABLE] else None

    @property
    def relative(self) -> bool:
        """Whether only differences of positions count, as with rotary embeddings: there is no table, nor sinusoids."""
        return self.limit is None and not self.absolute and self.positions in self.names

    def shift(self, by: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """The call's arguments with positions `by` higher."""
        call = Call(self.names, args, kwargs)
        positions = call.get(self.positions)
        if positions is not None:
            moved = positions + by
            if self.padding is not None:
                moved = torch.where(positions == self.padding, positions, moved)
            call.set(self.positions, moved)
        else:
            for past in _PAST:
                if past in self.names:
                    call.set(past, (call.get(past) or 0) + by)
        return tuple(call.args), call.kwargs

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
        layers = {name.rpartition(".")[0] for name in attention}
        while inner := {name.rpartition(".")[0] for name in layers} - layers:
            layers |= inner
        modules = dict(model.named_modules())
        self._tables: dict[str, PositionTarget] = {}
        # Of those that were called, whether what they gave is as wide as the hidden states.
        self._called: dict[str, bool] = {}
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        self._width = getattr(get_embeddings() if get_embeddings else None, "embedding_dim", None)
        self._named = {
            name: module
            for name, module in modules.items()
            if name not in layers and {_IDS, *_PAST} & set(parameter_names(module))
        }
        self._handles = [
            module.register_forward_pre_hook(self._look_at_table(name))
            for name, module in modules.items()
            if type(module).forward is nn.Embedding.forward
        ] + [module.register_forward_hook(self._note_call(name)) for name, module in self._named.items()]

    def _look_at_table(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # The probe's tokens are all the same, so a table that is asked for consecutive rows is one of positions.
            first = is_count(args[0]) if args else None
            if first is not None and isinstance(module, nn.Embedding):
                limit = module.num_embeddings - first
                self._tables[name] = PositionTarget(name, module, [_TABLE], _TABLE, limit)

        return hook

    def _note_call(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._called[name] = isinstance(output, Tensor) and output.shape[-1] == self._width

        return hook

    def found(self) -> list[PositionTarget]:
        """The targets, once `probe` has run; removes the hooks."""
        for handle in self._handles:
            handle.remove()
        tables = {name: target.module for name, target in self._tables.items()}
        targets = []
        for name, module in innermost({**self._named, **tables}).items():
            if name in tables:
                targets.append(self._tables[name])
            elif name in self._called:
                limit = None
                if isinstance(module, nn.Embedding):
                    offset: Any = getattr(module, "offset", 0)
                    limit = module.num_embeddings - offset
                targets.append(PositionTarget(name, module, parameter_names(module), _IDS, limit, self._called[name]))
        return targets


def positions_behind_padding(targets: list[PositionTarget], call: Call) -> Tensor | None:
    """Positions `[batch, tokens]` that start at each row's first token instead of its padding on the left.

    Only for rotary embeddings, to which that is all the same; not so to a prefix, which stands before the first token.
    transformers' generate passes such positions; where a caller does, or gives no mask, there is nothing to do.
    """
    mask, past = call.get("attention_mask"), call.first(CACHE_ARGUMENTS)
    inputs = call.first(("input_ids", "inputs_embeds"))
    if not targets or not all(target.relative for target in targets) or call.get(_IDS) is not None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or inputs is None or mask.shape[1] < inputs.shape[1]:
        return None
    if past is not None and mask.shape[1] == inputs.shape[1]:
        # It may or may not cover what is in the cache.
        return None
    padding = (mask != 0).int().argmax(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)[:, -inputs.shape[1] :]
