# Copyright 2026 The prefix-adapter contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Build tiny random models of every text model type of the installed transformers.

The types come from the auto mappings of transformers. Rules on the names of configuration fields make the models
small, so that new releases of transformers need no edit. `OVERRIDES` has configuration values that no rule can find,
`EXCLUDED` the types that are not run, each with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging


class NotBuilt(Exception):
    """Raised if a tiny model of a type cannot be built here; the message is the reason."""


TASKS: dict[str, dict[str, str]] = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "MULTIPLE_CHOICE": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "MASKED_LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Short task name -> transformers' auto mapping (model type -> name of the model class)."""

VOCAB = 99
HIDDEN = 32
HEADS = 4
KV_HEADS = 2
LAYERS = 2
INTERMEDIATE = 64
POSITIONS = 128
WINDOW = 8
NUM_LABELS = 3

EXCLUDED: dict[str, str] = {
    "bros": "needs the bounding boxes of the words (bbox) as well as token ids",
    "gemma4_assistant": "a drafter: reads the keys and values of another model, and takes no token ids",
    "gemma4_unified_assistant": "a drafter: reads the keys and values of another model, and takes no token ids",
    "lxmert": "needs visual features as well as token ids",
    "musicgen": "its tokens are audio codes, several codebooks in one batch",
    "musicgen_melody": "its tokens are audio codes, several codebooks in one batch",
    "voxtral_realtime": "needs audio features as well as token ids",
}
"""Model types of the mappings that do not run on token ids alone, with the reason."""

OVERRIDES: dict[str, dict[str, Any]] = {
    # Layer kinds that the type supports and its default configuration does not use.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 8],
        "sliding_window": WINDOW,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
    # Layers that share their weights need two of them.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # Compressed cache entries must occur within a short sequence.
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    # Sizes that depend on each other by a formula of the type.
    "dots3_note_text": {"head_dim": 24},
    "esmc": {"num_key_value_heads": HEADS},
    "funnel": {"block_sizes": [1, 1, 1]},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "neomme": {"head_dim": 16},
    "reformer": {"axial_pos_embds": False},  # axial positions need training sequences of full length
    "markuplm": {"max_depth": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 1, "depths": [1] * 7},  # doubles at each of its stages
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # widths are rounded up to multiples of 64
    # No usable default.
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
}
"""Model type -> configuration values that no rule on names can find. They also apply where the type is part of another
type's configuration. Nested dicts apply to nested configurations."""

