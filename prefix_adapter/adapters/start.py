"""Initialize an adapter from a text or from another adapter, instead of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone.attention import AttentionTarget, PrefixSlot
from ..backbone.calls import forward_pre_hooks
from ..backbone.insert import insert_prefix
from ..backbone.masks import PrefixColumns
from ..backbone.probe import untouched
from ..config import PrefixTuningV2Config
from ..messages import shorten
from ..prefix.batch import AdapterInfo
from ..prefix.encoder import PrefixEncoder
from ..prefix.layer import PrefixTuningV2Layer, find_prefix_layer
from ..prefix.slots import describe_slots
from .base_model import attention_window, warn_of_window
from .saved import AnyPath, open_adapters, read_encoder

# Outputs with the prefix and with the text are compared on at most this number of tokens.
_COMPARED_TOKENS = 4
# The way out for adapters of other methods.
_WORDS = "The virtual tokens of P-Tuning start from words with `PTuningConfig(init_token_ids=...)`."
_FURTHER = (
    "Only a prefix starts as a copy of another one. To train an adapter further, load it with "
    "`PeftModel.from_pretrained(base_model, adapter, is_trainable=True)`."
)


# ---- From a text


def init_from_text(
    model: nn.Module,
    text: str | Sequence[int] | Tensor,
    adapter_name: str = "default",
    tokenizer: Any = None,
    truncate: bool = False,
) -> None:
    """Initialize an adapter with the keys and values that the frozen decoder computes for a text.

    Li and Liang (2021, https://arxiv.org/abs/2101.00190, section 7.5) initialize with activations of real words. In
    eval mode the model then answers an input exactly as the base model answers the text followed by the input; this is
    checked on a few tokens. In training, `prefix_dropout` drops parts of the text. In a decoder it is 0 by default.

    Args:
        model: A `PeftModel`, or a transformers model with the adapter in it.
        text: A text, or its token ids `[n]` or `[1, n]`. A text gets the special tokens that the tokenizer puts in
            front of it (a beginning-of-sequence token), and no end-of-sequence token.
        adapter_name: The adapter. It must be a table with one virtual token for each token of the text. Its
            `num_frozen_tokens` are set too, and stay as they are.
        tokenizer: The base model's tokenizer; needed for a text.
        truncate: Whether the text may be longer than the prefix, which then stands for its first tokens: a decoder
            computes their keys and values without those after them.

    Raises:
        ValueError: If there is no such adapter, or it has an MLP, another number of virtual tokens, selected layers,
            trained low-rank matrices, another `entry_point` than the cache, or unshifted positions on a backbone with
            a table of positions; if the text has no tokens, too many, or tokens that the model does not have; if the
            backbone is no decoder, or its outputs with the prefix differ from those with the text. The adapter is then
            unchanged.

    Example:
        ```python
        text = tokenizer("Translate to French:")["input_ids"]
        model = get_peft_model(base, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=len(text)))
        init_from_text(model, text)
        ```
    """
    layer = find_prefix_layer(model, adapter_name, "Only a prefix starts from a text in this way. " + _WORDS)
    adapter, base = layer.adapters[adapter_name], layer.model
    _check_adapter(layer, adapter_name)
    ids = token_ids(text, tokenizer)
    if truncate:
        ids = ids[: adapter.length]
    if len(ids) != adapter.length:
        longer = len(ids) > adapter.length
        raise ValueError(
            f"The text has {len(ids)} tokens, and adapter {adapter_name!r} has {adapter.length}: make it with "
            f"`num_virtual_tokens={len(ids)}`{longer * ', or take its first tokens alone with `truncate=True`'}."
        )
    compared = _check_text(layer, ids)
    start = _first_position(layer, adapter)
    encoder = layer.encoder_of(adapter_name)
    before = encoder.fold()
    with untouched(base), torch.no_grad():
        try:
            key_values = _compute_key_values(layer, ids, start)
            table = torch.empty_like(before)
            for slot, columns in adapter.columns.items():
                table[:, columns] = key_values[slot].to(table.device, table.dtype)
            encoder.set_table(table)
            _check_exact(layer, adapter_name, ids, ids[-compared:])
        except BaseException:
            encoder.set_table(before)
            raise
    warn_of_window(base, "a text in front")


def token_ids(text: str | Sequence[int] | Tensor, tokenizer: Any = None) -> list[int]:
    """Return the token ids of the `text` of `init_from_text`.

    Raises:
        ValueError: If there are none, or the text needs a tokenizer.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("A text needs the base model's `tokenizer`. Pass it, or pass token ids.")
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


def position_limit(layer: PrefixTuningV2Layer) -> int | None:
    """Return the number of positions of a model; `None` if it has no table of them."""
    return min((position.limit for position in layer.positions if position.limit is not None), default=None)


def has_position_table(layer: PrefixTuningV2Layer) -> bool:
    """Return whether a model has positions, and none of them may be negative."""
    # Computed rotary embeddings work with negative positions, because only differences count. Their frequencies are
    # in buffers of this name in transformers. A table of positions has no negative ones.
    return any(
        not any(name.endswith("inv_freq") for name, _ in position.module.named_buffers())
        for position in layer.positions
    )


def _check_adapter(layer: PrefixTuningV2Layer, adapter_name: str) -> None:
    """Reject models and adapters whose prefix cannot stand for a text."""
    adapter, name = layer.adapters[adapter_name], type(layer.model).__name__
    if layer.entry_point != "cache":
        raise ValueError(
            f"Adapter {adapter_name!r} has `entry_point={layer.entry_point!r}`. The keys and values of a text are "
            "taken from the cache: make the adapter with `entry_point='cache'`, the default."
        )
    if adapter.strength != 1:
        raise ValueError(
            f"Adapter {adapter_name!r} has `strength={adapter.strength:g}`, and a text in front has the strength 1: "
            "call `set_strength` afterwards."
        )
    if getattr(layer.model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder: a prefix in front of its cross-attention is not equal to a text in front "
            "of the input. A decoder can start from a text."
        )
    if not layer.is_decoder:
        raise ValueError(
            f"{name} is no decoder: each token sees the tokens after it, so the keys and values of a text depend on "
            "the input. A decoder can start from a text."
        )
    encoder = layer.encoder_of(adapter_name)
    if encoder.up is not None and encoder.up.weight.any():
        raise ValueError(
            f"Adapter {adapter_name!r} has trained low-rank matrices (`lora_r`), which change the outputs after the "
            "text too. Begin with a new adapter."
        )
    if encoder.output is not None:
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


def _check_text(layer: PrefixTuningV2Layer, ids: list[int]) -> int:
    """Reject a text that the model cannot read, and return the number of tokens to compare outputs on."""
    base: Any = layer.model
    vocab_size = base.get_input_embeddings().weight.shape[0]
    unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise ValueError(f"The text has the token {unknown}, and {type(base).__name__} has {vocab_size} tokens.")
    limit = position_limit(layer)
    if limit is not None and len(ids) >= limit:
        raise ValueError(
            f"The text has {len(ids)} tokens, and {type(base).__name__} has {limit} positions: none would be left for "
            "an input."
        )
    free = [end - len(ids) for end in (limit, attention_window(base)) if end is not None]
    return max(min(_COMPARED_TOKENS, len(ids), *free), 1)


def _first_position(layer: PrefixTuningV2Layer, adapter: AdapterInfo) -> int:
    """Return the position of the text's first token, so that the input follows directly after the text."""
    if adapter.shifts or not layer.positions:
        return 0
    if not has_position_table(layer):
        return -adapter.length
    raise ValueError(
        f"{type(layer.model).__name__} has a table of positions, and a text in front takes the first "
        f"{adapter.length} of them. Make the adapter with `shift_positions=True`, so that the input starts after the "
        "text."
    )


def _compute_key_values(layer: PrefixTuningV2Layer, ids: list[int], start: int) -> dict[PrefixSlot, Tensor]:
    """Compute the keys and values of a text in the base model's attention, as columns `[n, columns]` for each slot."""
    found: dict[PrefixSlot, Tensor] = {}

    def record(target: AttentionTarget) -> Any:
        def no_prefix(keys: Tensor, values: Tensor, layer_idx: int | None) -> None:
            slot = target.get_slot(layer_idx)
            parts = [keys, values] if slot.shape.value_heads else [keys]
            if layer.parallelism is not None and slot.share is not None:
                parts = [layer.parallelism.join_heads(slot.share, part) for part in parts]
            found[slot] = torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            call = target.call(args, kwargs)
            insert_prefix(call, target, layer.model, PrefixColumns(0), no_prefix)
            return call.arguments()

        return hook

    def move(position: Any) -> Any:
        return lambda module, args, kwargs: position.shift([start], None, args, kwargs)

    hooks = [(target.module, record(target)) for target in layer.targets]
    if start:
        hooks += [(position.module, move(position)) for position in layer.positions]
    with forward_pre_hooks(hooks):
        _hidden_states(layer, None, ids)
    return found


def _hidden_states(layer: PrefixTuningV2Layer, adapter_name: str | None, ids: list[int]) -> Tensor:
    """Return the backbone's last hidden states `[1, tokens, size]`, with one adapter or none."""
    base: Any = layer.model
    inputs = torch.tensor([ids], device=base.get_input_embeddings().weight.device)
    # Not PEFT's `set_adapter`, which also changes which parameters are trained.
    with layer.run(layer.new_call([adapter_name or "__base__"])):
        return base.base_model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)[0]


