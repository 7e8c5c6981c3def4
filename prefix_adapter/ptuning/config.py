"""The settings of a P-Tuning adapter. Every field is checked when a config is made."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from ..files.card import OwnCard, fold_note, own_method_card
from ..messages import shorten
from ..tuner.config import AdapterConfig, check_int, check_number

EncoderType = Literal["LSTM", "MLP"]
ENCODER_TYPES: tuple[EncoderType, ...] = ("LSTM", "MLP")


class PTuningType(str, enum.Enum):  # noqa: UP042 (printed and compared as PEFT's own types are)
    """The PEFT type of P-Tuning in this package, `PTUNING_V1`. PEFT's own `P_TUNING` is another method.

    Example:
        ```python
        PTuningConfig().peft_type == PTuningType.PTUNING_V1 == "PTUNING_V1"  # True
        ```
    """

    PTUNING_V1 = "PTUNING_V1"


@dataclass
class PTuningConfig(AdapterConfig):
    """Configuration of P-Tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): virtual tokens in the input.

    A virtual token is a trained vector in the place of a word's embedding. It stands wherever its placeholder stands
    among the token ids: in front of the text, behind it, or in the middle. The vectors come from a plain table,
    `Embedding(n, size)`, or from the paper's prompt encoder: `Embedding(n, size)`, a bidirectional LSTM with two
    layers, `Linear - ReLU - Linear`; or from the encoder without the LSTM. `size` is that of the model's input
    embeddings.

    Args:
        num_virtual_tokens (`int`, defaults to 9):
            The number n of virtual tokens, at least 1. The default is that of the paper's LAMA template, (3, 3, 3).
        placeholder_token_ids (`int` or `list[int]`, *optional*):
            The token ids in whose places virtual tokens stand. A list has n different ids, one for each virtual
            token, in any order in the text, once, several times or not at all. A single id stands for all of them: its
            k-th place in a row has the k-th virtual token, and each row has n places. By default the n ids behind the
            vocabulary. The base model is not resized: the ids may be larger than its vocabulary, and the row of an
            id in its vocabulary is not used.
        encoder_reparameterization_type (`str`, *optional*, defaults to `"LSTM"`):
            The prompt encoder: `"LSTM"`, `"MLP"`, or `None` for a table.
        encoder_hidden_size (`int`, *optional*):
            The size of each direction of the LSTM, half of the embedding size if `None`; or the width of the MLP, the
            embedding size if `None`. Only with an encoder.
        encoder_dropout (`float`, defaults to 0.0):
            Dropout probability in [0, 1) between the layers of the LSTM.
        init_token_ids (`list[int | None]`, *optional*):
            The token ids of real words from whose input embeddings the table, or the encoder's embedding, starts. A
            shorter list is repeated. `None` in it means a random start of that virtual token, and without the list the
            start of all is random.
        init_std (`float`, *optional*):
            Standard deviation of the random start, above 0 and at most 1000. By default that of the model's input
            embeddings for a table, and 1 for the embedding of an encoder (as in the reference implementation).
        modules_to_save (`list[str]`, *optional*):
            Modules besides the virtual tokens that are trained and saved, a task head for instance.
        label_names (`list[str]`, *optional*):
            The names of the labels of the adapter's task head, in their order. By default those of the base model
            when the adapter is made. While the adapter is active, they are the `id2label` of the model's config.

    Raises:
        ValueError: If a field has a wrong value.

    Example:
        ```python
        places = [f"<v{index}>" for index in range(6)]
        tokenizer.add_tokens(places, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(places)
        config = PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, placeholder_token_ids=ids)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("gpt2"), config)
        model(**tokenizer("<v0><v1><v2> The film was dull.<v3><v4><v5>", return_tensors="pt"))
        ```
    """

    num_virtual_tokens: int = field(default=9, metadata={"help": "Number of virtual tokens."})
    placeholder_token_ids: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={"help": "The token ids of the virtual tokens; those behind the vocabulary by default."},
    )
    encoder_reparameterization_type: Optional[EncoderType] = field(
        default="LSTM", metadata={"help": "The prompt encoder: LSTM or MLP; none for a plain table."}
    )
    encoder_hidden_size: Optional[int] = field(
        default=None, metadata={"help": "Size of each direction of the LSTM, or width of the MLP."}
    )
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout between the layers of the LSTM."})
    init_token_ids: Optional[list[Optional[int]]] = field(
        default=None, metadata={"help": "Token ids of the words from which the virtual tokens start; None for random."}
    )
    init_std: Optional[float] = field(
        default=None, metadata={"help": "Standard deviation of the random start; that of the embeddings by default."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules besides the virtual tokens that are trained and saved."}
    )
    label_names: Optional[list[str]] = field(
        default=None, metadata={"help": "The names of the task head's labels; the base model's by default."}
    )

    method = PTuningType.PTUNING_V1
    table_setting = "encoder_reparameterization_type=None"

    def __post_init__(self) -> None:
        self._placeholders: set[tuple[int, ...]] = set()
        super().__post_init__()

    def check_own_fields(self) -> None:
        """Check the fields that PEFT's configs do not have.

        Raises:
            ValueError: If one of them has a wrong value.
        """
        check_int("num_virtual_tokens", self.num_virtual_tokens, 1)
        kind = self.encoder_reparameterization_type
        if kind is not None and kind not in ENCODER_TYPES:
            raise ValueError(
                f"`encoder_reparameterization_type` must be one of {list(ENCODER_TYPES)} or None, got {shorten(kind)}."
            )
        if self.encoder_hidden_size is not None:
            check_int("encoder_hidden_size", self.encoder_hidden_size, 1)
            if kind is None:
                raise ValueError("`encoder_hidden_size` is a size of the prompt encoder, and there is no encoder.")
        check_number("encoder_dropout", self.encoder_dropout)
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"`encoder_dropout` must lie in [0, 1), got {shorten(self.encoder_dropout)}.")
        if self.encoder_dropout and kind != "LSTM":
            raise ValueError("`encoder_dropout` is for the layers of the LSTM, and there is no LSTM.")
        self._check_placeholders()
        if self.init_token_ids is not None:
            words = self.init_token_ids = self._check_ids("init_token_ids", self.init_token_ids, may_lack=True)
            if len(words) > self.num_virtual_tokens:
                raise ValueError(
                    f"`init_token_ids` has {len(words)} words for {self.num_virtual_tokens} virtual tokens. Raise "
                    "`num_virtual_tokens`, or name fewer words."
                )
        if self.init_std is not None:
            check_number("init_std", self.init_std)
            if not 0 < self.init_std <= 1000:
                raise ValueError(f"`init_std` must be above 0 and at most 1000, got {shorten(self.init_std)}.")

    def _check_placeholders(self) -> None:
        if self.placeholder_token_ids is None:
            return
        given = self.placeholder_token_ids
        if isinstance(given, int) and not isinstance(given, bool):
            check_int("placeholder_token_ids", given, 0)
            return
        ids = self.placeholder_token_ids = self._check_ids("placeholder_token_ids", given)
        if len(ids) != self.num_virtual_tokens:
            raise ValueError(
                f"`placeholder_token_ids` has {len(ids)} ids for {self.num_virtual_tokens} virtual tokens. Name one "
                "id for each of them, or a single integer for all of them."
            )
        if len(set(ids)) != len(ids):
            raise ValueError(
                f"`placeholder_token_ids` names an id twice: {shorten(ids)}. To have a virtual token in several "
                "places, repeat its id in the input."
            )

    def _check_ids(self, name: str, ids: Any, may_lack: bool = False) -> list[Any]:
        if not isinstance(ids, (list, tuple, range)) or not ids:
            raise ValueError(f"`{name}` must be a list of token ids that is not empty, got {shorten(ids)}.")
        for each in ids:
            if each is not None or not may_lack:
                check_int(name, each, 0)
        return list(ids)

    def find_placeholders(self, vocabulary: int) -> tuple[int, ...]:
        """The token ids of the virtual tokens in a model, which are remembered for saving.

        Args:
            vocabulary: The number of rows of the model's input embeddings.

        Returns:
            One id for each virtual token, or a single one for all of them.
        """
        given = self.placeholder_token_ids
        if given is None:
            given = list(range(vocabulary, vocabulary + self.num_virtual_tokens))
        ids = (given,) if isinstance(given, int) else tuple(given)
        self._placeholders.add(ids)
        return ids

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the placeholders in the model with the adapter (`None` if several share the config)."""
        ids = self.placeholder_token_ids
        if ids is None and len(self._placeholders) == 1:
            ids = list(next(iter(self._placeholders)))
        return {**super().to_dict(), "placeholder_token_ids": ids}

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder computes the virtual tokens."""
        return self.encoder_reparameterization_type is not None

    def note_folded(self) -> None:
        """Note that the table has replaced the encoder."""
        self.encoder_reparameterization_type, self.encoder_hidden_size, self.encoder_dropout = None, None, 0.0

    def make_card(self, *, mapped: bool = False) -> OwnCard:
        """What the model card says about the adapter.

        Args:
            mapped: Whether the config file names the class of the base model (`auto_mapping`).
        """
        count, ids = self.num_virtual_tokens, self.to_dict()["placeholder_token_ids"]
        places = (
            f"The inputs have the token id {ids} in {count} places, one for each virtual token in their order."
            if isinstance(ids, int)
            else "The inputs have the token ids of the setting `placeholder_token_ids` where virtual tokens stand."
        )
        kind = self.encoder_reparameterization_type
        fold = f"\n\n{fold_note(f'An {kind}')}" if kind else ""
        method = f"A P-Tuning adapter of {count} virtual token{'' if count == 1 else 's'}"
        settings = {"num_virtual_tokens": count, "placeholder_token_ids": ids}
        return own_method_card(self, method, places + fold, settings, mapped=mapped)
