"""Inputs for the probe: the user's example, or dummies made from what the model says of itself.

The names of the inputs stand in the model's `forward`, their sizes in its config. Where a config allows several forms
of an input (mel features before or behind the frames, for instance), each is a candidate. The probe tries one after
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..private import get_device
from .calls import get_required_names, parameter_names

# Tokens in a dummy text. A number that is rarely a number of heads: shapes show which side is which.
TEXT_LENGTH = 5
# Frames, patches and positions, where the config does not say how many an input must have.
_SHORT = 16
# Pixels of an image's side: convolutions halve it up to five times.
_MIN_SIDE = 64
# Samples of a waveform: many numbers of samples per frame divide it.
_SAMPLES = 9600
# Candidates of one set of inputs that the probe tries at most.
_MAX_CANDIDATES = 24

_GRIDS = ("image_grid_thw", "grid_thw", "video_grid_thw", "image_grid_hws", "target_sizes")

_example: ContextVar[Mapping[str, Any] | None] = ContextVar("prefix_adapter_example_inputs", default=None)


@contextmanager
def example_inputs(**batch: Any) -> Iterator[None]:
    """Inside this context, models are wrapped and loaded with these inputs in place of dummy inputs.

    Wrapping a model runs it once, to see which modules take a prefix. It makes the inputs for that from the model's
    config. A model whose config does not say enough needs an example: one batch, as for the model's `forward`. A short
    batch is enough, and its values do not matter. Each thread and each asynchronous task has its own example.

    Args:
        **batch: The arguments of the model's `forward`.

    Raises:
        ValueError: If the batch is empty.

    Example:
        ```python
        batch = processor(images=image, text="What is this?", return_tensors="pt")
        with example_inputs(**batch):
            model = get_peft_model(base_model, PrefixTuningV2Config())
        ```
    """
    if not batch:
        raise ValueError("`example_inputs` needs the arguments of the model's `forward`, such as `pixel_values=...`.")
    token = _example.set(batch)
    try:
        yield
    finally:
        _example.reset(token)


class UnknownInputError(TypeError):
    """A model requires an input for which there is no dummy."""


@dataclass
class ProbeInputs:
    """Inputs for one forward of the probe.

    Attributes:
        module: The module that takes them: the backbone, or the model with its head for the user's example.
        arguments: The arguments of its `forward`.
        is_example: Whether they are the user's.
    """

    module: nn.Module
    arguments: dict[str, Any]
    is_example: bool = False

    @property
    def form(self) -> Hashable:
        """Names, shapes and dtypes of the inputs."""
        arguments = self.arguments.items()
        return tuple((name, getattr(value, "shape", None), getattr(value, "dtype", None)) for name, value in arguments)

    def describe(self) -> str:
        """The names and shapes of the inputs."""
        parts = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                parts.append(f"{name} {list(value.shape)}")
            elif name != "use_cache":
                parts.append(name)
        return ", ".join(parts)


def get_inputs(model: nn.Module) -> Iterator[ProbeInputs]:
    """The inputs with which to probe a model: the user's example, or else dummy inputs, the shortest ones first.

    Raises:
        UnknownInputError: If `forward` requires an input for which there is no dummy.
    """
    example = _example.get()
    if example is not None:
        yield ProbeInputs(model, _adapt_example(model, example), is_example=True)
        return
    # A backbone may read what another part of the model makes of the inputs (SpeechT5), so the model comes second.
    for module in dict.fromkeys([get_backbone(model), model]):
        maker = _DummyMaker(model, module)
        tried = set()
        for names in maker.list_names():
            for arguments in islice(maker.make(names), _MAX_CANDIDATES):
                inputs = ProbeInputs(module, arguments)
                if inputs.form not in tried:
                    tried.add(inputs.form)
                    yield inputs


def get_backbone(model: nn.Module) -> nn.Module:
    """The part of a model without its task head, if it takes the model's inputs; else the model."""
    backbone: nn.Module = getattr(model, "base_model", model)
    names = parameter_names(backbone)
    # A forward with `**kwargs` alone names no argument.
    return backbone if not names or any(name in names for name in _get_main_inputs(model)) else model


