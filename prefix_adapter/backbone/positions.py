"""Modules that look up or compute positions: how many positions they have, and how to shift them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calls import CACHE_ARGUMENTS, POSITIONS_ARGUMENT, ModuleCall, parameter_names
from .dummy_inputs import get_backbone, get_input_embeddings
from .probe import get_first_position, innermost

# The name of the argument of `nn.Embedding.forward`.
_TABLE_ARGUMENT = "input"
# The number of earlier tokens, in modules that count positions themselves: `cache_length` from transformers 5.24 on.
_PAST_ARGUMENTS = ("cache_length", "past_key_values_length")


@dataclass
class PositionTarget:
    """A module that looks up positions in a table, or computes something from them.

    Attributes:
        name: The module's name in the model.
        module: The module.
        names: The arguments of its `forward`, in order.
        argument: The argument that takes the positions.
        limit: How many positions its table has; `None` if it has no table.
        absolute: Whether its output is as wide as the hidden states and is added to them.
        kind: The self-attention whose input it places: `"encoder"` or `"decoder"`.
        column: Whether its positions are `[tokens, 1]`, the same for all rows (Pegasus-X).
        axes: Whether its positions are `[axes, batch, tokens]`, for the time, height and width of images (Qwen2-VL).
            The backbone computes those as long as the caller passes no positions.
        tokens: How many positions the probe looked up or passed; `None` if it passed none.
        counts: Whether the positions of a text are 0, 1, 2, ... if the caller passes none.
        movable: Whether its arguments say where positions start: the positions, or the number of earlier tokens.
    """

    name: str
    module: nn.Module
    names: list[str]
    argument: str
    limit: int | None
    absolute: bool = False
    kind: str = ""
    column: bool = False
    axes: bool = False
    tokens: int | None = None
    counts: bool = True
    movable: bool = True

    @property
    def padding_idx(self) -> int | None:
        """The position of padding tokens, if they all have the same one (RoBERTa)."""
        padding_idx: Any = getattr(self.module, "padding_idx", None)
        return padding_idx if self.names == [_TABLE_ARGUMENT] else None

    @property
    def past_argument(self) -> str | None:
        """The argument with the number of earlier tokens, from which the module counts if it receives no positions."""
        return next((name for name in _PAST_ARGUMENTS if name in self.names), None)

    @property
    def relative(self) -> bool:
        """Whether only differences of positions matter, as with rotary embeddings."""
        return self.limit is None and not self.absolute and self.argument in self.names

    def shift(
        self, shifts: list[int], batch: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with higher positions.

        Args:
            shifts: The shift of each row, or one for all rows. All must be equal if `has_shared_positions(...)`.
            batch: The number of rows; `None` if it is not known.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
        """
        call = ModuleCall(self.names, args, kwargs)
        positions = call.get(self.argument)
        if positions is not None:
            by: Any = shifts[0]
            if len(set(shifts)) > 1:
                rows = max(positions.shape[-2], batch or len(shifts))
                positions = positions.expand(*positions.shape[:-2], rows, positions.shape[-1])
                by = positions.new_tensor(shifts).repeat_interleave(rows // len(shifts)).unsqueeze(-1)
            moved = positions + by
            if self.padding_idx is not None:
                moved = torch.where(positions == self.padding_idx, positions, moved)
            call.set(self.argument, moved)
        elif self.past_argument is not None:
            call.set(self.past_argument, (call.get(self.past_argument) or 0) + shifts[0])
        return call.arguments()

    def has_shared_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has the same positions for all rows: `[tokens]`, or a number to count from."""
        positions = ModuleCall(self.names, args, kwargs).get(self.argument)
        if isinstance(positions, Tensor):
            return positions.dim() < 2 or self.column
        return self.past_argument is not None

    def count_if_too_long(self, args: tuple[Any, ...], kwargs: dict[str, Any], shift: int) -> int:
        """The number of tokens in a call if the table has too few positions for them and the shift, else 0."""
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self.limit is None or given is None:
            return 0
        tokens = given.shape[1] if given.dim() > 1 else len(given)
        if tokens + shift > self.limit and self.padding_idx is not None:
            tokens = int((given != self.padding_idx).sum(-1).max())
        elif tokens + shift > self.limit and isinstance(self.module, nn.Embedding) and self.names == [_TABLE_ARGUMENT]:
            # A row may hold several sequences, each with positions from the first one on.
            tokens = int(given.max()) + 1 - (self.module.num_embeddings - self.limit)
        return tokens if tokens + shift > self.limit else 0


class PositionProbe:
    """Finds the position modules of a model while the probe runs.

    Args:
        model: The model.
        attention: The names of its attention modules. A module around one of them is a layer, which only passes
            positions on.
    """

    def __init__(self, model: nn.Module, attention: Iterable[str]):
        self._attention = set(attention)
        layers = {name.rpartition(".")[0] for name in self._attention}
        while outer := {name.rpartition(".")[0] for name in layers} - layers:
            layers |= outer
        modules = dict(model.named_modules())
        # Tables that were asked for consecutive rows.
        self._tables: dict[str, PositionTarget] = {}
        # Modules with an argument for positions, and those of them that were called.
        self._named = {
            name: module
            for name, module in modules.items()
            if name not in layers and {POSITIONS_ARGUMENT, *_PAST_ARGUMENTS} & set(parameter_names(module))
        }
        self._called: dict[str, PositionTarget] = {}
        self._width = getattr(get_input_embeddings(model), "embedding_dim", None)
        self._modules = modules
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Add the hooks to the model."""
        for name, module in self._modules.items():
            if type(module).forward is nn.Embedding.forward:
                self._handles.append(module.register_forward_pre_hook(self._record_table(name)))
        for name, module in self._named.items():
            self._handles.append(module.register_forward_hook(self._record_call(name), with_kwargs=True))

    def remove_hooks(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget all calls."""
        self._tables, self._called = {}, {}

    def _record_table(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # All tokens of the probe are equal, so consecutive numbers can only be positions.
            first = get_first_position(args[0]) if args else None
            if first is not None and isinstance(module, nn.Embedding):
                limit = module.num_embeddings - first
                table = PositionTarget(name, module, [_TABLE_ARGUMENT], _TABLE_ARGUMENT, limit)
                table.tokens = args[0].numel()
                self._tables[name] = table

        return hook

    def _record_call(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            limit = module.num_embeddings - getattr(module, "offset", 0) if isinstance(module, nn.Embedding) else None
            target = PositionTarget(name, module, parameter_names(module), POSITIONS_ARGUMENT, limit)
            target.absolute = isinstance(output, Tensor) and output.shape[-1] == self._width
            positions = ModuleCall(target.names, args, kwargs).get(POSITIONS_ARGUMENT)
            if isinstance(positions, Tensor):
                target.column = positions.dim() == 2 and positions.shape[1] == 1
                target.axes = positions.dim() > 2
                target.tokens = positions.shape[0 if target.column else -1]
                rows = positions.reshape(-1, target.tokens)
                target.counts = positions.device.type == "meta" or all(get_first_position(row) == 0 for row in rows)
            else:
                target.movable = target.past_argument is not None
            self._called[name] = target

        return hook

    def get_found(self) -> list[PositionTarget]:
        """The position modules that the probe has called."""
        tables = {name: target.module for name, target in self._tables.items()}
        # An attention module without positions receives them in another form, such as rotary embeddings.
        called = {n: t for n, t in self._called.items() if t.movable or n not in self._attention}
        known = {**called, **self._tables}
        return [known[name] for name in innermost({**self._named, **tables}) if name in known]


def find_counting_module(model: nn.Module, targets: list[PositionTarget]) -> nn.Module | None:
    """The module that counts the positions of a text if the caller passes none; `None` if no module takes positions.

    It is the backbone, unless positions have several axes. Then the backbone itself computes the positions of images
    as long as the caller passes none, and the text model inside counts where the backbone computes none.
    """
    backbone = get_backbone(model)
    wanted = {POSITIONS_ARGUMENT, "attention_mask", "inputs_embeds"}
    named = {name: module for name, module in backbone.named_modules() if wanted <= set(parameter_names(module))}
    if not named or not any(target.axes for target in targets):
        return backbone if POSITIONS_ARGUMENT in parameter_names(backbone) else None
    axes = {id(target.module) for target in targets if target.axes}
    inner = [m for m in innermost(named).values() if any(id(part) in axes for part in m.modules())]
    return inner[0] if len(inner) == 1 else None


def count_behind_padding(targets: list[PositionTarget], call: ModuleCall) -> Tensor | None:
    """Positions `[batch, tokens]` that start at the first token of each row, and not at its padding on the left.

    Rotary embeddings do not depend on where a row starts, but the prefix must stand right before the first token.
    (transformers' `generate` passes such positions itself.)

    Returns:
        The positions; `None` if no row is padded on the left, if the caller passes positions, or if positions are
        looked up in a table.
    """
    mask, past = call.get("attention_mask"), call.get_first(CACHE_ARGUMENTS)
    inputs = call.get_first(("input_ids", "inputs_embeds"))
    counts = targets and all(target.relative and target.counts for target in targets)
    if not counts or call.get(POSITIONS_ARGUMENT) is not None or inputs is None:
        return None
    compiling, tokens = torch.compiler.is_compiling(), inputs.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= tokens:
        if past is not None and mask.shape[1] == tokens and (compiling or past.get_seq_length()):
            # The mask may or may not cover the tokens in the cache.
            return None
        shown, start = mask != 0, mask.shape[1] - tokens
    elif getattr(past, "is_compileable", False):
        # `generate` makes the masks `[batch, 1, tokens, keys]` for a static cache before it calls the model.
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return None
        last = mask[:, 0, -1]
        shown, start = last if last.dtype == torch.bool else last == 0, past.get_seq_length()
    else:
        return None
    if not compiling and bool(shown[:, 0].all()):
        return None
    padding = shown.int().argmax(-1, keepdim=True)
    return (torch.arange(tokens, device=shown.device) + start - padding).clamp(min=0)


def check_fits_table(model: nn.Module, tokens: int, limit: int | None, shift: int) -> None:
    """Reject an input that is longer than a table of positions, before it ends in an index error.

    Raises:
        ValueError: If it is longer.
    """
    if limit is not None and tokens + shift > limit:
        moved = f" and `shift_positions` takes {shift} of them" if shift else ""
        raise ValueError(
            f"The input has {tokens} tokens, but {type(model).__name__} has {limit} positions{moved}. Truncate the "
            f"input to {limit - shift} tokens."
        )


def check_input_length(
    model: nn.Module,
    ids: Tensor | None,
    tokens: int,
    positions: list[PositionTarget],
    shift: int,
    given: Tensor | None = None,
) -> None:
    """`check_fits_table` for the input of a model with one stack. (An encoder-decoder has several inputs.)

    Args:
        model: The model.
        ids: Its token ids; `None` if it receives embeddings.
        tokens: Their number in each row.
        positions: Its position modules.
        shift: The number of positions that the input is shifted by.
        given: The positions that the caller passes. A row may hold several sequences, each with its own.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    for table in positions:
        if table.limit is None:
            continue
        needed = tokens
        if tokens + shift > table.limit and table.padding_idx is not None and ids is not None:
            needed = int((ids != table.padding_idx).sum(-1).max())
        elif tokens + shift > table.limit and given is not None:
            needed = int(given.max()) + 1
        check_fits_table(model, needed, table.limit, shift)