def _check_exact(layer: PrefixTuningV2Layer, adapter_name: str, text: list[int], input_ids: list[int]) -> None:
    """Compare the outputs after the prefix with those after the text.

    Raises:
        ValueError: If they differ.
    """
    expected = _hidden_states(layer, None, text + input_ids)[:, len(text) :]
    gap = (_hidden_states(layer, adapter_name, input_ids) - expected).abs().max().item() / expected.abs().max().item()
    # Quantized layers compute in their own dtype. The bound allows for the rounding of a deep model, and for TF32.
    dtypes = {expected.dtype, *(getattr(module, "compute_dtype", None) for module in layer.model.modules())}
    precision = max(torch.finfo(dtype).eps for dtype in dtypes if isinstance(dtype, torch.dtype))
    if gap <= max(precision**0.5, 5e-3):
        return
    base, why = layer.model, "Its state after a text is more than keys and values."
    window = attention_window(base)
    if window is not None and len(text) + len(input_ids) > window:
        why = f"It has layers that look back {window} tokens: a text leaves that window, a prefix does not."
    elif layer.layers_without_prefix:
        why = f"Its layers {layer.layers_without_prefix} keep no keys and values, so they would not see the text."
    raise ValueError(
        f"{type(base).__name__} cannot start from this text: after these keys and values its outputs differ by "
        f"{gap:.1%} from those after the text. {why}"
    )


