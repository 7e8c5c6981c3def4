"""Export an adapter as ready keys and values, for an inference engine that holds a key/value cache.

An engine puts the prefix at the positions 0 to n-1 and the prompt behind it. With `shift_positions` the adapter was
trained that way. Otherwise the prompt was trained to start at position 0, with the prefix in front: rotary embeddings
know differences of positions alone, so the keys of the prefix are turned by n positions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbone.attention import PrefixSlot
from ..backbone.filled_cache import fill_cache, run_decoder
from ..backbone.key_values import KeyValues
from ..backbone.probe import untouched
from ..backbone.rotation import TurnError, find_turns
from ..config import PrefixTuningV2Config
from ..files.whole import new_file
from ..prefix.hooks import get_text_config
from ..prefix.layer import PrefixTuningV2Layer, find_prefix_layer
from .base_model import BaseModelLoader, attention_window
from .saved import AnyPath, open_adapter

FORMAT = "prefix-adapter-kv"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Number of tokens on which outputs are compared. The last one is a step of its own, as in generation.
_COMPARED_TOKENS = 8
# Rotary embeddings whose frequencies depend on the length of the input.
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def export_kv(
    adapter: AnyPath | PeftModel,
    target: str | os.PathLike[str],
    base_model: str | None = None,
    dtype: str | torch.dtype = "float32",
    max_tokens: int | None = None,
    adapter_name: str = "default",
) -> Path:
    """Export an adapter of a decoder as ready keys and values, in one safetensors file for any engine with a cache.

    The engine puts them at the positions 0 to n-1 of a sequence, and the prompt at n. Before the file is written, the
    outputs of the base model behind a plain cache with these keys and values are compared with those of the adapter.

    Args:
        adapter: The adapter's folder, its name on the Hub, or a `PeftModel` with the adapter in it.
        target: The file to write; it must not exist yet.
        base_model: The folder or Hub name of the base model; the one in the adapter's config if `None`. It is
            loaded in float32. Not for a `PeftModel`, which has its base model.
        dtype: The dtype of the file's tensors: `"float32"`, `"float16"` or `"bfloat16"`.
        max_tokens: The largest number of tokens, prompt and answer together, that the file will be used for; `None`
            for the model's whole context. A model with a sliding window needs it: the prefix must stay in the window.
        adapter_name: The adapter of a `PeftModel`.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If keys and values at the positions 0 to n-1 cannot give the adapter's outputs; the message says
            why. These are: a table of positions without `shift_positions`, latent attention (MLA), layers that keep no
            keys and values, selected layers, a window that the prefix would leave, an encoder or encoder-decoder,
            `entry_point="attention"`, `lora_r`, a `strength` other than 1, other trained modules.
        OSError: If the base model cannot be loaded, or `target` cannot be written.

    Example:
        ```python
        export_kv("runs/writer", "writer.safetensors", dtype="bfloat16")
        ```
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name for the file, or remove it.")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {dtype!r}.")
    if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
        raise ValueError(f"`max_tokens` must be a number of at least 1, got {max_tokens!r}.")
    if isinstance(adapter, PeftModel):
        if base_model is not None:
            raise ValueError("`base_model` is for a saved adapter. A `PeftModel` has its base model.")
        model, source = adapter, f"Adapter {adapter_name!r}"
    else:
        model, source = _load(adapter, base_model), str(adapter)
        adapter_name = "default"
    export = _Export(source, find_prefix_layer(model, adapter_name), adapter_name)
    export.check(model)
    limit = export.find_limit(max_tokens)
    with untouched(export.base), torch.no_grad():
        layers = export.compute()
        export.verify(layers, limit)
    tensors = {}
    for index, pair in layers.items():
        for side, tensor in zip(("key", "value"), pair, strict=True):
            tensors[f"layers.{index}.{side}"] = tensor[0].to("cpu", DTYPES[name]).contiguous()
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{source} has numbers that {name} cannot express. Use `dtype='bfloat16'` or 'float32'.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as file:
        save_file(tensors, file, metadata=export.describe(layers, name, limit))
    return target


def _load(adapter: AnyPath, base_model: str | None) -> PeftModel:
    """Load a saved adapter with its base model, in float32.

    Raises:
        ValueError: If it has more than a prefix, or was made for another kind of model.
    """
    saved = open_adapter(adapter, PrefixTuningV2Config)
    config = saved.config
    _, others = saved.read_weights()
    if others:
        raise _unsuitable(
            str(adapter), f"it has other trained weights beside the prefix ({', '.join(sorted(others))})"
        )
    # Without a head the hidden states are compared.
    task = "CAUSAL_LM" if saved.task_type in (None, "CAUSAL_LM") else "FEATURE_EXTRACTION"
    name = base_model or config.base_model_name_or_path or ""
    loader = BaseModelLoader(adapter, task, name, config.revision)
    base_config = loader.load_config()
    if base_config.is_encoder_decoder:
        raise _unsuitable(str(adapter), "its base model is an encoder-decoder")
    base, missing = loader.load(base_config)
    loader.check_complete(missing, {})
    model: PeftModel = PeftModel.from_pretrained(base, str(adapter))
    return model


