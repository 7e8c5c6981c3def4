"""What an adapter starts from, instead of random numbers: a text that stands in front, or another adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone.attention import AttentionTarget, PrefixSlot
from ..backbone.calls import ModuleCall
from ..backbone.insert import insert_prefix
from ..backbone.probe import untouched
from ..config import PrefixTuningV2Config
from ..files.check import read_weights
from ..files.source import Source
from ..messages import shorten
from ..prefix.batch import AdapterInfo
from ..prefix.encoder import PrefixEncoder
from ..prefix.layer import PrefixTuningV2Layer
from ..prefix.names import PREFIX
from ..prefix.slots import describe_slots
from .exchange import window_of
from .saved import load_config, take_encoder

# How many tokens the outputs are compared on.
_COMPARED = 4


# ---- From a text


def init_from_text(
    model: nn.Module, text: str | Sequence[int] | Tensor, adapter_name: str = "default", tokenizer: Any = None
) -> None:
    """Let an adapter start as the keys and values that the frozen decoder computes for a text.

    Li and Liang (2021, https://arxiv.org/abs/2101.00190, section 7.5) start from activations of real words. In eval
    mode the model then answers an input exactly as it does without an adapter and with the text in front; that is
    tried out on a few tokens. In training `prefix_dropout` acts on it, as on any prefix.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter in it.
        text: a text, or its token ids `[n]` or `[1, n]`. A text is given the special tokens that the tokenizer puts in
            front of it (a beginning-of-sequence token), and no end-of-sequence token.
        adapter_name: the adapter; a table with a virtual token for each token of the text.
        tokenizer: the base model's; needed for a text.

    Raises:
        ValueError: if there is no such adapter, if it has an MLP, another number of virtual tokens, chosen layers, or
            positions that stay where the backbone has a table of them; if the text has no tokens or too many, or
            tokens that the model does not know; if the backbone is no decoder, or does something else with the text
            in front. The adapter is then as it was.
    """
    layer = _layer_of(model, adapter_name)
    adapter, base = layer.adapters[adapter_name], layer.model
    _check_can_be_text(layer, adapter_name)
    ids = token_ids(text, tokenizer)
    if len(ids) != adapter.length:
        raise ValueError(
            f"The text has {len(ids)} tokens, and adapter {adapter_name!r} has {adapter.length}: make it with "
            f"`num_virtual_tokens={len(ids)}`."
        )
    room = _check_fits(layer, ids)
    start = _first_position(layer, adapter)
    table = layer.encoder_of(adapter_name).embedding.weight
    before = table.detach().clone()
    with untouched(base), torch.no_grad():
        try:
            found = _keys_and_values(layer, ids, start)
            for slot, columns in adapter.columns.items():
                table[:, columns] = found[slot].to(table.device, table.dtype)
            _check_exact(layer, adapter_name, ids, ids[-room:])
        except BaseException:
            table.copy_(before)
            raise
    window = window_of(base)
    if window is not None:
        warnings.warn(
            f"{type(base).__name__} has layers that look back {window} tokens. A text falls out of that window, a "
            "prefix does not: outputs are those with the text in front as long as text and input fit into it.",
            stacklevel=2,
        )


def token_ids(text: str | Sequence[int] | Tensor, tokenizer: Any = None) -> list[int]:
    """The tokens of a text, as `init_from_text` takes them.

    Raises:
        ValueError: if there are none, or it takes a tokenizer to tell.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("A text needs the base model's `tokenizer`; or give its token ids.")
        ids = tokenizer(text, verbose=False)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id]:
            ids = ids[:-1]
    else:
        tensor = torch.as_tensor(text)
        if tensor.dim() == 2 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor.dim() != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            raise ValueError(f"Token ids must be integers [n] or [1, n], got {tensor.dtype} {list(tensor.shape)}.")
        ids = tensor.tolist()
    if not ids:
        raise ValueError("The text has no tokens.")
    return ids


def _check_can_be_text(layer: PrefixTuningV2Layer, adapter_name: str) -> None:
    adapter, name = layer.adapters[adapter_name], type(layer.model).__name__
    if getattr(layer.model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder: a prefix in front of its cross-attention stands for no text in front of "
            "the input. A decoder can start from a text."
        )
    if layer.kinds != {"decoder"}:
        raise ValueError(
            f"{name} is no decoder: each token sees those behind it, so what it computes for a text depends on the "
            "input, and no fixed keys and values are the text's. A decoder can start from a text."
        )
    if layer.encoder_of(adapter_name).output is not None:
        raise ValueError(
            f"Adapter {adapter_name!r} has an MLP, which cannot be set to given keys and values. Use a table "
            "(`prefix_projection=False`), or fold it first (`fold_adapter`)."
        )
    lacking = {slot.layer for target in layer.targets for slot in target.slots.values() if slot not in adapter.columns}
    if lacking:
        raise ValueError(
            f"Adapter {adapter_name!r} has no prefix for the layers {sorted(lacking)}, which would not see the text. "
            "Leave `layers_to_transform` out."
        )