# The first rule whose pattern matches the whole name of a field gives its small value. Only larger ints are replaced,
# so that a rule never makes a model larger than its default.
_SIZE_RULES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), value)
    for pattern, value in (
        # counts
        (r"(num_hidden|encoder|decoder|num_encoder|num_decoder|num|n|\w+_encoder|\w+_decoder)_layers?", LAYERS),
        (r"[lxr]_layers|num_(global|lstm)_layers|num_layers_per_stack", LAYERS),
        (r"depth|num_blocks|num_self_attends_per_block", LAYERS),
        (r"\w*(num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups)", KV_HEADS),
        (r"\w*(num_(\w+_)?heads|attention_heads|n_heads?|num_heads_\w+)", HEADS),
        (r"\w*experts_per_tok(en)?|(moe|expert)\w*_top_?k|top_?k_experts|moe_k|num_expert_group|cross_attn_k", 2),
        (r"topk_group|n_groups?|\w*_n_?groups", 2),
        (r"(num|n|moe_num)_shared_experts", 1),
        (r"\w*(num_\w*experts|n_routed_experts|expert_num)", 4),
        (r"first_k_dense_replace|num_dense_layers", 1),
        (r"\w*(_period|_interval|_sparse_step|_every_n_layers|_layer_step)", 2),
        (r"\w*_layer_offset", 1),
        # lengths
        (r"\w*((sliding|attention)_window(_size)?|local_attention(_window_len)?|attention_chunk_size)", WINDOW),
        (r"window_size|local_radius|index_topk|\w*attn_chunk_length", WINDOW),
        (r"(mamba_)?chunk_size|\w*block_size", WINDOW),
        (r"\w*(position_embeddings|positions|max_seq_len|model_max_length|context_length|n_ctx)", POSITIONS),
        (r"\w*vocab_size\w*|\w*_vocab|\w*num_hash_buckets", VOCAB),
        # widths
        (r"qk_rope_head_dim|index_head_dim", 8),
        (r"\w*(head_dim|d_head|dim_head|headdim|d_kv|kv_channels|head_size)", HIDDEN // HEADS),
        (r"rotary_dim", HIDDEN // HEADS // 2),
        (r"\w*(_rank|_lowrank|state_size|d_state)", 8),
        (r"\w*(moe|expert|experts)\w*_(intermediate|hidden|ffn_hidden)_size", INTERMEDIATE // 2),
        (r"\w*(intermediate_size\w*|feed_forward_size|ffn_hidden_size|ffn_dim)", INTERMEDIATE),
        (r"d_ff|dim_ff|dff|n_inner|d_inner|hidden_dim|mlp_dim", INTERMEDIATE),
        (r"\w*(hidden_size\w*|bottleneck_size|embedding_size|d_model|n_embd|emb\w*_dim|proj_dim|embed_dim)", HIDDEN),
        (r"dim|d_latents|lru_width", HIDDEN),
        (r"\w*(hidden_dimension|_dim|_width|_channels|_size_global|emb_size|cross_output_size|_filters)", HIDDEN),
    )
)

# Fields that the model needs and that a default configuration may leave unset.
_UNSET = re.compile(r"vocab_size|head_dim|\w*key_value_heads|\w*experts_per_tok(en)?|n_routed_experts|num_experts")
_TOKEN_ID = re.compile(r"(\w*_)?token_(id|ids|index)|(pad|bos|eos|unk|mask|image|audio|\w+_pad)_(id|idx|index)")
_LAYER_INDEX_LIST = re.compile(r"\w*(layers|layer_ids|layer_indices|idxs|indices|indexes)")
_PATTERN_LIST = re.compile(r"\w*(types|pattern|layers)")
_DROPOUT = re.compile(r"\w*(drop|jitter_noise)\w*")
_BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}


@functools.cache
def _model_class(model_type: str, task: str) -> type[PreTrainedModel]:
    """Return the model class of this type for this task."""
    if model_type not in TASKS[task]:
        raise NotBuilt(f"{model_type} has no model for {task}")
    name = TASKS[task][model_type]
    names = (name,) if isinstance(name, str) else tuple(name)
    try:
        return getattr(transformers, names[0])
    except (AttributeError, ImportError, RuntimeError) as error:
        raise NotBuilt(f"{names[0]} cannot be imported: {error}") from error


def _takes_text(model_class: type[PreTrainedModel]) -> bool:
    """Return whether the model's main input is a sequence of token ids."""
    if getattr(model_class, "main_input_name", "input_ids") != "input_ids":
        return False
    return "input_ids" in inspect.signature(model_class.forward).parameters


@functools.cache
def _tasks_of(model_type: str) -> tuple[str, ...]:
    found = []
    for task, mapping in TASKS.items():
        if model_type not in mapping:
            continue
        try:
            if not _takes_text(_model_class(model_type, task)):
                continue
        except NotBuilt:
            pass  # keep the type: building the model then reports the missing package
        found.append(task)
    return tuple(found)


def tasks_of(model_type: str) -> list[str]:
    """Return the tasks, in the order of `TASKS`, for which this type has a model with text input."""
    return list(_tasks_of(model_type))


def text_model_types() -> list[str]:
    """Return all model types, sorted, that have a model with text input for at least one task."""
    types = sorted(set().union(*TASKS.values()))
    return [model_type for model_type in types if model_type not in EXCLUDED and tasks_of(model_type)]


def _small_int(name: str, value: int) -> int:
    """Return the small value of an int field, or the value itself if no rule matches."""
    for pattern, small in _SIZE_RULES:
        if pattern.fullmatch(name):
            return min(value, small) if value > 0 else value
    return value


class _Shrinker:
    """Makes a tree of configurations small. Equal ids of special tokens stay equal."""

    def __init__(self) -> None:
        self.token_ids: dict[int, int] = {}

    def token_id(self, value: Any) -> Any:
        """Return an id in the small vocabulary: the same id if it fits, else one from the end of the vocabulary."""
        if isinstance(value, (list, tuple)):
            return [self.token_id(item) for item in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < VOCAB - 40:
            return value
        return self.token_ids.setdefault(value, VOCAB - 1 - len(self.token_ids))

    def shrink(self, default: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the configuration class of `default` that make a small version of it."""
        config_class = type(default)
        declared = {field.name: field for field in dataclasses.fields(config_class)}
        names = {stored: name for name, stored in config_class.attribute_map.items() if name in declared}
        values = {names.get(key, key): value for key, value in vars(default).items() if not key.startswith("_")}
        overrides = {**copy.deepcopy(OVERRIDES.get(config_class.model_type, {})), **overrides}
        overrides = {names.get(key, key): value for key, value in overrides.items()}
        kwargs: dict[str, Any] = {}

        for name, value in values.items():
            if isinstance(value, PreTrainedConfig):
                nested = overrides.pop(name, {})
                kwargs[name] = type(value)(**self.shrink(value, nested if isinstance(nested, dict) else {}))
            elif _TOKEN_ID.fullmatch(name):
                kwargs[name] = self.token_id(value)
            elif name not in declared or name in _BASE_FIELDS or isinstance(value, bool):
                continue
            elif value is None and _UNSET.fullmatch(name):
                kwargs[name] = _small_int(name, 1 << 30)
            elif isinstance(value, int) and (declared[name].default is not None or _UNSET.fullmatch(name)):
                kwargs[name] = _small_int(name, value)

        pad = kwargs.get("pad_token_id", 0)
        if pad is None or (isinstance(pad, int) and pad < 0):
            taken = [kwargs.get("bos_token_id"), kwargs.get("eos_token_id")]
            kwargs["pad_token_id"] = next(i for i in range(3) if i not in taken)
        if isinstance(values.get("image_size"), int) and isinstance(values.get("patch_size"), int):
            kwargs["image_size"] = 4 * values["patch_size"]
        self._head_widths(values, kwargs)
        self._layers(default, values, kwargs, names)
        if isinstance(values.get("rope_parameters"), dict):
            self._rope(values["rope_parameters"], kwargs)
        kwargs.update(overrides)
        return kwargs

    @staticmethod
    def _head_widths(values: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Set head widths that depend on other sizes, or that differ from hidden size / heads in the default."""
        hidden, heads, width = (values.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
        if (
            "head_dim" in kwargs
            and "kv_lora_rank" not in values
            and isinstance(hidden, int)
            and isinstance(heads, int)
            and isinstance(width, int)
            and width * heads != hidden
        ):
            kwargs["head_dim"] = 2 * HIDDEN // HEADS
        if "kv_lora_rank" in values and "num_key_value_heads" in kwargs:
            kwargs["num_key_value_heads"] = HEADS  # latent attention has one key head per query head
        expand = values.get("mamba_expand", values.get("expand"))
        if isinstance(expand, int):  # all state-space heads together have the expanded hidden size
            for name in ("mamba_d_head", "mamba_head_dim", "mamba_headdim", *(() if heads else ("head_dim",))):
                if name in kwargs:
                    kwargs[name] = expand * HIDDEN // HEADS
            if "mamba_d_ssm" in values:
                kwargs["mamba_d_ssm"] = expand * HIDDEN

    @staticmethod
    def _rope(parameters: dict, kwargs: dict) -> None:
        """Make the sections of multi-modal rotary embeddings sum to the rotary width."""
        parameters = copy.deepcopy(parameters)
        for part in [parameters, *[p for p in parameters.values() if isinstance(p, dict)]]:
            section = part.get("mrope_section")
            if section:
                width = int(kwargs.get("head_dim", HIDDEN // HEADS) * part.get("partial_rotary_factor", 1.0)) // 2
                small = [width // len(section)] * len(section)
                small[0] += width - sum(small)
                part["mrope_section"] = small
                kwargs["rope_parameters"] = parameters

    def _layers(self, default: PreTrainedConfig, values: dict, kwargs: dict, names: dict[str, str]) -> None:
        """Keep the fewest layers that include every kind of layer, and cut the per-layer lists accordingly."""
        stored = type(default).attribute_map.get("num_hidden_layers", "num_hidden_layers")
        count_name = names.get(stored, stored)
        count = values.get(count_name)
        if not isinstance(count, int) or count < 2:
            return
        declared = {field.name for field in dataclasses.fields(type(default))}
        per_layer: dict[str, list] = {}
        index_lists: dict[str, set[int]] = {}
        for name, value in values.items():
            if not isinstance(value, (list, tuple)) or name in _BASE_FIELDS:
                continue
            ints = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
            rising = ints and list(value) == sorted(set(value)) and all(0 <= item < count for item in value)
            if rising and _LAYER_INDEX_LIST.fullmatch(name):
                if name in declared:  # otherwise the list is derived from another one
                    index_lists[name] = set(value)
            elif len(value) == count:
                per_layer[name] = list(value)
            elif _PATTERN_LIST.fullmatch(name) and 2 <= len(value) <= 8 and all(isinstance(i, str) for i in value):
                kwargs[count_name] = len(value)  # the layers repeat this pattern
        overrides = getattr(default, "_heterogeneity_spec", None)
        overrides = getattr(overrides, "per_layer_overrides", None) or {}

        shared = values.get("num_kv_shared_layers")
        shared = shared if isinstance(shared, int) else 0
        kinds = []
        for index in range(count):
            kind: set[Any] = {(name, repr(value[index])) for name, value in per_layer.items()}
            kind |= {(name, index in members) for name, members in index_lists.items()}
            kind |= {("override", name, repr(value)) for name, value in overrides.get(index, {}).items()}
            if shared:
                is_shared = index >= count - shared
                kind = {(is_shared, *item) for item in kind} | {("shared", is_shared)}
            kinds.append(kind)
        keep: list[int] = []
        seen: set[Any] = set()
        for index, kind in enumerate(kinds):
            if not kind <= seen:
                keep.append(index)
                seen |= kind
        if shared:
            kwargs["num_kv_shared_layers"] = sum(index >= count - shared for index in keep)
        elif "num_kv_shared_layers" in values:  # the type supports sharing, and its default does not use it
            keep = keep or [0]
            kwargs["num_kv_shared_layers"] = len(keep)
            keep = keep + keep
        if not (per_layer or index_lists or overrides or "num_kv_shared_layers" in values):
            return
        others = [index for index in range(count) if index not in keep]
        if len(keep) < LAYERS:
            keep = sorted(keep + others[: LAYERS - len(keep)])

        kwargs[count_name] = len(keep)
        for name, value in per_layer.items():
            kwargs[name] = [_small_int(name, value[i]) if type(value[i]) is int else value[i] for i in keep]
        for name, members in index_lists.items():
            kwargs[name] = [new for new, index in enumerate(keep) if index in members]
        if overrides:
            kwargs["per_layer_config"] = {
                new: {
                    name: self._scaled(name, value, values.get(name), kwargs)
                    for name, value in overrides.get(index, {}).items()
                }
                for new, index in enumerate(keep)
                if overrides.get(index)
            }

    @staticmethod
    def _scaled(name: str, value: Any, default: Any, kwargs: dict) -> Any:
        """Return a layer's own value of a size: twice the small default if it is above the default, half if below."""
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        small = kwargs.get(name, _small_int(name, value))
        if not isinstance(default, int) or not default or default == value:
            return small
        return max(1, small * 2 if value > default else small // 2)


def _set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Set every dropout probability in a tree of configurations."""
    for part in _tree(config):
        for name, value in list(vars(part).items()):
            if _DROPOUT.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
                try:
                    setattr(part, name, dropout)
                except StrictDataclassFieldValidationError:  # some are declared as ints
                    setattr(part, name, int(dropout))
        part.classifier_dropout = dropout  # some types do not declare it although their heads read it


def tiny_config(model_type: str, task: str, dropout: float | None = None) -> PreTrainedConfig:
    """Return a small configuration of this type; `dropout` sets all its dropout probabilities."""
    model_class = _model_class(model_type, task)
    config_class = CONFIG_MAPPING[model_type]
    own_class = model_class.config_class
    if own_class is not None and own_class in config_class.sub_configs.values():
        # The mapping names the text model of a multi-modal type, which takes the configuration of the text part.
        config_class = own_class
    kwargs = _Shrinker().shrink(config_class(), {})
    kwargs["num_labels"] = 2 if task == "QUESTION_ANS" else NUM_LABELS  # the start and the end of a span
    config = config_class(**kwargs)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    if task == "CAUSAL_LM" and not config.is_encoder_decoder and getattr(config, "is_decoder", True) is False:
        config.is_decoder = True  # encoders are causal only with this setting
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    if dropout is not None:
        _set_dropout(config, dropout)
    return config


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _tree(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log messages and warnings of transformers."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fix the random state, and fill uninitialised memory with NaN to detect parameters without a value."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    """Draw new values for parameters whose initial values are too small or too uniform to affect the outputs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor, std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype) * std

    for parameter in model.parameters():
        if not parameter.requires_grad or not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        values = parameter.float()
        bad = not bool(torch.isfinite(values).all())
        std = 0.0 if bad or values.numel() == 1 else float(values.std())
        mean = 0.0 if bad else float(values.mean())
        if parameter.ndim >= 2 and (bad or (std < 0.1 and abs(mean) < 0.1)):
            parameter.copy_(noise(parameter, 0.2 * min(1.0, HIDDEN / parameter.shape[-1]) ** 0.5))
        elif bad:
            parameter.copy_(noise(parameter, 0.1))
        elif std < 0.05:
            parameter.add_(noise(parameter, 0.1))


@functools.cache
def _run_error(model_type: str, task: str) -> str | None:
    """Return why the plain model cannot run on text alone, or `None` if it can."""
    model = _built(model_type, task, 0, None, None)
    inputs = tiny_inputs(model, task)
    ids = inputs["input_ids"].clone()
    first, second = _ordinary_ids(model)[:2]
    ids[..., 1] = torch.where(ids[..., 1] == first, second, first)
    try:
        with torch.no_grad(), _quiet():
            outputs, changed = model(**inputs), model(**{**inputs, "input_ids": ids})
    except Exception as error:
        return f"its forward pass fails on text alone: {type(error).__name__}: {error}"
    name = "start_logits" if task == "QUESTION_ANS" else "logits"
    if name not in outputs:
        return f"its outputs have no {name}"
    if not bool(torch.isfinite(outputs[name]).all()):
        return "its outputs are not finite"
    pooled = task in ("SEQ_CLS", "MULTIPLE_CHOICE")
    after = slice(None) if pooled or model.config.is_encoder_decoder else slice(2, None)
    if torch.equal(outputs[name][:, after], changed[name][:, after]):
        return "its positions do not attend to each other here"
    return None


def _built(
    model_type: str, task: str, seed: int, attn_implementation: str | None, dropout: float | None
) -> PreTrainedModel:
    if model_type in EXCLUDED:
        raise NotBuilt(EXCLUDED[model_type])
    try:
        with _quiet(), _seeded(seed):
            config = tiny_config(model_type, task, dropout)
            kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            model = _model_class(model_type, task)._from_config(config, **kwargs).float()
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}".strip()) from error
    _redraw(model, seed)
    return model.eval()


def tiny_model(
    model_type: str,
    task: str,
    seed: int = 0,
    attn_implementation: str | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Build a tiny random model in eval mode. The same seed gives the same model.

    Args:
        model_type: transformers' model type.
        task: A key of `TASKS`.
        seed: The seed of the weights.
        attn_implementation: transformers' `attn_implementation`; `None` for the default.
        dropout: Sets all dropout probabilities of the configuration; `None` keeps those of the type.

    Raises:
        NotBuilt: If the type cannot be built here, or does not run on text alone.
    """
    model = _built(model_type, task, seed, attn_implementation, dropout)
    error = _run_error(model_type, task)
    if error is not None:
        raise NotBuilt(error)
    return model


def _special_ids(config: PreTrainedConfig) -> set[int]:
    """Return the ids of all special tokens in the configuration."""
    found: set[int] = set()
    for part in _tree(config):
        for name, value in vars(part).items():
            if _TOKEN_ID.fullmatch(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {item for item in values if isinstance(item, int)}
    return found


def _ordinary_ids(model: PreTrainedModel) -> Tensor:
    """Return the ids of the vocabulary that are not special tokens."""
    vocab = getattr(model.config.get_text_config(), "vocab_size", None)
    special = _special_ids(model.config)
    return torch.tensor([i for i in range(3, vocab if isinstance(vocab, int) else VOCAB) if i not in special])


def tiny_inputs(
    model: PreTrainedModel, task: str, batch: int = 2, length: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Return inputs of `batch` sequences of `length` ordinary tokens, without padding."""
    config = model.config
    text = config.get_text_config()
    allowed = _ordinary_ids(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return allowed[torch.randint(len(allowed), shape, generator=generator)]

    shape = (batch, 2, length) if task == "MULTIPLE_CHOICE" else (batch, length)
    input_ids = draw(*shape)
    eos = getattr(text, "eos_token_id", None)
    if config.is_encoder_decoder and task == "SEQ_CLS" and isinstance(eos, int):
        input_ids[..., -1] = eos  # the head reads the last one, and needs the same number of them in every sequence
    sep = getattr(text, "sep_token_id", None)
    if task in ("QUESTION_ANS", "MULTIPLE_CHOICE") and isinstance(sep, int) and length > 5:
        # Question, two separators, context, separator: some heads find the question by the separators.
        input_ids[..., [length // 2 - 1, length // 2, -1]] = sep
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if config.is_encoder_decoder and task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = draw(batch, length)
    return inputs