def _unsuitable(source: str, why: str, way_out: str = "") -> ValueError:
    return ValueError(f"{source} cannot be exported as keys and values: {why}.{way_out and ' '}{way_out}")


class _Export:
    """The export of one adapter.

    Args:
        source: The adapter, for messages.
        layer: The layer with the prefixes of its model.
        name: Its name in the model.
    """

    def __init__(self, source: str, layer: PrefixTuningV2Layer, name: str):
        self.layer, self.name = layer, name
        self.info = layer.adapters[name]
        self.base: Any = layer.model
        self.config = get_text_config(self.base)
        self.adapter_config: PrefixTuningV2Config = layer.configs[name]
        self._refuse = partial(_unsuitable, source)

    def check(self, model: nn.Module) -> None:
        """Reject adapters and models for which keys and values in a cache are not all.

        Raises:
            ValueError: If something else is needed.
        """
        layer, base = self.layer, type(self.base).__name__
        if layer.entry_point != "cache":
            raise self._refuse(f"with `entry_point={layer.entry_point!r}` there is no cache")
        if getattr(self.base.config, "is_encoder_decoder", False) or not layer.is_decoder:
            raise self._refuse(f"{base} is no decoder, and an engine's cache belongs to a decoder")
        if self.info.linears:
            raise self._refuse(
                f"with `lora_r={self.adapter_config.lora_r}` it changes the attention of all tokens",
                "Train with `lora_r=0`.",
            )
        trained = self.adapter_config.modules_to_save
        if trained:
            raise self._refuse(f"it has trained modules besides the prefix ({', '.join(trained)})")
        if self.info.strength != 1:
            raise self._refuse(
                f"its `strength` of {self.info.strength:g} adds a number to the scores of the prefix, which no key "
                "does for all queries",
                "Call `set_strength(model, 1)` first, if its outputs at the strength 1 are wanted.",
            )
        for name, module in model.named_modules():
            active = isinstance(module, BaseTunerLayer) and module is not layer and not module.disable_adapters
            if active and module.active_adapters:
                raise self._refuse(f"{name} has an adapter of another method", "Merge that adapter first.")
        self._check_layers()
        if not self.info.shifts:
            tables = [each.name for each in layer.positions if not each.relative]
            if tables:
                raise self._refuse(
                    f"{base} looks up positions ({', '.join(tables)}), and the adapter was trained with a prompt at "
                    "position 0, where an engine puts the prefix",
                    "Train with `shift_positions=True`.",
                )

    def _check_layers(self) -> None:
        lacking = self.layer.layers_without_prefix
        if lacking:
            raise self._refuse(
                f"layers {lacking} keep no keys and values of their own (state-space, convolution, linear or shared "
                "attention), and what they keep of a prompt behind a prefix is not known"
            )
        every = {slot.layer for target in self.layer.targets for slot in target.slots.values()}
        empty = sorted(every - {slot.layer for slot in self.info.columns})
        if empty:
            raise self._refuse(
                f"it has no prefix in front of layers {empty}, and an engine's cache has as many tokens in all layers",
                "Train without `layers_to_transform`.",
            )
        latent = getattr(self.config, "kv_lora_rank", None) is not None
        if latent or any(not slot.shape.value_heads for slot in self.info.columns):
            raise self._refuse(
                "in latent attention (MLA) an engine keeps one latent vector for the keys and values of all heads, "
                "and a prefix has its own for each head"
            )

    def find_limit(self, max_tokens: int | None) -> int | None:
        """The number of tokens up to which the file is exact; `None` without a limit.

        Args:
            max_tokens: The number of tokens that it will be used for; `None` for the whole context.

        Raises:
            ValueError: If it would not be exact for as many.
        """
        n, limits = self.info.length, {}
        window = attention_window(self.base)
        kinds = set(getattr(self.config, "layer_types", None) or ["unknown"])
        if window is not None and kinds != {"full_attention"}:
            limits[f"some layers look back {window} tokens, and an engine's prefix leaves that window"] = window
        rotary = _find_rotary_limit(self.base, self.config)
        if rotary is not None and not self.info.shifts:
            why = f"rotary embeddings change for inputs of more than {rotary} tokens, and the keys are turned by one"
            limits[why] = rotary
        if not limits:
            return None
        why = min(limits, key=lambda each: limits[each])
        left, context = limits[why] - n, getattr(self.config, "max_position_embeddings", None)
        if left < 1:
            raise self._refuse(f"{why}: a prefix of {n} leaves no place for a prompt")
        if max_tokens is None and context is not None and limits[why] >= context:
            return left
        if max_tokens is None or max_tokens > left:
            wanted = "the model's whole context" if max_tokens is None else f"{max_tokens} tokens"
            raise self._refuse(
                f"{why}, so it is exact for at most {left} tokens of prompt and answer, not for {wanted}",
                f"Give `max_tokens={left}` (`--max_tokens {left}`) or less, and keep to it.",
            )
        return left

    def compute(self) -> dict[int, KeyValues]:
        """Keys and values `[1, heads, n, size]` by layer, as they stand in an engine's cache.

        Raises:
            ValueError: If positions change keys in another way than by a turn.
        """
        turns: dict[PrefixSlot, Tensor | None] = {}
        if not self.info.shifts:
            try:
                with self._with_adapter(False):
                    turns = find_turns(self.base, self.layer.targets, self.info.length)
            except TurnError as error:
                raise self._refuse(str(error).removesuffix(".")) from error
        table = self.layer.encoder_of(self.name).fold()
        layers = {}
        for slot, columns in self.info.columns.items():
            keys, values = slot.shape.split(table[None, :, columns])
            turn = turns.get(slot)
            if turn is not None:
                keys = (keys.double() @ turn.T.to(keys.device)).to(keys.dtype)
            layers[slot.layer] = keys, values
        return dict(sorted(layers.items()))

    def verify(self, layers: dict[int, KeyValues], limit: int | None) -> None:
        """Compare the outputs of the base model behind a filled cache with those of the adapter.

        Raises:
            ValueError: If they differ.
        """
        tokens = min(_COMPARED_TOKENS, limit or _COMPARED_TOKENS)
        words = self.base.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(words), (1, tokens), generator=generator, device="cpu").to(words.device)
        with self._with_adapter(True):
            expected = run_decoder(self.base, ids)
        with self._with_adapter(False):
            empty = fill_cache({})
            without = run_decoder(self.base, ids, empty)
            stored: list[Any] = empty.layers
            cast = {
                index: (keys.to(stored[index].keys), values.to(stored[index].values))
                for index, (keys, values) in layers.items()
            }
            cache = fill_cache(cast, self.config)
            outputs = [run_decoder(self.base, part, cache) for part in (ids[:, :-1], ids[:, -1:]) if part.numel()]
        gap = (torch.cat(outputs, 1) - expected).abs().max().item()
        effect = (expected - without).abs().max().item()
        # Rounding has the size of the outputs, an error in a turn that of the prefix's effect on them.
        precision = torch.finfo(expected.dtype).eps
        bound = max(precision**0.5 * effect, 100 * precision * expected.abs().max().item())
        if not gap <= bound:
            raise self._refuse(
                f"on {type(self.base).__name__}, with these keys and values in a plain cache, outputs differ by "
                f"{gap:.1e} from those of the adapter, which itself moves them by {effect:.1e}"
            )

    @contextmanager
    def _with_adapter(self, active: bool) -> Iterator[None]:
        """Inside this context the base model runs with the adapter alone, or with none."""
        with self.layer.run(self.layer.new_call([self.name if active else "__base__"])):
            yield

    def describe(self, layers: dict[int, KeyValues], dtype: str, limit: int | None) -> dict[str, str]:
        """The metadata of the file: each value is JSON, or plain text."""
        shapes: dict[str, Callable[[KeyValues], int]] = {
            "kv_heads": lambda pair: pair[0].shape[1],
            "key_size": lambda pair: pair[0].shape[3],
            "value_size": lambda pair: pair[1].shape[3],
        }
        sizes = {name: json.dumps([get(pair) for pair in layers.values()]) for name, get in shapes.items()}
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "num_virtual_tokens": str(self.info.length),
            "num_layers": str(len(layers)),
            **sizes,
            "dtype": dtype,
            "first_position": "0",
            "prompt_position": str(self.info.length),
            "max_tokens": "null" if limit is None else str(limit),
            "model_type": str(getattr(self.config, "model_type", "")),
            "base_model": str(self.adapter_config.base_model_name_or_path or ""),
            "adapter_sha256": _hash(self.layer.encoder_of(self.name).tensors()),
        }


def _hash(parameters: list[Tensor]) -> str:
    """The SHA-256 of an adapter's parameters, in their order: dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for parameter in parameters:
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _find_rotary_limit(base: nn.Module, config: Any) -> int | None:
    """The number of tokens from which on the frequencies of rotary embeddings change; `None` if they never do."""
    settings = getattr(config, "rope_parameters", None) or {}
    # One dictionary, or one for each type of layer.
    each = [settings] if "rope_type" in settings else [part for part in settings.values() if isinstance(part, dict)]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in each
        if part.get("rope_type") in _LENGTH_DEPENDENT_ROTARY
    ]
    return min(limits, default=None)
