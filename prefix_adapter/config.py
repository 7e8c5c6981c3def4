"""The settings of a P-Tuning v2 prefix. Every field is checked when a config is made."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from .backbone.attention import ENTRY_POINTS, KINDS, EntryPoint
from .files.card import OwnCard, prefix_card
from .messages import shorten
from .tuner.config import AdapterConfig, check_bool, check_int, check_number, check_text


class PrefixTuningV2Type(str, enum.Enum):  # noqa: UP042 (printed and compared as PEFT's own types are)
    """The PEFT type of this package, `PREFIX_TUNING_V2`.

    `peft.PeftType` takes no new members. The dictionaries in `peft.mapping` have string enums as keys, so a string
    enum of our own works there too.

    Example:
        ```python
        PrefixTuningV2Config().peft_type == PrefixTuningV2Type.PREFIX_TUNING_V2 == "PREFIX_TUNING_V2"  # True
        ```
    """

    PREFIX_TUNING_V2 = "PREFIX_TUNING_V2"


def check_strength(name: str, value: Any) -> None:
    """Check the strength of a prefix.

    Raises:
        ValueError: If it is no number from 0 to 1000.
    """
    check_number(name, value)
    if not 0 <= value <= 1000:
        raise ValueError(f"`{name}` must lie between 0 and 1000, got {shorten(value)}.")


@dataclass
class PrefixTuningV2Config(AdapterConfig):
    """Configuration of a P-Tuning v2 prefix (Liu et al. 2022, https://arxiv.org/abs/2110.07602, section 3.2).

    Every attention layer of the frozen backbone gets `num_virtual_tokens` trained keys and values in front of its
    own. They come from a plain table, `Embedding(n, columns)`, or, with `prefix_projection`, from the reference's
    two-layer MLP, `Embedding(n, hidden) - Linear(hidden, encoder_hidden_size) - Tanh -
    Linear(encoder_hidden_size, columns)`. `columns` is the sum over the layers of the key and the value size
    (layers x 2 x hidden for BERT). The columns are in the order of the reference: layer by layer, the key before the
    value, heads, head size.

    Args:
        num_virtual_tokens (`int`, defaults to 20):
            Prefix length n, in tokens; at least 1. The paper's settings lie between 4 and 224 (its appendix).
        prefix_projection (`bool`, defaults to `False`):
            Whether an MLP computes the prefix (the paper's "reparameterization", section 3.3).
        num_frozen_tokens (`int`, defaults to 0):
            Number of virtual tokens at the beginning of the table that are not trained, below `num_virtual_tokens`.
            Many decoders pay much attention to the first token of a text, whatever it is. A prefix that starts from a
            text trains better if this token stays (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266). Not with
            an MLP.
        encoder_hidden_size (`int`, *optional*):
            Width of the MLP's hidden layer; the backbone's hidden size if `None`. Only with `prefix_projection`.
        prefix_dropout (`float`, *optional*):
            Probability in [0, 1) that an element of a prefix key or value is dropped in training. It is drawn for
            each row of the batch, as in the reference implementation. If `None`, it is 0 in a decoder, where dropout
            holds a prefix back (docs/learning.md), and 0.1 in other models, as in the reference.
        lora_r (`int`, defaults to 0):
            Rank of trained low-rank matrices beside the prefix, on the linear layers of each attention module with a
            prefix; 0 for none (LoRA, Hu et al. 2022, https://arxiv.org/abs/2106.09685, with `lora_alpha` at twice the
            rank). They are a part of the adapter: saved, mixed and scaled by `strength` with it. They are stored 16
            times as large as they are used, so that the learning rate of a prefix suits them too.
        init_std (`float`, defaults to 0.02):
            Standard deviation of the normal distribution from which the table, or the MLP's embedding and weights, are
            drawn (the reference's `initializer_range`). Above 0, because an MLP of zeros never gets a gradient, and
            at most 1000.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices of the layers that get a prefix, all if `None`. In an encoder-decoder an index means that layer of
            the encoder and of the decoder.
        target_attention (`list[str]`, *optional*):
            The kinds of attention that get a prefix: `"encoder"` self-attention, `"decoder"` self-attention, `"cross"`
            attention; every kind that the model has if `None` (as in Li and Liang 2021,
            https://arxiv.org/abs/2101.00190, section 4).
        entry_point (`str`, defaults to `"cache"`):
            Where the prefix enters: `"cache"`, in front of the keys and values that attention takes from
            `past_key_values`, or `"attention"`, in the call of the attention function, for backbones whose attention
            takes no cache (ModernBERT, DistilBERT, ALBERT, ViT, wav2vec 2.0). All adapters of a model have the same.
        shift_positions (`bool`, defaults to `False`):
            Whether the positions of the input start at n instead of 0, as in the reference and in PEFT's prefix
            tuning. The default keeps the backbone's own positions, so that its full input length stays usable.
        strength (`float`, defaults to 1.0):
            The factor of the prefix's weight in the softmax of attention, at least 0: `log(strength)` is added to the
            scores of its columns, and the changes of `lora_r` are multiplied by it. At 1 the adapter is as trained, at
            0 the outputs are those of the base model.
            `prefix_adapter.set_strength` changes it, and `prefix_adapter.use_strength` sets it for some calls.
        modules_to_save (`list[str]`, *optional*):
            Modules besides the prefix that are trained and saved, a task head for instance.
        label_names (`list[str]`, *optional*):
            The names of the labels of the adapter's task head, in their order. By default those of the base model
            when the adapter is made. While the adapter is active, they are the `id2label` of the model's config.
        prefix_layout (`str`, *optional*):
            Layers, heads and head sizes that the prefix was made for. It is written when an adapter is saved, and
            compared with the model when the adapter is loaded: 6 layers of 768 have as many columns as 12 of 384.

    Attributes:
        source (`AdapterSource`, *optional*): The place the config was read from, until an adapter is made with it.

    Raises:
        ValueError: If a field has an invalid value; the message names the field, and the adapter if the config is
            read from one.

    Example:
        ```python
        config = PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=20)
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained("bert-base-cased"), config)
        ```
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prefix length, in virtual tokens."})
    prefix_projection: bool = field(default=False, metadata={"help": "Whether a two-layer MLP computes the prefix."})
    num_frozen_tokens: int = field(
        default=0, metadata={"help": "Number of virtual tokens at the beginning of the table that are not trained."}
    )
    encoder_hidden_size: Optional[int] = field(
        default=None, metadata={"help": "Width of the MLP's hidden layer, the backbone's hidden size by default."}
    )
    prefix_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "Dropout on the prefix keys and values; by default 0 in a decoder and 0.1 elsewhere."},
    )
    lora_r: int = field(
        default=0, metadata={"help": "Rank of low-rank matrices (LoRA) beside the prefix, 0 for none."}
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indices of the layers that get a prefix, all by default."}
    )
    target_attention: Optional[list[Literal["encoder", "decoder", "cross"]]] = field(
        default=None,
        metadata={"help": "Kinds of attention that get a prefix: encoder, decoder, cross; all by default."},
    )
    entry_point: EntryPoint = field(
        default="cache",
        metadata={"help": "Where the prefix enters: through the cache, or through the attention function."},
    )
    shift_positions: bool = field(
        default=False, metadata={"help": "Whether the positions of the input start after the prefix."}
    )
    strength: float = field(
        default=1.0, metadata={"help": "Factor of the prefix's weight in the softmax of attention; 0 for no effect."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules besides the prefix that are trained and saved."}
    )
    label_names: Optional[list[str]] = field(
        default=None, metadata={"help": "The names of the task head's labels; the base model's by default."}
    )
    prefix_layout: Optional[str] = field(
        default=None, metadata={"help": "The layers that the prefix was made for; written when an adapter is saved."}
    )

    method = PrefixTuningV2Type.PREFIX_TUNING_V2
    table_setting = "prefix_projection=False"

    def __post_init__(self) -> None:
        self._layouts: set[str] = set()
        super().__post_init__()

    def check_own_fields(self) -> None:
        """Check the fields that PEFT's configs do not have.

        Raises:
            ValueError: If one of them has a wrong value.
        """
        check_int("num_virtual_tokens", self.num_virtual_tokens, 1)
        check_int("lora_r", self.lora_r, 0)
        check_bool("prefix_projection", self.prefix_projection)
        check_bool("shift_positions", self.shift_positions)
        if self.encoder_hidden_size is not None:
            check_int("encoder_hidden_size", self.encoder_hidden_size, 1)
            if not self.prefix_projection:
                raise ValueError(
                    "`encoder_hidden_size` is the width of the MLP, and there is no MLP: set `prefix_projection=True` "
                    "too."
                )
        check_int("num_frozen_tokens", self.num_frozen_tokens, 0)
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(
                f"`num_frozen_tokens` must be below `num_virtual_tokens` ({self.num_virtual_tokens}), got "
                f"{self.num_frozen_tokens}: nothing would be trained."
            )
        if self.num_frozen_tokens and self.prefix_projection:
            raise ValueError(
                "`num_frozen_tokens` is for a table: an MLP computes all of its tokens from the same weights. Set "
                "`prefix_projection=False`, or `num_frozen_tokens=0`."
            )
        if self.prefix_dropout is not None:
            check_number("prefix_dropout", self.prefix_dropout)
            if not 0 <= self.prefix_dropout < 1:
                raise ValueError(f"`prefix_dropout` must lie in [0, 1), got {shorten(self.prefix_dropout)}.")
        check_number("init_std", self.init_std)
        if not 0 < self.init_std <= 1000:
            raise ValueError(f"`init_std` must be above 0 and at most 1000, got {shorten(self.init_std)}.")
        check_strength("strength", self.strength)
        if self.entry_point not in ENTRY_POINTS:
            raise ValueError(f"`entry_point` must be one of {list(ENTRY_POINTS)}, got {shorten(self.entry_point)}.")
        self._check_layers()
        self.check_names("target_attention", KINDS)
        check_text("prefix_layout", self.prefix_layout)

    def _check_layers(self) -> None:
        if self.layers_to_transform is None:
            return
        layers = self.layers_to_transform
        if not isinstance(layers, (list, tuple, set, range)):
            layers = [layers]
        if not layers:
            raise ValueError("`layers_to_transform` is empty: an adapter needs at least one layer. None means all.")
        for index in layers:
            check_int("layers_to_transform", index, 0)
        if len(set(layers)) != len(layers):
            raise ValueError(f"`layers_to_transform` names a layer twice: {shorten(list(layers))}.")
        self.layers_to_transform = sorted(layers)

    def check_layout(self, model_name: str, layout: str, unreached: Sequence[str] = ()) -> None:
        """Compare `prefix_layout` with the layout of a model, and remember the latter for saving.

        Args:
            model_name: The class of the model, for the message.
            layout: Its layers, heads and head sizes, as `describe` writes them.
            unreached: The attention modules that got no prefix, because the probe did not reach them.

        Raises:
            ValueError: If the adapter was made for another layout.
        """
        hint = ", within the `example_inputs` with which it was made" if unreached else ""
        if self.prefix_layout not in (None, layout):
            raise ValueError(
                f"The adapter was made for attention layers of another shape: {shorten(self.prefix_layout)}, while "
                f"{model_name} has {layout}. Load it onto the base model that it was trained on{hint}."
            )
        self._layouts.add(layout)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the layout of the model with the adapter (`None` if several share the config)."""
        layout = next(iter(self._layouts)) if len(self._layouts) == 1 else None
        return {**super().to_dict(), "prefix_layout": self.prefix_layout or layout}

    @property
    def has_encoder(self) -> bool:
        """Whether an MLP computes the prefix."""
        return self.prefix_projection

    def note_folded(self) -> None:
        """Note that the table has replaced the MLP."""
        self.prefix_projection, self.encoder_hidden_size = False, None

    def make_card(self, *, mapped: bool = False) -> OwnCard:
        """What the model card says about the prefix.

        Args:
            mapped: Whether the config file names the class of the base model (`auto_mapping`).
        """
        return prefix_card(self, mapped=mapped)