def _get_main_inputs(model: nn.Module) -> list[str]:
    main: Any = getattr(model, "main_input_name", "input_ids")
    return list(main) if isinstance(main, (list, tuple)) else [main]


def _adapt_example(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """The user's batch on the model's device, and in its dtype, with a cache."""
    device, dtype = get_device(model), _get_dtype(model)

    def adapt(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    arguments = {name: adapt(value) for name, value in example.items()}
    if "use_cache" in parameter_names(model):
        arguments.setdefault("use_cache", True)
    return arguments


def _get_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.itemsize > 1), torch.float32)


# ---- What the model says of itself


def get_ordinary_token(model: nn.Module) -> int:
    """The id of a token that is not special. (A padding token, for instance, may get no position.)"""
    special: set[int] = set()
    for section in _get_sections(getattr(model, "config", None)):
        for name, value in vars(section).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def count_codebooks(model: nn.Module) -> int:
    """The number of codebooks of a model of audio codes; 1 for other models."""
    config: Any = getattr(model, "config", None)
    # Dia calls them channels, as other models call the colours of an image.
    channels = getattr(getattr(config, "decoder_config", None), "num_channels", 1)
    return _Sizes.about(config, "num_codebooks").get("num_codebooks", default=channels)


def get_input_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's token embeddings; `None` if it has none, or several of them (CANINE)."""
    try:
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        embeddings = get_embeddings() if get_embeddings is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _get_sections(config: Any) -> list[Any]:
    """A config and the configs in it, outer ones first."""
    sections = [config] if config is not None else []
    for section in sections:  # the list grows while it is read
        for inner in vars(section).values():
            if isinstance(inner, PreTrainedConfig) and not any(inner is known for known in sections):
                sections.append(inner)
    return sections


@dataclass
class _Sizes:
    """Sizes in the part of a config that is about one kind of input.

    Attributes:
        section: That part.
    """

    section: Any = None

    @classmethod
    def about(cls, config: Any, *names: str) -> _Sizes:
        """The sizes in the first part of a config that sets one of these names."""
        for section in _get_sections(config):
            if any(getattr(section, name, None) is not None for name in names):
                return cls(section)
        return cls(config)

    def get(self, *names: str, default: int) -> int:
        """The first of these sizes that is set. Of a list of sizes, the largest."""
        return max(self.get_all(*names) or [default])

    def get_all(self, *names: str) -> list[int]:
        """The values of the first of these settings that is set; empty if none is."""
        for name in names:
            value = getattr(self.section, name, None)
            if isinstance(value, dict):
                value = [value[side] for side in ("height", "width") if side in value]
            values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
            if values and all(isinstance(item, int) and not isinstance(item, bool) and item > 0 for item in values):
                return values
        return []


