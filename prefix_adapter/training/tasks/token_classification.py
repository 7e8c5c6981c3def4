"""Token classification: a tag for each token of a sentence (parts of speech, named entities, semantic roles)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from seqeval import metrics as seqeval
from sklearn.metrics import accuracy_score, f1_score

from ..data import DataError
from ..settings import TASK_SETTINGS
from .labels import WeightedLabels, distinct_labels, label_config, sort_labels, unknown_label_problem
from .task import Columns, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel


class TokenClassification(WeightedLabels):
    """Tag the tokens of a sentence that is already split into tokens.

    A token here is a word of the data; the tokenizer splits it into pieces. The tokens are joined with spaces, because
    most tokenizers recognise the start of a word by the space before it. The first piece of a token gets its tag
    (Devlin et al. 2019, section 5.3). A sentence longer than `max_length` pieces is cut into windows that overlap by
    `stride` pieces, so that every token gets a tag. If there are tags with the prefix `B-`, the metrics are those of
    whole entities (seqeval); otherwise they are those of single tags.

    A row: `{"tokens": ["EU", "rejects", "German", "call"], "tags": ["B-ORG", "O", "B-MISC", "O"]}`.
    """

    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    columns = {"tokens": "a list of strings"}
    target = "tags"
    settings = TASK_SETTINGS["token-classification"]
    labels_per_token = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        special = self.tokenizer.num_special_tokens_to_add()
        self.stride = min(self.integer_setting("stride", least=0), (self.max_length - special) // 2)
        self.tokenizer.truncation_side = "right"  # so that the windows are in the order of the text

    def problem(self, row: Row, with_targets: bool) -> str | None:
        tokens = row["tokens"]
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            return f"'tokens' must be a list of strings, got {tokens!r}."
        if not tokens:
            return "'tokens' is empty."
        if not with_targets:
            return None
        tags = row[self.target]
        if not isinstance(tags, list) or len(tags) != len(tokens):
            count = len(tags) if isinstance(tags, list) else repr(tags)
            return f"there are {len(tokens)} tokens and {count} {self.target}."
        for tag in tags:
            if tag is None:
                return f"a tag in {self.target!r} is missing."
            if self.labels is not None and self.label_number(tag) is None:
                return unknown_label_problem(tag, self.labels)
        return None

    def learn_labels(self, rows: Dataset, source: str) -> None:
        if self.labels is None:
            found = distinct_labels(rows[self.target], source)
            if len(found) < 2:
                raise DataError(f"{source}: all tokens have the same tag, {found}: there is nothing to learn.")
            # Every entity type gets both tags, B- and I-, even if only one of them is in the training rows.
            names = {str(tag)[2:] for tag in found if str(tag)[:2] in ("B-", "I-")}
            self.labels = sort_labels(found | {f"{part}-{name}" for name in names for part in "BI"})
        self.learn_weights(rows)

    def model_kwargs(self) -> dict[str, Any]:
        return label_config(self.labels)

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        encoded = self.tokenizer(
            [" ".join(tokens) for tokens in rows["tokens"]],
            truncation=True,
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        # The token of each character of a row; -1 for the spaces between tokens.
        token_of_character = [
            [number for i, token in enumerate(tokens) for number in [i] * len(token) + [-1]]
            for tokens in rows["tokens"]
        ]
        # For each piece the token whose first piece it is, or -1. A token is tagged in the first window that has it.
        firsts: list[list[int]] = []
        last_token: dict[int, int] = {}  # of each row, in its windows so far
        for owner, spans in zip(owners, offsets, strict=True):
            last, first = last_token.get(owner, -1), []
            for start, end in spans:
                # Special tokens have no characters. The last character counts: a piece can start with a space.
                number = token_of_character[owner][end - 1] if end > start else -1
                first.append(number if number > last else -1)
                last = max(last, number)
            last_token[owner] = last
            firsts.append(first)
        result = {**encoded, "first_piece_of": firsts, "row": [indices[owner] for owner in owners]}
        if with_targets:
            assert self.labels is not None
            result["labels"] = [
                [-100 if number < 0 else self.label_number(rows[self.target][owner][number]) for number in first]
                for first, owner in zip(firsts, owners, strict=True)
            ]
        return result

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        best = (output or model(**batch)).logits.argmax(-1)
        kept = batch["attention_mask"].bool()
        return [row[mask].tolist() for row, mask in zip(best, kept, strict=True)]

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        assert self.labels is not None
        # A token without pieces, such as a single control character, gets a default tag.
        tags = ["O" if "O" in self.labels else self.labels[0]] * len(row["tokens"])
        for feature, record in zip(features, records, strict=True):
            for number, best in zip(feature["first_piece_of"], record, strict=True):
                if number >= 0:
                    tags[number] = self.labels[best]
        return {"prediction": tags}

    def constant_answers(self, rows: Sequence[Row]) -> list[Row]:
        ((tag, _),) = Counter(tag for row in rows for tag in row[self.target]).most_common(1)
        return [{"prediction": [tag] * len(row[self.target])} for row in rows]

    @property
    def _has_entities(self) -> bool:
        return any(str(label).startswith("B-") for label in self.labels or ())

    @property
    def default_metric(self) -> str:
        return "f1" if self._has_entities else "accuracy"

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        predictions = [list(map(str, answer["prediction"])) for answer in answers]
        targets = [list(map(str, tags)) for tags in targets]
        flat_true = [tag for tags in targets for tag in tags]
        flat_guess = [tag for tags in predictions for tag in tags]
        result = {"accuracy": float(accuracy_score(flat_true, flat_guess))}
        if self._has_entities:
            for name in ("precision", "recall", "f1"):
                score = getattr(seqeval, f"{name}_score")(targets, predictions, zero_division=0)
                result[name] = float(score)
        else:
            result["f1_macro"] = float(
                f1_score(
                    flat_true, flat_guess, labels=list(map(str, self.labels or ())), average="macro", zero_division=0.0
                )
            )
        return result
