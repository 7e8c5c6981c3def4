"""Fill-mask: the token that a language model expects at a place in a text, among all tokens of its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...templates import Mask, TemplateError, Text
from ..data import rows_of
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .task import Columns, Row
from .template_task import TemplateTask, logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

_CANDIDATES = 10


class FillMask(TemplateTask):
    """Predict one token of the vocabulary (LAMA: Petroni et al. 2019, arXiv:1909.01066; P-tuning: arXiv:2103.10385).

    `task_kwargs.template` makes one text of the columns of a row. The target is the word in the place of `{mask}`, one
    token of the tokenizer. A causal language model reads the text before `{mask}` only. The loss is the cross-entropy
    over the vocabulary. The metrics are the share of rows whose token is the most probable one, and the share of those
    whose token is among the ten most probable ones.

    A row: `{"subject": "Dante", "label": "Florence"}`, for the template `{subject} was born in {mask}.`

    Raises:
        RecipeError: As for `Task`; or if the template is invalid or does not fit the model.
    """

    settings = TASK_SETTINGS["fill-mask"]
    default_metric = "accuracy"

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(recipe, tokenizer)
        if self.kind == "seq2seq":
            raise RecipeError(
                f"`model`: {recipe.model} is an encoder-decoder. This task is for masked and causal language models."
            )
        pieces = self.template.pieces
        behind = pieces[pieces.index(Mask()) + 1 :]
        if self.kind == "causal" and not all(isinstance(piece, Text) for piece in behind):
            raise RecipeError(
                "`task_kwargs.template`: a causal language model reads the text before `{mask}` only. Put `{mask}` at "
                "the end."
            )
        self._answer = [0] if self.kind == "causal" else [self.tokenizer.mask_token_id]
        self._ids: dict[str, list[int]] = {}

    def _word_ids(self, word: str) -> list[int]:
        """The tokens of a word in the place of `{mask}`."""
        if word not in self._ids:
            self._ids[word] = self.encoder.word_ids(word)
        return self._ids[word]

    def problem(self, row: Row, with_targets: bool) -> str | None:
        if problem := self.template_problem(row, [self._answer]):
            return problem
        if not with_targets:
            return None
        word = row[self.target]
        if not isinstance(word, str):
            return f"{self.target!r} must be a text, got {word!r}."
        try:
            count = len(self._word_ids(word))
        except TemplateError as error:
            return f"{self.target!r}: {error}"
        if count > 1:
            return f"{self.target!r}: {word!r} has {count} tokens. The task predicts one token: leave such rows out."
        return None

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        names = [name for name in self.padded if name in self._input_names]
        result: Columns = {name: [] for name in (*names, "position")}
        for row in rows_of(rows):
            (text,) = self.encoder.encode(row, [self._answer])
            end = text.answer.start if self.kind == "causal" else len(text.input_ids)
            found = {"input_ids": text.input_ids[:end], "token_type_ids": text.token_type_ids[:end]}
            found["attention_mask"] = [1] * end
            for name in names:
                result[name].append(found[name])
            result["position"].append(text.answer.start - (self.kind == "causal"))
        result["row"] = indices
        if with_targets:
            result["labels"] = [self._word_ids(word)[0] for word in rows[self.target]]
        return result

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        batch = super().collate(features)
        batch["positions"] = torch.tensor([[each["position"]] for each in features])
        return batch

    def _logits(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """The logits in the place of the answer, `[batch, vocabulary]`."""
        inputs = {name: batch[name] for name in self._input_names & batch.keys()}
        return logits_at(model, inputs, batch["positions"], "input_ids")[:, 0].float()

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        logits = self._logits(model, batch)
        return F.cross_entropy(logits, batch["labels"]), logits

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        probabilities = (self._logits(model, batch) if output is None else output).softmax(-1)
        best, tokens = probabilities.topk(min(_CANDIDATES, probabilities.shape[-1]))
        return [list(each) for each in zip(tokens.tolist(), best.tolist(), strict=True)]

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        ((tokens, probabilities),) = records
        return {
            "prediction": str(self.tokenizer.decode(tokens[:1])).strip(),
            "probability": probabilities[0],
            "tokens": [self._token(token) for token in tokens],
        }

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        right = [self._token(self._word_ids(word)[0]) for word in targets]
        pairs = list(zip(answers, right, strict=True))
        return {
            "accuracy": sum(answer["tokens"][0] == token for answer, token in pairs) / len(pairs),
            "accuracy_at_10": sum(token in answer["tokens"] for answer, token in pairs) / len(pairs),
        }

    def _token(self, token: int) -> str:
        """A token as the vocabulary has it; its number if the model has more logits than the tokenizer has tokens."""
        found: Any = self.tokenizer.convert_ids_to_tokens(token)
        return str(token if found is None else found)