@dataclass
class _DummyMaker:
    """Makes dummy inputs of one backbone, by the names of the arguments of its `forward`.

    Args:
        model: The model.
        backbone: The module that takes the inputs.
    """

    model: nn.Module
    backbone: nn.Module
    names: list[str] = field(init=False)
    required: list[str] = field(init=False)
    config: Any = field(init=False)
    device: torch.device | None = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.names, self.required = parameter_names(self.backbone), get_required_names(self.backbone)
        self.config = getattr(self.backbone, "config", getattr(self.model, "config", None))
        self.device = get_device(get_input_embeddings(self.model) or self.model) or get_device(self.model)
        self.dtype = _get_dtype(self.backbone)
        # A forward with `**kwargs` alone names no argument.
        self.takes_text = "input_ids" in self.names or not self.names

    def list_names(self) -> Iterator[list[str]]:
        """The sets of arguments to try: a text alone, what `forward` requires, and everything that it takes."""
        mains = [name for name in _get_main_inputs(self.backbone) if name in self.names]
        if self.takes_text and not set(self.required) - {"input_ids"}:
            yield ["input_ids"]
        wanted = dict.fromkeys([*self.required, *(mains or (["input_ids"] if self.takes_text else []))])
        yield [*wanted, *(grid for grid in _GRIDS if grid in self.names and "input_ids" not in wanted)]
        more = _OPTIONAL if self.takes_text else _OPTIONAL - {"attention_mask"}
        yield list(dict.fromkeys([*wanted, *(name for name in self.names if name in more)]))

    def make(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Arguments with these names, in all forms that the config allows.

        Raises:
            UnknownInputError: If there is no dummy for one of them.
        """
        unknown = [name for name in names if name not in _MAKERS]
        if unknown:
            inputs = ", ".join(f"`{name}`" for name in unknown)
            raise UnknownInputError(
                f"`{type(self.backbone).__name__}.forward` requires {inputs}, of which there is no dummy"
            )
        names = list(names)
        if "decoder_input_ids" in self.names and "decoder_input_ids" not in names:
            names.append("decoder_input_ids")
        for forms in product(*(self._make_forms(name, names) for name in names)):
            arguments = dict(zip(names, forms, strict=True))
            if names[0] == "input_ids" and "attention_mask" in self.names:
                arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
            # A forward with `**kwargs` alone names no argument.
            if "use_cache" in self.names or not self.names:
                arguments["use_cache"] = True
            yield arguments

    def _make_forms(self, name: str, names: list[str]) -> list[Any]:
        return _MAKERS[name](self, name, names)

    # ---- Tensors

    def zeros(self, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Zeros of each of these shapes, each shape once."""
        return [torch.zeros(shape, dtype=dtype or self.dtype, device=self.device) for shape in dict.fromkeys(shapes)]

    def noise(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Random numbers of each of these shapes, each shape once: equal inputs would hide a fault."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in dict.fromkeys(shapes)]
        return [each.to(self.device, self.dtype) for each in drawn]

    def ones(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Ones, as for a mask that shows everything."""
        return [tensor + 1 for tensor in self.zeros(*shapes, dtype=torch.long)]


# ---- One function for each kind of input. Each returns the forms to try, the likeliest first.

Maker = Callable[[_DummyMaker, str, list[str]], list[Any]]


def _make_ids(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Token ids `[1, tokens]`; with several codebooks `[codebooks, tokens]` or `[1, tokens, codebooks]`."""
    codebooks = count_codebooks(maker.model)
    tokens = _get_text_length(maker, names)
    shapes: list[tuple[int, ...]] = [(1, tokens)]
    if codebooks > 1:
        shapes += [(codebooks, tokens), (1, tokens, codebooks)]
    token = get_ordinary_token(maker.model)
    return [ids + token for ids in maker.zeros(*shapes, dtype=torch.long)]


def _get_text_length(maker: _DummyMaker, names: list[str]) -> int:
    """The number of tokens, with those that an image takes the place of (KOSMOS-2)."""
    images = "image_embeds_position_mask" in names
    return TEXT_LENGTH + images * _Sizes(maker.config).get("latent_query_num", default=0)


def _make_text_mask(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    return maker.ones((1, _get_text_length(maker, names)))


def _make_image_places(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Which tokens an image takes the place of."""
    places = torch.arange(_get_text_length(maker, names), device=maker.device)
    return [((places >= 2) & (places < len(places) - 2)).unsqueeze(0)]


def _get_image(maker: _DummyMaker) -> tuple[_Sizes, int, int, int, int]:
    """The sizes of an image: where they stand, channels, height, width, and the side of a patch."""
    sizes = _Sizes.about(maker.config, "patch_size", "image_size", "num_channels")
    channels = sizes.get("num_channels", "in_channels", "in_chans", default=3)
    patch = sizes.get("patch_size", "patch_stride", default=16)
    merge = sizes.get("spatial_merge_size", "downsample_factor", default=1)
    step = patch * merge
    sides = sizes.get_all("image_size", "crop_size", "input_size") or [step * max(4, math.ceil(_MIN_SIDE / step))]
    return sizes, channels, sides[0], sides[-1], patch


def _make_pixels(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Images `[1, channels, height, width]`, videos and lists of images with an axis more, or patches."""
    sizes, channels, height, width, patch = _get_image(maker)
    frames = sizes.get("num_frames", "frames_per_clip", "num_images", default=1)
    time = sizes.get("temporal_patch_size", "tubelet_size", default=1)
    merge = sizes.get("spatial_merge_size", default=1)
    image = (channels, height, width)
    patches = (1, (height // patch) * (width // patch), channels * patch**2)
    if "spatial_shapes" in names:
        return maker.noise(patches)
    if "aspect_ratio_ids" in maker.names:
        return maker.noise((1, 1, sizes.get("max_num_tiles", default=1), *image))
    if any(grid in names for grid in _GRIDS):
        count = 4 * merge**2
        flat = [(count, channels * depth * patch**2) for depth in (time, 2, 1)]
        return maker.noise(*flat, (count, channels, patch, patch))
    plain, listed = (1, *image), (1, max(frames, time), *image)
    return maker.noise(*((listed, plain) if frames > 1 or "video" in name else (plain, listed)), (1, 1, 1, *image),
                       patches)  # fmt: skip


def _make_grid(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """The frames, rows and columns of the patches of one image."""
    merge = _Sizes.about(maker.config, "patch_size", "image_size").get("spatial_merge_size", default=1)
    grid = [1, 2 * merge, 2 * merge]
    return [torch.tensor([part], device=maker.device) for part in (grid, grid[1:])]


def _make_patch_rows(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """The rows and columns of the patches of an image, or a mask that shows all of its patches (SigLIP 2)."""
    _, _, height, width, patch = _get_image(maker)
    rows, columns = height // patch, width // patch
    if name == "spatial_shapes":
        return [torch.tensor([[rows, columns]], device=maker.device)]
    return maker.ones((1, rows * columns))


def _make_tile_mask(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """A mask that shows every image, or each tile of it, to every token (Mllama, IDEFICS)."""
    tiles = _get_image(maker)[0].get("max_num_tiles", default=1)
    shapes: dict[str, tuple[int, ...]] = {
        "aspect_ratio_ids": (1, 1),
        "aspect_ratio_mask": (1, 1, tiles),
        "image_attention_mask": (1, TEXT_LENGTH, 1),
        "cross_attention_mask": (1, TEXT_LENGTH, 1, tiles),
    }
    return maker.ones(shapes[name])


def _make_boxes(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """The places of words on a page."""
    return maker.zeros((1, TEXT_LENGTH, 4), dtype=torch.long) + maker.zeros((1, TEXT_LENGTH, 4))


def _make_patches(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Pix2Struct's patches `[1, patches, 2 + pixels]`: each with its row and column in front."""
    _, channels, _, _, patch = _get_image(maker)
    return [flat.abs() for flat in maker.noise((1, _SHORT, 2 + channels * patch**2))]


def _get_waves(maker: _DummyMaker) -> _Sizes:
    return _Sizes.about(maker.config, "conv_kernel", "conv_stride", "sampling_rate", "num_mel_bins", "feature_size")


def _make_waves(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """A waveform `[1, samples]`, long enough for a few frames, or a spectrogram `[1, frames, mel bins]`."""
    sizes = _get_waves(maker)
    samples = 1
    kernels, strides = sizes.get_all("conv_kernel"), sizes.get_all("conv_stride")
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
        samples = (samples + (_SHORT if samples == 1 else 0) - 1) * stride + kernel
    samples = samples if kernels else _SAMPLES
    shapes: list[tuple[int, ...]] = [(1, samples), (1, 1, samples)]
    mel = sizes.get("num_mel_bins", default=0)
    if mel and not kernels:
        shapes.insert(0, (1, sizes.get("max_length", default=8 * _SHORT), mel))
    return maker.noise(*shapes)


def _make_features(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Mel features `[1, mel bins, frames]` or `[1, frames, mel bins]`, in the length that positions demand."""
    bins_settings = ("num_mel_bins", "mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
                     "feature_size", "input_feat_size", "input_dim")  # fmt: skip
    sizes = _Sizes.about(maker.config, *bins_settings)
    bins = sizes.get(*bins_settings, default=0) or _Sizes.about(maker.config, "d_model").get(
        "d_model", "hidden_size", default=80
    )
    frames = [math.lcm(8 * _SHORT, 2 * sizes.get("n_window", default=1))]
    positions = sizes.get("max_source_positions", default=0)
    if positions:
        convolutions = [m for m in maker.backbone.modules() if isinstance(m, nn.Conv1d) and m.stride[0] > 1]
        # Whisper takes inputs of full length alone.
        frames.append(positions * math.prod(convolution.stride[0] for convolution in convolutions[:2]))
    shapes: list[tuple[int, ...]] = []
    for length in frames:
        shapes += [(1, bins, length), (1, length, bins)]
    return maker.noise(*shapes, (1, 1, frames[0], bins))


def _make_feature_mask(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """A mask `[1, frames]` for features or a waveform."""
    inputs = next(n for n in ("input_features", "audio_mel", "input_values", "inputs") if n in names)
    shapes = [form.shape for form in maker._make_forms(inputs, names)]
    lengths = sorted({side for shape in shapes for side in shape[1:]}, reverse=True)
    masks = maker.ones(*((1, length) for length in lengths))
    return [*masks, *(mask.bool() for mask in masks)]


def _make_series(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    """Past values of time series `[1, time]`, or `[1, time, channels]`."""
    sizes = _Sizes.about(maker.config, "context_length", "past_time_features", "patch_length")
    length = sizes.get("context_length", "patch_length", default=2 * _SHORT)
    lags = sizes.get_all("lags_sequence")
    length += max(lags) if lags else 0
    channels = sizes.get("num_input_channels", "input_size", default=1)
    many, one = (1, length, channels), (1, length)
    return maker.noise(*((many, one) if channels > 1 or hasattr(sizes.section, "num_input_channels") else (one, many)))


def _make_series_features(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    sizes = _Sizes.about(maker.config, "context_length")
    length = _make_series(maker, name, names)[0].shape[1]
    if name.startswith("future"):
        length = sizes.get("prediction_length", default=1)
    return maker.noise((1, length, sizes.get("num_time_features", default=1)))


def _make_series_mask(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    padding = name.endswith("padding")
    return [torch.zeros_like(s) if padding else torch.ones_like(s) for s in _make_series(maker, name, names)]


def _make_zero(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    return maker.zeros((1, 1), dtype=torch.long)


def _make_query_embeddings(maker: _DummyMaker, name: str, names: list[str]) -> list[Any]:
    return maker.noise((1, TEXT_LENGTH, _Sizes.about(maker.config, "hidden_size").get("hidden_size", default=1)))


_MAKERS: dict[str, Maker] = {
    "input_ids": _make_ids,
    "decoder_input_ids": _make_ids,
    "qformer_input_ids": _make_ids,
    "attention_mask": _make_text_mask,
    "pixel_values": _make_pixels,
    "pixel_values_videos": _make_pixels,
    "hidden_states": _make_pixels,
    "flattened_patches": _make_patches,
    "spatial_shapes": _make_patch_rows,
    "pixel_attention_mask": _make_patch_rows,
    "aspect_ratio_ids": _make_tile_mask,
    "aspect_ratio_mask": _make_tile_mask,
    "cross_attention_mask": _make_tile_mask,
    "image_attention_mask": _make_tile_mask,
    "bbox": _make_boxes,
    "image_embeds_position_mask": _make_image_places,
    **dict.fromkeys(_GRIDS, _make_grid),
    "input_values": _make_waves,
    "inputs": _make_waves,
    "input_features": _make_features,
    "audio_mel": _make_features,
    "input_features_mask": _make_feature_mask,
    "audio_mel_mask": _make_feature_mask,
    "past_values": _make_series,
    "past_time_features": _make_series_features,
    "past_observed_mask": _make_series_mask,
    "past_values_padding": _make_series_mask,
    "freq": _make_zero,
    "query_embeds": _make_query_embeddings,
}

# Inputs that are tried, though `forward` does not require them, if fewer inputs fail or do not reach all modules.
_OPTIONAL = {
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "spatial_shapes",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "image_attention_mask",
    "bbox",
    "image_embeds_position_mask",
    "input_features",
    "input_features_mask",
    "past_time_features",
    "past_observed_mask",
}