# ---- From another adapter


class _StartPrefix(NamedTuple):
    """The prefix that is copied into an adapter, of another adapter in the model or a saved one."""

    length: int
    shifts: bool
    layout: str | None
    entry_point: str
    strength: float
    encoder: PrefixEncoder


def init_from(model: nn.Module, source: AnyPath, adapter_name: str = "default") -> None:
    """Initialize an adapter with the prefix of another one.

    Task heads and other modules in `modules_to_save` stay unchanged.

    Args:
        model: A `PeftModel`, or a transformers model with the adapter in it.
        source: The name of another adapter in the model, or the folder or Hub name of a saved one.
        adapter_name: The adapter to initialize. For an MLP as the source of a table, the MLP's table is copied.

    Raises:
        ValueError: If one of the adapters does not exist or is damaged, or they do not fit: different lengths, layers,
            positions, entry points or MLP widths, or a table as the source of an MLP. The adapter is then unchanged.
        OSError: If the Hub cannot be reached.

    Example:
        ```python
        model = get_peft_model(base, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=20))
        init_from(model, "runs/nli")
        ```
    """
    layer = find_prefix_layer(model, adapter_name, _FURTHER)
    adapter, layout = layer.adapters[adapter_name], describe_slots(layer.adapters[adapter_name].columns)
    start = _from_model(layer, str(source)) if source in layer.adapters else _from_saved(source)
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
            f"{source} was trained with `shift_positions={start.shifts}`, and works with these positions only: make "
            f"adapter {adapter_name!r} with the same setting."
        )
    if start.entry_point != layer.entry_point:
        raise ValueError(
            f"{source} was trained with `entry_point={start.entry_point!r}`, where position biases may differ from "
            f"those at {layer.entry_point!r}: make adapter {adapter_name!r} with the same setting."
        )
    if start.strength != adapter.strength:
        raise ValueError(
            f"{source} has `strength={start.strength:g}`, and adapter {adapter_name!r} {adapter.strength:g}: make it "
            "with the same setting, or call `set_strength`."
        )
    _copy(source, start.encoder, layer.encoder_of(adapter_name), adapter_name)


def _from_model(layer: PrefixTuningV2Layer, source: str) -> _StartPrefix:
    adapter = layer.adapters[source]
    layout, encoder = describe_slots(adapter.columns), layer.encoder_of(source)
    return _StartPrefix(adapter.length, adapter.shifts, layout, layer.entry_point, adapter.strength, encoder)


def _from_saved(source: AnyPath) -> _StartPrefix:
    saved = open_adapters(source, PrefixTuningV2Config, instead=_FURTHER)[0]  # a second adapter does not matter here
    config, (encoder, _) = saved.config, read_encoder(saved)
    return _StartPrefix(
        config.num_virtual_tokens,
        config.shift_positions,
        config.prefix_layout,
        config.entry_point,
        config.strength,
        encoder,
    )


@torch.no_grad()
def _copy(source: AnyPath, start: PrefixEncoder, encoder: PrefixEncoder, adapter_name: str) -> None:
    """Copy the parameters of an encoder; into a table, the table that `start` computes."""
    if encoder.output is None:
        start = start.folded(encoder.num_frozen)
    elif start.output is None:
        raise ValueError(
            f"{source} is a table, and adapter {adapter_name!r} has an MLP, which cannot be set to given keys and "
            "values. Use a table (`prefix_projection=False`), or the source as it was before it was folded."
        )
    shapes, wanted = ([tuple(module.weight.shape) for module in each if module] for each in (start, encoder))
    if shapes != wanted:
        width = "" if start.hidden is None else f"`encoder_hidden_size={start.hidden.out_features}`, "
        rank = 0 if start.down is None else start.down.num_embeddings
        raise ValueError(
            f"{source} has weights of the shapes {shapes}, and adapter {adapter_name!r} of {wanted}: make it with "
            f"{width}`lora_r={rank}`, for the same base model and layers."
        )
    for own, module in zip(encoder, start, strict=True):
        if own is not None and module is not None:
            own.load_state_dict(module.state_dict())
