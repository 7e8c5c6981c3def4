"""Tiny random models that read images, sound, videos or time series, with inputs for them.

The types come from the auto mappings of transformers, and their configurations are made small by the rules of zoo.py.
The forms of pixels, mel features and waveforms are those that the model itself accepts: several are tried. Images and
sounds stand in the middle of a text, where the model reads both.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from zoo import NotBuilt

from prefix_adapter.backbone.dummy_inputs import get_inputs, get_ordinary_token

TASKS: dict[str, dict[str, Any]] = {
    "MULTIMODAL_LM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "SPEECH_SEQ_2_SEQ": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "TEXT_TO_WAVEFORM": modeling_auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    "TEXT_TO_SPECTROGRAM": modeling_auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES,
    "VISUAL_QA": modeling_auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES,
    "IMAGE_CLS": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "VIDEO_CLS": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    "AUDIO_CLS": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "CTC": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "CAUSAL_IMAGE": modeling_auto.MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES,
    "ZERO_SHOT_IMAGE_CLS": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "TIME_SERIES_PREDICTION": modeling_auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES,
    "TIME_SERIES_CLS": modeling_auto.MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM_OF_CODES": {
        name: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        for name in zoo.EXCLUDED
        if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    },
    "FEATURES": modeling_auto.MODEL_MAPPING_NAMES,
}
"""Short task name -> transformers' auto mapping (model type -> name of the model class)."""


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sizes], **more}}


OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "informer": {"prediction_length": 4, "context_length": 16},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "blip-2": {"image_token_index": 90},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "exaone4_5_vision": {"window_size": 56},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_text": _sections(2, 1, 1, partial_rotary_factor=1.0),
    "glm46v_text": _sections(2, 1, 1, partial_rotary_factor=1.0),
    "glm4v_moe_text": _sections(2, 1, 1, partial_rotary_factor=1.0),
    "glm_ocr_text": _sections(2, 1, 1, partial_rotary_factor=1.0),
    "glmga_text": _sections(2, 1, 1, partial_rotary_factor=1.0),
    "mllama_vision_model": {"vision_output_dim": 64, "intermediate_layers_indices": [0]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "paddleocr_vl_text": _sections(4, 2, 2),
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768},
    "qwen2_vl_text": _sections(2, 1, 1),
    "qwen2_5_vl_text": _sections(2, 1, 1),
    "qwen2_5_vl_vision": {"window_size": 56},
    "qwen2_5_vl": {"vision_config": {"window_size": 56}},
    "seamless_m4t": {"max_source_positions": 128},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 4, "decoder_num_hidden_layers": 2},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vivit": {"num_frames": 4},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "vibevoice_acoustic_tokenizer": {"num_filters": 1, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 1, "depths": [1] * 7},
    "voxtral": {"audio_token_id": 90},
    "whisper": {"max_source_positions": 16, "num_mel_bins": 8},
}
"""As `zoo.OVERRIDES`."""
zoo.OVERRIDES.update({name: {**zoo.OVERRIDES.get(name, {}), **values} for name, values in OVERRIDES.items()})

EXCLUDED: dict[str, str] = {
    "bark": "a container of four models, without a forward",
}
"""Model types that are not run, with the reason."""

_PLACEHOLDERS = {
    "pixel_values": ("image_token_id", "image_token_index"),
    "pixel_values_videos": ("video_token_id", "video_token_index"),
    "input_features": ("audio_token_id", "audio_token_index"),
    "input_values": ("audio_token_id", "audio_token_index"),
}
_FEATURES = {
    "pixel_values": "get_image_features",
    "pixel_values_videos": "get_video_features",
    "input_features": "get_audio_features",
    "input_values": "get_audio_features",
}


def _class_names(task: str, model_type: str) -> tuple[str, ...]:
    name = TASKS[task][model_type]
    return (name,) if isinstance(name, str) else tuple(name)


@functools.cache
def _model_class(model_type: str, task: str) -> type[PreTrainedModel]:
    name = _class_names(task, model_type)[0]
    try:
        found = getattr(transformers, name)
        found.main_input_name  # noqa: B018  (a class whose packages are missing fails here)
        return found
    except (AttributeError, ImportError, RuntimeError) as error:
        raise NotBuilt(f"{name} cannot be imported: {' '.join(str(error).split())[:120]}") from error


def _reads_more_than_text(model_class: type[PreTrainedModel]) -> bool:
    modalities = getattr(model_class, "input_modalities", "text")
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    return modalities != {"text"} or model_class.main_input_name != "input_ids"


