"""What tasks share whose rows become one text by a template, and whose answers are words of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import transformers
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor

from ...templates import Template, TemplateEncoder, TemplateError
from ..recipe import RecipeError
from ..settings import LANGUAGE_MODELS
from .task import Row, Task, text_problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..recipe import Recipe

_CLASSES = {
    "masked": ("AutoModelForMaskedLM", None),
    "causal": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}


class TemplateTask(Task):
    """A task whose rows become one text by `task_kwargs.template`, for a language model's own head.

    Attributes:
        kind: The kind of language model: masked, causal or seq2seq.
        template: The template.
        encoder: It makes the tokens of a row.

    Raises:
        RecipeError: As for `Task`; if the template is invalid or does not fit the model.
    """

    has_head = False
    trains_new_modules = False
    target = "label"

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(recipe, tokenizer)
        self.tokenizer.padding_side = "right"  # models count positions from the left and include padding
        self.model_config = _load_config(recipe)
        self.kind = self._find_kind(self.model_config)
        self.auto_class, self.peft_task_type = _CLASSES[self.kind]
        if not self.kwargs["template"]:
            raise RecipeError("`task_kwargs.template` is missing, for instance `{text} It was {mask}.`")
        try:
            self.template = Template(self.kwargs["template"])
            if not self.template.has_mask and self.kind != "seq2seq":
                raise TemplateError(f"a {self.kind} language model needs one `{{mask}}`, and there is none.")
            self.start_token_ids = self.template.start_token_ids(tokenizer)
            first = len(tokenizer)
            self.placeholder_token_ids = list(range(first, first + len(self.start_token_ids)))
            self.encoder = TemplateEncoder(
                self.template,
                tokenizer,
                max_length=self.max_length,
                placeholder_token_ids=self.placeholder_token_ids,
                add_end=self.kind != "causal",
            )
            place = self.encoder.encode(dict.fromkeys(self.template.fields, ""), [[0]])[0].answer
        except TemplateError as error:
            raise RecipeError(f"`task_kwargs.template`: {error}") from error
        self._may_start_with_answer = self.kind == "causal" and place.start == 0
        if self._may_start_with_answer and not self.template.fields:
            raise RecipeError("`task_kwargs.template`: a causal language model needs a token before `{mask}`.")
        self.columns = dict.fromkeys(self.template.fields, "a field of the template")

    def _find_kind(self, config: PreTrainedConfig) -> str:
        """The kind of language model: the setting, or what the model's configuration says."""
        kind = self.kwargs["language_model"]
        if kind not in (None, *LANGUAGE_MODELS):
            raise RecipeError(f"`task_kwargs.language_model` must be one of {LANGUAGE_MODELS}, got {kind!r}.")
        if kind is None and config.is_encoder_decoder:
            kind = "seq2seq"
        elif kind is None:
            kind = "masked" if is_masked_lm(config) and self.tokenizer.mask_token is not None else "causal"
        if kind == "masked" and self.tokenizer.mask_token is None:
            raise RecipeError(f"`task_kwargs.language_model`: the tokenizer of {self.recipe.model} has no mask token.")
        return str(kind)

    def template_problem(self, row: Row, answers: Sequence[Sequence[int]]) -> str | None:
        """Describe what is wrong with the texts of a row; `None` if they are valid.

        Args:
            row: The row.
            answers: The token ids of the answers.
        """
        for name in self.columns:
            if problem := text_problem(row, name, may_be_empty=True):
                return problem
        if self.columns and not any(row[name].strip() for name in self.columns):
            return f"{', '.join(map(repr, self.columns))}: there is no text."
        if self._may_start_with_answer or self.template.whole_fields:
            try:
                text = self.encoder.encode(row, answers)[0]
            except TemplateError as error:
                return str(error)
            if self.kind == "causal" and text.answer.start == 0:
                return "there is no token before `{mask}`, which a causal language model needs."
        return None

    @property
    def _input_names(self) -> set[str]:
        """The names of the model's inputs."""
        return {*self.tokenizer.model_input_names, "input_ids", "attention_mask"}

    def real_tokens(self, feature: Row) -> list[int]:
        return self.without_placeholders(feature["input_ids"])

    def without_placeholders(self, ids: Sequence[int]) -> list[int]:
        """Token ids without those of virtual tokens."""
        return [token for token in ids if token not in self.placeholder_token_ids]


def is_masked_lm(config: PreTrainedConfig) -> bool:
    """Whether a model's configuration is one of a masked language model, such as BERT."""
    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    is_masked = is_masked or "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})
    return is_masked and not config.is_decoder


def _load_config(recipe: Recipe) -> PreTrainedConfig:
    revision = {name: value for name, value in recipe.model_kwargs.items() if name == "revision"}
    try:
        return transformers.AutoConfig.from_pretrained(
            recipe.model, **revision, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"`model`: {recipe.model!r} has no configuration that can be read: {error}") from error


def logits_at(model: Any, inputs: dict[str, Tensor], positions: Tensor, main: str) -> Tensor:
    """The logits of a language model at some places only.

    Other places do not reach the language model's head: with a vocabulary of 250,000 words, its logits at all places
    would need gigabytes.

    Args:
        model: A language model, with or without an adapter or a wrapper of Accelerate's.
        inputs: Its inputs, padded on the right.
        positions: The places, `[batch, places]`.
        main: The input whose places these are.

    Returns:
        The logits, `[batch, places, vocabulary]`.
    """
    own = extract_model_from_parallel(getattr(model, "module", model))
    base = own
    while hasattr(base, "get_base_model"):  # an adapter around another one
        base = base.get_base_model()
    backbone = base.base_model
    length, count = inputs[main].shape[1], positions.shape[1]
    was_called = False

    def take(states: Tensor) -> Tensor:
        # Methods such as prompt tuning put virtual tokens in front.
        places = (positions + states.shape[1] - length)[..., None]
        return states.gather(1, places.expand(-1, -1, states.shape[-1]))

    def keep(module: Any, args: Any, output: Any) -> Any:
        nonlocal was_called
        was_called = True
        if isinstance(output, tuple):
            return (take(output[0]), *output[1:])
        output["last_hidden_state"] = take(output["last_hidden_state"])
        return output

    # A compiled model would keep the hook of its first batch.
    can_hook = backbone is not base and not is_compiled_module(own)
    handle = backbone.register_forward_hook(keep) if can_hook else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if was_called and logits.shape[1] == count else take(logits)
