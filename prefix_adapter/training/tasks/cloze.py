"""Cloze: a label is the word that the language model expects at a place in a text. No task head is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...templates import EncodedTemplate, TemplateError
from ..data import DataError, rows_of
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .labels import (
    WeightedLabels,
    classification_metrics,
    distinct_labels,
    most_probable,
    sort_labels,
    unknown_label_problem,
)
from .task import Columns, Row
from .template_task import TemplateTask, logits_at

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe

_SENTINELS = ("<extra_id_0>", "<extra_id_1>")
"""The tokens with which T5 and similar models mark a gap, and the start of the next one."""

_DECODER = "decoder_input_ids"


@dataclass
class Sentence:
    """A text with a word in it.

    Attributes:
        inputs: The inputs of the model.
        positions: The places whose logits are read.
        targets: The tokens that are scored there.
    """

    inputs: dict[str, list[int]]
    positions: list[int]
    targets: list[int]

    @classmethod
    def of(cls, text: EncodedTemplate, positions: list[int], targets: list[int]) -> Sentence:
        """A sentence whose inputs are those of an encoded text."""
        inputs = {"input_ids": text.input_ids, "token_type_ids": text.token_type_ids}
        return cls({**inputs, "attention_mask": [1] * len(text.input_ids)}, positions, targets)

    def cut_last(self) -> None:
        """Leave out the last token of the inputs."""
        self.inputs = {name: ids[:-1] for name, ids in self.inputs.items()}


class Cloze(TemplateTask, WeightedLabels):
    """Predict the label whose word fits best into a text (Schick and Schütze 2021; Liu et al. 2021, arXiv:2103.10385).

    `task_kwargs.template` makes one text of the columns of a row, and `task_kwargs.verbalizer` has the words of each
    label. The score of a word is the sum of the log-probabilities of its tokens:

    - masked: each token has a mask of its own, and all are predicted at once.
    - causal: the tokens of the word and of the text after it, each after all tokens before it.
    - seq2seq: the tokens that the decoder writes. With `{mask}` in the template this is what the model was trained to
      write for a gap: for T5 the word between two sentinels, for BART the whole text. Without it, it is the word.

    The score of a label is the mean over its words. The probabilities of the labels are the softmax of their scores,
    and the loss is its cross-entropy.

    A row: `{"text": "a text", "label": "a label"}`, for the template `{text} It was {mask}.`

    Raises:
        RecipeError: As for `Task`; if the template or the verbalizer is invalid or does not fit the model; or if two
            labels have the same tokens.
    """

    settings = TASK_SETTINGS["cloze"]
    default_metric = "accuracy"

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(recipe, tokenizer)
        self.decoder_start: Any = getattr(self.model_config, "decoder_start_token_id", None)
        if self.kind == "seq2seq" and self.decoder_start is None:
            raise RecipeError(f"`model`: the configuration of {recipe.model} has no `decoder_start_token_id`.")
        if self.kwargs["score"] not in ("sum", "mean"):
            raise RecipeError(f"`task_kwargs.score` must be sum or mean, got {self.kwargs['score']!r}.")
        vocabulary = tokenizer.get_vocab()
        self._sentinels = [vocabulary[name] for name in _SENTINELS if name in vocabulary]
        has_gap = self._sentinels or tokenizer.mask_token is not None
        if self.kind == "seq2seq" and self.template.has_mask and not has_gap:
            raise RecipeError(
                f"`task_kwargs.template`: the tokenizer of {recipe.model} has no mask token. Leave out `{{mask}}`: "
                "the decoder then writes the word."
            )
        self.words: list[list[int]] = []
        self._answers: list[list[int]] = [[0]]
        self.verbalizer = _read_verbalizer(self.kwargs["verbalizer"])
        labels = self.labels or list(self.verbalizer)
        if labels:
            self._set_words(labels)

    # ---- The labels and their words

    def _set_words(self, labels: Sequence[str | int]) -> None:
        """Set the words of the labels.

        Raises:
            RecipeError: If the verbalizer has other labels, or if the tokenizer cannot tell the words apart.
        """
        names = [str(label) for label in labels]
        if self.verbalizer and set(names) != set(self.verbalizer):
            raise RecipeError(
                f"`task_kwargs.verbalizer` has words for {list(self.verbalizer)}, and the labels are {names}."
            )
        words = [(number, word) for number, name in enumerate(names) for word in self.verbalizer.get(name, [name])]
        self.words = []
        owners: dict[tuple[int, ...], int] = {}
        for number, word in words:
            try:
                ids = self._word_ids(word)
            except TemplateError as error:
                raise RecipeError(f"`task_kwargs.verbalizer`: {error}") from error
            other = owners.setdefault(tuple(ids), number)
            self.words.append(ids)
            if len(owners) < len(self.words):
                raise RecipeError(
                    f"`task_kwargs.verbalizer`: the word {word!r} of the label {names[number]!r} has the same tokens "
                    f"as a word of {names[other]!r}."
                )
        self._answers = self._find_answers()
        try:
            self.encoder.check_room(self._answers)
        except TemplateError as error:
            raise RecipeError(f"`task_kwargs.template`: {error}") from error
        counts = [sum(number == own for number, _ in words) for own in range(len(names))]
        self._label_of = torch.tensor(
            [[(number == own) / counts[own] for own in range(len(names))] for number, _ in words]
        )

    def _word_ids(self, word: str) -> list[int]:
        if self.template.has_mask:
            return self.encoder.word_ids(word)
        ids: list[int] = self.tokenizer(text_target=word)["input_ids"]
        if self.tokenizer.unk_token_id in ids:
            raise TemplateError(f"the tokenizer does not know the word {word!r}.")
        return ids

    def _find_answers(self) -> list[list[int]]:
        """The tokens that stand in the place of `{mask}` in the texts that the model reads or is to write."""
        if self.kind == "masked":
            return [[self.tokenizer.mask_token_id] * length for length in sorted({len(word) for word in self.words})]
        if self.kind == "causal":
            return self.words
        if self._sentinels or not self.template.has_mask:
            return [self._sentinels[:1]]
        return [[self.tokenizer.mask_token_id], *self.words]

    def learn_labels(self, rows: Dataset, source: str) -> None:
        found = distinct_labels(rows[self.target], source)
        if self.labels is None and self.verbalizer:
            as_numbers = all(isinstance(label, int) for label in found)
            try:
                self.labels = [int(name) if as_numbers else name for name in self.verbalizer]
            except ValueError:
                raise RecipeError(
                    f"`task_kwargs.verbalizer` has words for {list(self.verbalizer)}, and the labels of {source} are "
                    f"the numbers {sort_labels(found)}."
                ) from None
        elif self.labels is None:
            self.labels = sort_labels(found)
        assert self.labels is not None
        if len(self.labels) < 2:
            raise DataError(f"{source}: there is only the label {self.labels}: there is nothing to learn.")
        self._set_words(self.labels)
        self.learn_weights(rows)

    def problem(self, row: Row, with_targets: bool) -> str | None:
        if problem := self.template_problem(row, self._answers):
            return problem
        if with_targets and row[self.target] is None:
            return f"{self.target!r} is missing."
        if with_targets and self.labels is not None and self.label_number(row[self.target]) is None:
            return unknown_label_problem(row[self.target], self.labels)
        return None

    # ---- The features

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        names = [name for name in (*self.padded, _DECODER) if name in self._input_names]
        result: Columns = {name: [] for name in (*names, "variants", "positions", "targets")}
        for row in rows_of(rows):
            sentences = self._sentences(row)
            variants, numbers = self._join(sentences)
            for name in names:
                result[name].append([each.inputs[name] for each in variants])
            result["variants"].append(numbers)
            result["positions"].append([each.positions for each in sentences])
            result["targets"].append([each.targets for each in sentences])
        result["row"] = indices
        if with_targets:
            result["labels"] = [self.label_number(label) for label in rows[self.target]]
        return result

    @property
    def _input_names(self) -> set[str]:
        """The names of the model's inputs."""
        decoder = [_DECODER] if self.kind == "seq2seq" else []
        return {*super()._input_names, *decoder}

    def _sentences(self, row: Row) -> list[Sentence]:
        """The text of a row with each of the words."""
        texts = self.encoder.encode(row, self._answers)
        if self.kind == "masked":
            by_length = {len(text.answer): text for text in texts}
            found = [(by_length[len(word)], word) for word in self.words]
            return [Sentence.of(text, list(text.answer), word) for text, word in found]
        if self.kind == "causal":
            sentences = [Sentence.of(text, *_next_tokens(text.input_ids, text.answer.start)) for text in texts]
            for sentence in sentences:
                sentence.cut_last()  # nothing is predicted after the last token
            return sentences
        sentences = []
        for ids, start in self._decoder_texts(texts[1:]):
            written: list[int] = [self.decoder_start, *ids]
            sentence = Sentence.of(texts[0], *_next_tokens(written, start + 1))
            sentence.inputs[_DECODER] = written[:-1]
            sentences.append(sentence)
        return sentences

    def _decoder_texts(self, texts: list[EncodedTemplate]) -> list[tuple[list[int], int]]:
        """For each word what the decoder is to write, and where the scored tokens start."""
        if not self.template.has_mask:
            return [(word, 0) for word in self.words]
        if self._sentinels:
            return [([*self._sentinels[:1], *word, *self._sentinels[1:]], 1) for word in self.words]
        return [(text.input_ids, text.answer.start) for text in texts]

    def _join(self, sentences: list[Sentence]) -> tuple[list[Sentence], list[int]]:
        """The different inputs of some sentences, and the number of the input of each sentence.

        The logits of a decoder do not depend on later tokens, so one input serves all sentences that begin with it.
        """
        name = _DECODER if self.kind == "seq2seq" else "input_ids"
        variants: list[Sentence] = []
        numbers = [0] * len(sentences)
        for number in sorted(range(len(sentences)), key=lambda i: -len(sentences[i].inputs[name])):
            own = sentences[number].inputs[name]
            for place, other in enumerate(variants):
                ids = other.inputs[name]
                if ids == own or (self.kind != "masked" and ids[: len(own)] == own):
                    numbers[number] = place
                    break
            else:
                numbers[number] = len(variants)
                variants.append(sentences[number])
        return variants, numbers

    def real_tokens(self, feature: Row) -> list[int]:
        return self.without_placeholders(feature["input_ids"][0])

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch of all inputs of some rows.

        Returns:
            The inputs of the model, `[inputs, longest]`; `positions`, `[inputs, most]`, the places whose logits are
            read; for each word `variants`, `[batch, words]`, the number of its input, and `steps` and `targets`,
            `[batch, words, most tokens]`, the number of each of its places among `positions` and the token that is
            scored there, -100 for none; and `labels`, `[batch]`.
        """
        flat = [
            {name: each[name][i] for name in self._input_names & each.keys()}
            for each in features
            for i in range(len(each["input_ids"]))
        ]
        decoder = [each.pop(_DECODER) for each in flat if _DECODER in each]
        batch = dict(self.tokenizer.pad(flat, return_tensors="pt"))
        if decoder:
            batch[_DECODER] = _padded(decoder, self.tokenizer.pad_token_id)
        positions: list[dict[int, int]] = []
        variants, steps = [], []
        for each in features:
            first = len(positions)
            positions += [{} for _ in each["input_ids"]]
            numbers = [first + variant for variant in each["variants"]]
            variants.append(numbers)
            for number, own in zip(numbers, each["positions"], strict=True):
                places = positions[number]
                steps.append([places.setdefault(place, len(places)) for place in own])
        words = len(self.words)
        batch["positions"] = _padded([list(places) for places in positions], 0)
        batch["variants"] = torch.tensor(variants)
        batch["steps"] = _padded(steps, 0).unflatten(0, (-1, words))
        batch["targets"] = _padded([ids for each in features for ids in each["targets"]], -100).unflatten(
            0, (-1, words)
        )
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([each["labels"] for each in features])
        return batch

    # ---- The model

    def _scores(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """The scores of the labels, `[batch, labels]`."""
        inputs = {name: batch[name] for name in self._input_names & batch.keys()}
        logits = logits_at(model, inputs, batch["positions"], _DECODER if self.kind == "seq2seq" else "input_ids")
        variants, steps, targets = batch["variants"][..., None], batch["steps"], batch["targets"]
        logits = logits.float()
        found = logits[variants, steps, targets.clamp(min=0)] - logits.logsumexp(-1)[variants, steps]
        scores = found.masked_fill(targets < 0, 0.0).sum(-1)
        if self.kwargs["score"] == "mean":
            scores = scores / (targets >= 0).sum(-1)
        return scores @ self._label_of.to(scores)

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        scores = self._scores(model, batch)
        return self.weighted_loss(scores, batch["labels"]), scores

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        return (self._scores(model, batch) if output is None else output).softmax(-1).tolist()

    # ---- The results

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        assert self.labels is not None
        return most_probable(self.labels, records[0])

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        assert self.labels is not None
        return classification_metrics([answer["prediction"] for answer in answers], targets)


def _next_tokens(ids: list[int], start: int) -> tuple[list[int], list[int]]:
    """The places that predict the tokens from `start` on, and these tokens."""
    return list(range(start - 1, len(ids) - 1)), ids[start:]


def _padded(rows: Iterable[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _read_verbalizer(verbalizer: Any) -> dict[str, list[str]]:
    """The words of each label, by the text of the label.

    Raises:
        RecipeError: If it is not a mapping from labels to words.
    """
    if verbalizer is None:
        return {}
    if not isinstance(verbalizer, dict) or not verbalizer:
        raise RecipeError(f"`task_kwargs.verbalizer` must be a mapping from labels to words, got {verbalizer!r}.")
    result: dict[str, list[str]] = {}
    for label, words in verbalizer.items():
        found = words if isinstance(words, list) else [words]
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise RecipeError(
                f"`task_kwargs.verbalizer`: a label must be a text or an integer, got {label!r} (YAML reads no, yes, "
                "off, on, true and false as truth values: put them in quotes)."
            )
        if not found or not all(isinstance(word, str) and word.strip() for word in found):
            raise RecipeError(
                f"`task_kwargs.verbalizer.{label}` must be a word or a list of words, got {words!r} (YAML reads no, "
                "yes, off and on as truth values: put them in quotes)."
            )
        result[str(label)] = found
    return result