@functools.cache
def tasks_of(model_type: str) -> list[str]:
    """Return the tasks for which this type has a model that reads or writes more than text. The base model counts
    only for types without another task."""
    found: list[str] = []
    for task, mapping in TASKS.items():
        if model_type not in mapping or (task == "FEATURES" and found):
            continue
        try:
            made = _model_class(model_type, task)
            if task == "FEATURES" and not _reads_more_than_text(made):
                continue
        except NotBuilt:
            if task == "FEATURES":
                continue
        found.append(task)
    return found


def model_types() -> list[str]:
    """Return all model types, sorted, with a task of this file."""
    types = sorted(set().union(*TASKS.values()))
    return [model_type for model_type in types if model_type not in EXCLUDED and tasks_of(model_type)]


def modality_of(model_type: str, task: str) -> str:
    """Return what models of this type and task read, such as `"image+text"`."""
    modalities = getattr(_model_class(model_type, task), "input_modalities", "text")
    return modalities if isinstance(modalities, str) else "+".join(sorted(modalities))


def _config(model_type: str, model_class: type[PreTrainedModel], dropout: float | None) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    own_class = model_class.config_class
    if own_class is not None and own_class in config_class.sub_configs.values():
        config_class = own_class
    if model_type in ("vision-encoder-decoder", "speech-encoder-decoder"):
        encoder = "vit" if model_type.startswith("vision") else "wav2vec2"
        parts = [
            CONFIG_MAPPING[name](**zoo._Shrinker().shrink(CONFIG_MAPPING[name](), {})) for name in (encoder, "bert")
        ]
        config = config_class.from_encoder_decoder_configs(*parts, pad_token_id=0, decoder_start_token_id=1)
    else:
        config = config_class(**zoo._Shrinker().shrink(config_class(), {}))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    for part in zoo._tree(config):
        if getattr(part, "vocab_size", None) and getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
    if dropout is not None:
        zoo._set_dropout(config, dropout)
        for part in zoo._tree(config):
            if hasattr(part, "apply_spec_augment"):  # hides random parts of the sound in training
                part.apply_spec_augment = False
    return config


def tiny_model(
    model_type: str, task: str, seed: int = 0, attn_implementation: str | None = None, dropout: float | None = None
) -> PreTrainedModel:
    """Build a tiny random model in eval mode, like `zoo.tiny_model`.

    Raises:
        NotBuilt: If the type cannot be built here, or no inputs for it are found.
    """
    if model_type in EXCLUDED:
        raise NotBuilt(EXCLUDED[model_type])
    model_class = _model_class(model_type, task)
    try:
        with zoo._quiet(), zoo._seeded(seed):
            kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            model = model_class._from_config(_config(model_type, model_class, dropout), **kwargs).float()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    zoo._redraw(model, seed)
    model.eval()
    if not _forms(model_type, task):
        raise NotBuilt(f"no inputs are found: {_failures.get((model_type, task), '')}")
    return model


_failures: dict[tuple[str, str], str] = {}


@functools.cache
def _forms(model_type: str, task: str) -> dict[str, Tensor]:
    """Return inputs of one row with which the model runs: with images or sound in the text if it takes them."""
    model_class = _model_class(model_type, task)
    with zoo._quiet(), zoo._seeded(0):
        model = model_class._from_config(_config(model_type, model_class, 0.0)).float().eval()
    zoo._redraw(model, 0)
    for inputs in (*_in_text(model), *_plain(model)):
        try:
            with torch.no_grad(), zoo._quiet():
                model(**inputs)
            return inputs
        except Exception as error:
            _failures.setdefault((model_type, task), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return {}


def _plain(model: PreTrainedModel) -> Any:
    """Yield inputs without placeholders for images or sound in a text, those with the most arguments first."""
    names = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in names.values())
    found = []
    try:
        for candidate in get_inputs(model):
            inputs = {name: value for name, value in candidate.arguments.items() if isinstance(value, Tensor)}
            if takes_any or set(inputs) <= set(names):
                found.append(inputs)
    except TypeError:  # an input that the package does not know
        pass
    yield from sorted(found, key=len, reverse=True)