def _check_fits(layer: PrefixTuningV2Layer, ids: list[int]) -> int:
    """How many tokens to compare outputs on; refuses what the model cannot read."""
    base: Any = layer.model
    known = base.get_input_embeddings().weight.shape[0]
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise ValueError(f"The text has the token {unknown}, and {type(base).__name__} has {known} tokens.")
    limit = min((p.limit for p in layer.positions if p.limit is not None), default=None)
    if limit is not None and len(ids) >= limit:
        raise ValueError(
            f"The text has {len(ids)} tokens, and {type(base).__name__} has {limit} positions: none would be left for "
            "an input."
        )
    rooms = [end - len(ids) for end in (limit, window_of(base)) if end is not None]
    return max(min(_COMPARED, len(ids), *rooms), 1)


def _first_position(layer: PrefixTuningV2Layer, adapter: AdapterInfo) -> int:
    """Where to place the text, so that an input is right behind it."""
    if adapter.shifts or not layer.positions:
        return 0
    # Rotary embeddings that are computed (transformers keeps their frequencies in buffers of this name) know positions
    # below 0, and differences are all that counts. A table knows none.
    if all(any(name.endswith("inv_freq") for name, _ in p.module.named_buffers()) for p in layer.positions):
        return -adapter.length
    raise ValueError(
        f"{type(layer.model).__name__} is told where its input stands, and a text in front takes the first "
        f"{adapter.length} positions. Make the adapter with `shift_positions=True`, so that the input starts behind."
    )


def _keys_and_values(layer: PrefixTuningV2Layer, ids: list[int], start: int) -> dict[PrefixSlot, Tensor]:
    """What the base model's attention computes for a text, as the columns `[n, columns]` of each slot."""
    found: dict[PrefixSlot, Tensor] = {}

    def record(target: AttentionTarget) -> Any:
        def no_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> None:
            slot = target.get_slot(layer_idx)
            parts = [keys, values] if slot.shape.value_heads else [keys]
            found[slot] = torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            call = ModuleCall(target.names, args, kwargs)
            insert_prefix(call, target, layer.model, 0, None, no_prefix)
            return tuple(call.args), call.kwargs

        return hook

    def move(position: Any) -> Any:
        return lambda module, args, kwargs: position.shift([start], None, args, kwargs)

    hooks = [(target.module, record(target)) for target in layer.targets]
    if start:
        hooks += [(position.module, move(position)) for position in layer.positions]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        _states(layer, None, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _states(layer: PrefixTuningV2Layer, adapter_name: str | None, ids: list[int]) -> Tensor:
    """The backbone's last hidden states `[1, tokens, size]`, with one adapter or none."""
    base: Any = layer.model
    inputs = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    with _only(layer, adapter_name):
        return base.base_model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)[0]


@contextmanager
def _only(layer: PrefixTuningV2Layer, adapter_name: str | None) -> Iterator[None]:
    """Have one adapter act, whichever are active; PEFT's own switches would change what is trained."""
    with layer.call_with([adapter_name or "__base__"]):
        yield


def _check_exact(layer: PrefixTuningV2Layer, adapter_name: str, text: list[int], input_ids: list[int]) -> None:
    """Compare the outputs behind the prefix with those behind the text.

    Raises:
        ValueError: if they differ.
    """
    expected = _states(layer, None, text + input_ids)[:, len(text) :]
    gap = (_states(layer, adapter_name, input_ids) - expected).abs().max().item() / expected.abs().max().item()
    # Wide enough for the sums of a deep model, and for TF32.
    if gap <= max(torch.finfo(expected.dtype).eps ** 0.5, 5e-3):
        return
    base, why = layer.model, "What it knows of a text is not in its keys and values alone."
    window = window_of(base)
    if window is not None and len(text) + len(input_ids) > window:
        why = f"It has layers that look back {window} tokens: a text falls out of that window, a prefix does not."
    elif layer.layers_without_prefix:
        why = f"Its layers {layer.layers_without} keep no keys and values, and so would not know the text."
    raise ValueError(
        f"{type(base).__name__} cannot start from this text: behind these keys and values its outputs differ by "
        f"{gap:.1%} from those behind the text. {why}"
    )


# ---- From another adapter


class _Prefix(NamedTuple):
    """What an adapter is copied from."""

    length: int
    shifts: bool
    layout: str | None
    encoder: PrefixEncoder


