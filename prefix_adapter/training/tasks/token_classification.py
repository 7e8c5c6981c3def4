"""A tag for every token of a sentence: parts of speech, named entities (BIO), semantic roles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seqeval import metrics as seqeval
from sklearn.metrics import accuracy_score, f1_score

from ..data import DataError
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .sequence_classification import distinct_labels, in_order, label_names, unknown_label
from .task import Columns, Row, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel


class TokenClassification(Task):
    """Tag the tokens of a sentence that is already split up.

    The tokens are put together with spaces, since the pieces of most tokenizers know what begins a word by the space
    before it. The first piece of a token bears its tag, as in BERT (Devlin et al. 2019, section 5.3). A sentence that
    is longer than `max_length` is cut into windows that overlap by `stride` pieces, so that every token gets a tag.
    Tags that begin with `B-` and `I-` are entities, scored as wholes (seqeval); other tags are scored one by one.
    """

    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    columns = {"tokens": "a list of strings"}
    target = "tags"
    settings = TASK_SETTINGS["token-classification"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        special, stride = self.tokenizer.num_special_tokens_to_add(), self.kwargs["stride"]
        if not isinstance(stride, int) or stride < 0:
            raise RecipeError(f"`task_kwargs.stride` must be a whole number of pieces, got {stride!r}.")
        self.stride = min(stride, (self.max_length - special) // 2)
        self.tokenizer.truncation_side = "right"  # windows come in the order of the text

    def problem(self, row: Row, solved: bool) -> str | None:
        tokens = row["tokens"]
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            return f"'tokens' must be a list of strings, it is {tokens!r}."
        if not tokens:
            return "'tokens' is empty."
        if not solved:
            return None
        tags = row[self.target]
        if not isinstance(tags, list) or len(tags) != len(tokens):
            count = len(tags) if isinstance(tags, list) else repr(tags)
            return f"there are {len(tokens)} tokens and {count} {self.target}."
        for tag in tags:
            if tag is None:
                return f"one of {self.target!r} is missing."
            if self.labels is not None and self.label_number(tag) is None:
                return unknown_label(tag, self.labels)
        return None

    def learn_labels(self, rows: Dataset, source: str) -> None:
        if self.labels is not None:
            return
        found = distinct_labels(rows[self.target], source)
        if len(found) < 2:
            raise DataError(f"{source}: all tokens have the same tag, {found}: there is nothing to learn.")
        # Every entity can begin and go on, whether or not the training rows show both.
        names = {str(tag)[2:] for tag in found if str(tag)[:2] in ("B-", "I-")}
        self.labels = in_order(found | {f"{part}-{name}" for name in names for part in "BI"})

    def model_kwargs(self) -> dict[str, Any]:
        return label_names(self.labels)

    def features(self, rows: Columns, indices: list[int], solved: bool) -> Columns:
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
        # For each character the token that it is of, or -1 for the spaces between them.
        words = [
            [word for i, token in enumerate(tokens) for word in [i] * len(token) + [-1]] for tokens in rows["tokens"]
        ]
        # For each piece the token that it is the first piece of, or -1; a token is tagged in the first window with it.
        firsts: list[list[int]] = []
        done: dict[int, int] = {}
        for owner, spans in zip(owners, offsets, strict=True):
            seen, first = done.get(owner, -1), []
            for start, end in spans:
                # A piece may begin with the space before its token. What has no characters is added by the tokenizer.
                word = words[owner][end - 1] if end > start else -1
                first.append(word if word > seen else -1)
                seen = max(seen, word)
            done[owner] = seen
            firsts.append(first)
        result = {**encoded, "first_piece_of": firsts, "row": [indices[owner] for owner in owners]}
        if solved:
            assert self.labels is not None
            result["labels"] = [
                [-100 if word < 0 else self.label_number(rows[self.target][owner][word]) for word in first]
                for first, owner in zip(firsts, owners, strict=True)
            ]
        return result

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        best = (output or model(**batch)).logits.argmax(-1)
        kept = batch["attention_mask"].bool()
        return [row[mask].tolist() for row, mask in zip(best, kept, strict=True)]

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        assert self.labels is not None
        # A token that the tokenizer makes nothing of (a lone control character) has no piece, so no tag.
        tags = ["O" if "O" in self.labels else self.labels[0]] * len(row["tokens"])
        for feature, record in zip(features, records, strict=True):
            for word, best in zip(feature["first_piece_of"], record, strict=True):
                if word >= 0:
                    tags[word] = self.labels[best]
        return {"prediction": tags}

    @property
    def _entities(self) -> bool:
        return any(str(label).startswith("B-") for label in self.labels or ())

    @property
    def default_metric(self) -> str:
        return "f1" if self._entities else "accuracy"

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        predictions = [list(map(str, answer["prediction"])) for answer in answers]
        solutions = [list(map(str, tags)) for tags in solutions]
        flat_true = [tag for tags in solutions for tag in tags]
        flat_guess = [tag for tags in predictions for tag in tags]
        result = {"accuracy": float(accuracy_score(flat_true, flat_guess))}
        if self._entities:
            for name in ("precision", "recall", "f1"):
                score = getattr(seqeval, f"{name}_score")(solutions, predictions, zero_division=0)
                result[name] = float(score)
        else:
            result["f1_macro"] = float(
                f1_score(
                    flat_true, flat_guess, labels=list(map(str, self.labels or ())), average="macro", zero_division=0.0
                )
            )
        return result