def _in_text(model: PreTrainedModel) -> Any:
    """Yield inputs with an image or a sound in the middle of a text."""
    names = set(inspect.signature(type(model).forward).parameters)
    if "input_ids" not in names:
        return
    for name, settings in _PLACEHOLDERS.items():
        token = next((found for part in zoo._tree(model.config) for setting in settings
                      if isinstance(found := getattr(part, setting, None), int)), None)  # fmt: skip
        owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, _FEATURES[name])), None)
        if name not in names or token is None or owner is None:
            continue
        for features in _feature_forms(model, name, names):
            get_features = getattr(owner, _FEATURES[name])
            try:
                with torch.no_grad(), zoo._quiet():
                    found = get_features(**_accepted(get_features, features))
                    count = _count(found, model)
            except Exception:
                continue
            ids = torch.full((1, count + 4), get_ordinary_token(model))
            ids[:, 2:-2] = token
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
            for kind in ("mm_token_type_ids", "token_type_ids"):
                if kind in names:
                    inputs[kind] = (ids == token).long()
            if "decoder_input_ids" in names:
                inputs["decoder_input_ids"] = torch.full((1, 4), get_ordinary_token(model))
            yield inputs


def _accepted(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _count(features: Any, model: PreTrainedModel) -> int:
    """Return how many tokens the features of one image or sound fill."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (list, tuple)):
        return sum(_count(part, model) for part in features)
    return features.numel() // features.shape[-1]


def _feature_forms(model: PreTrainedModel, name: str, names: set[str]) -> Any:
    """Yield forms of an image or a sound, with the other inputs that describe it."""
    from prefix_adapter.backbone.dummy_inputs import _DummyMaker

    maker = _DummyMaker(model, model)
    grid = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}.get(name)
    known = [name, grid] if grid in names else [name]
    mask = next((m for m in ("input_features_mask", "feature_attention_mask") if m in names), None)
    for inputs in maker.make(known):
        features = {key: inputs[key] for key in known}
        pixels = features[name]
        if "image_sizes" in names:
            yield features
            features = {**features, "image_sizes": torch.tensor([list(pixels.shape[-2:])])}
        if mask is not None and name.startswith("input"):
            for length in sorted(set(pixels.shape[1:]), reverse=True):
                yield {**features, mask: torch.ones(1, length, dtype=torch.long)}
        yield features


def tiny_inputs(
    model: PreTrainedModel, model_type: str, task: str, batch: int = 2, length: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Return random inputs of `batch` rows, without padding. A text around an image or sound has more than `length`
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocabularies = [
        size for part in zoo._tree(model.config) if isinstance(size := getattr(part, "vocab_size", 0), int)
    ]
    special = zoo._special_ids(model.config)
    vocabulary = min((size for size in vocabularies if size > 3), default=zoo.VOCAB)
    allowed = torch.tensor([token for token in range(3, vocabulary) if token not in special])
    inputs: dict[str, Tensor] = {}
    forms = _forms(model_type, task)
    tokens = forms["input_ids"].shape[1] if "input_ids" in forms else 0
    for name, form in forms.items():
        if name.endswith("input_ids"):
            inputs[name] = _fill_text(form, batch, length, allowed, generator)
        elif form.is_floating_point():
            shape = (batch * form.shape[0], *form.shape[1:])
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
            inputs[name] = drawn.abs() if name == "flattened_patches" else drawn
        else:
            inputs[name] = form.repeat(batch, *(1 for _ in form.shape[1:]))
            if tokens and form.shape[1] == tokens:  # something about each token
                more = inputs["input_ids"].shape[1] - tokens
                inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:].repeat_interleave(more, dim=1)], dim=1)
    ids = inputs.get("input_ids")
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs and ids is not None:
            form = _forms(model_type, task)["input_ids"]
            special = [int(token) for token in form.unique() if token != form.flatten()[0]]
            placeholder = torch.isin(ids, torch.tensor(special)) if special else torch.zeros_like(ids).bool()
            inputs[name] = torch.ones_like(ids) if name == "attention_mask" else placeholder.long()
    return inputs


def _fill_text(form: Tensor, batch: int, length: int, allowed: Tensor, generator: torch.Generator) -> Tensor:
    """Return random tokens in place of the form's ordinary ones, and more of them at the end."""
    ordinary, rest = form.flatten()[0], form.shape[2:]
    rows = form.repeat(batch, *(1 for _ in form.shape[1:]))
    more = max(3, length - form.shape[1])
    rows = torch.cat([rows, torch.full((rows.shape[0], more, *rest), int(ordinary))], dim=1)
    drawn = allowed[torch.randint(len(allowed), rows.shape, generator=generator)]
    return torch.where(rows == ordinary, drawn, rows)