def init_from(model: nn.Module, source: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Let an adapter start as another one is.

    The prefix alone is copied: task heads and other modules of `modules_to_save` stay as they are.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter in it.
        source: another adapter of the model by its name, or a saved one: a folder, or a name on the Hub.
        adapter_name: the adapter that is to start. A table can start from an MLP, as the table that that computes.

    Raises:
        ValueError: if there is no such adapter, if the source is none or is damaged, or if it does not fit: another
            length or other layers, other positions, a table for an MLP, or MLPs of different widths. The adapter is
            then as it was.
        OSError: if the Hub cannot be reached.
    """
    layer = _layer_of(model, adapter_name)
    adapter, layout = layer.adapters[adapter_name], describe_slots(layer.adapters[adapter_name].columns)
    start = _of_model(layer, source) if source in layer.adapters else _read(source)
    if start.length != adapter.length:
        raise ValueError(
            f"{source} has {start.length} virtual tokens, and adapter {adapter_name!r} has {adapter.length}: make it "
            f"with `num_virtual_tokens={start.length}`."
        )
    if start.layout not in (None, layout):
        raise ValueError(
            f"{source} was made for {shorten(start.layout)}, and adapter {adapter_name!r} for {layout}: use the same "
            "base model, `layers_to_transform` and `target_attention`."
        )
    if layer.positions and start.shifts != adapter.shifts:
        raise ValueError(
            f"{source} was trained with the positions of `shift_positions={start.shifts}`, and fits no others: make "
            f"adapter {adapter_name!r} with it too."
        )
    _copy(source, start.encoder, layer.encoder_of(adapter_name), adapter_name)


def _of_model(layer: PrefixTuningV2Layer, source: Any) -> _Prefix:
    adapter = layer.adapters[source]
    return _Prefix(adapter.length, adapter.shifts, describe_slots(adapter.columns), layer.encoder_of(source))


def _read(source: str | os.PathLike[str]) -> _Prefix:
    """Read a saved adapter's prefix."""
    config = load_config(source, PrefixTuningV2Config)
    weights = read_weights(Source.of(source).weights())
    parts = {key.partition(PREFIX)[2]: tensor for key, tensor in weights.items() if f".{PREFIX}" in key}
    found = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    # What the config leaves to the model is read off the tensors themselves.
    last = {name: (shape or (0,))[-1] for name, shape in found.items()}
    length, hidden_size = config.num_virtual_tokens, last.get("embedding.weight", 0)
    columns, width = last.get("output.bias", hidden_size), last.get("hidden.bias", 0)
    shapes = PrefixEncoder.shapes(length, columns, hidden_size, width if config.prefix_projection else None)
    if found != shapes:
        raise ValueError(
            f"{source} is damaged: its prefix has the parts {shorten(found)}, which its config is not of."
        )
    encoder = take_encoder(parts, "", config.prefix_projection)
    return _Prefix(length, config.shift_positions, config.prefix_layout, encoder)


@torch.no_grad()
def _copy(source: Any, start: PrefixEncoder, encoder: PrefixEncoder, adapter_name: str) -> None:
    """Copy parameters, folding an MLP for a table."""
    if encoder.output is None:
        table = start.fold()
        if table.shape != encoder.embedding.weight.shape:
            raise ValueError(
                f"{source} has {table.shape[1]} numbers for each virtual token, and adapter {adapter_name!r} has "
                f"{encoder.embedding.weight.shape[1]}: they are of different base models, or layers."
            )
        encoder.embedding.weight.copy_(table)
        return
    if start.output is None:
        raise ValueError(
            f"{source} is a table, and adapter {adapter_name!r} has an MLP, which cannot be set to it. Start a table "
            "(`prefix_projection=False`), or from the adapter as it was trained, before it was folded."
        )
    shapes, wanted = ([tuple(module.weight.shape) for module in each if module] for each in (start, encoder))
    if shapes != wanted:
        raise ValueError(
            f"{source} has an MLP of {shapes}, and adapter {adapter_name!r} of {wanted}: make it with "
            f"`encoder_hidden_size={shapes[1][0]}`, for the same base model."
        )
    for own, module in zip(encoder, start, strict=True):
        if own is not None and module is not None:
            own.load_state_dict(module.state_dict())


def _layer_of(model: nn.Module, adapter_name: str) -> PrefixTuningV2Layer:
    layer = next((module for module in model.modules() if isinstance(module, PrefixTuningV2Layer)), None)
    if layer is None or adapter_name not in layer.adapters:
        known = list(layer.adapters) if layer is not None else []
        raise ValueError(f"There is no prefix adapter {adapter_name!r}; there are {known}.")
    return layer
