"""Extractive question answering: the passage of a context that answers a question (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import DataError
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .task import Columns, Row, Task, text_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_SMALLEST = {"stride": 0, "max_question_length": 1, "max_answer_length": 1, "n_best": 1}


class QuestionAnswering(Task):
    """Find the passage that answers a question (Rajpurkar et al. 2016; Devlin et al. 2019, sections 4.2 and 4.3).

    A context longer than `max_length` tokens allow is cut into windows that share `stride` tokens. In windows without
    the answer the head is trained to point at [CLS], or at the first token for tokenizers without [CLS]. The
    prediction is the passage with the highest sum of start and end logits in all windows.

    A question without an answer has `answers: {"text": [], "answer_start": []}` (Rajpurkar et al. 2018). If there are
    such training rows, the prediction is an empty text whenever the score of [CLS] (the lowest over all windows)
    exceeds that of the best passage by more than `null_score_threshold`.

    The metrics are those of SQuAD, divided by 100.

    A row: `{"question": "Who?", "context": "It was Ada.", "answers": {"text": ["Ada"], "answer_start": [7]}}`.
    """

    auto_class = "AutoModelForQuestionAnswering"
    # Not QUESTION_ANS: PEFT's model class for it drops `token_type_ids` (peft 0.21), so a BERT would read question and
    # context as one segment, without an error.
    peft_task_type = None
    modules_to_save = ["qa_outputs"]
    columns = {"question": "the question", "context": "the text that contains the answer"}
    target = "answers"
    answer_types = {"start": "int64"}
    settings = TASK_SETTINGS["question-answering"]
    default_max_length = 384
    default_metric = "f1"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name, least in _SMALLEST.items():
            self.integer_setting(name, least)
        threshold = self.kwargs["null_score_threshold"]
        if threshold is not None and not isinstance(threshold, (int, float)):
            raise RecipeError(f"`task_kwargs.null_score_threshold` must be a number, got {threshold!r}.")
        self.question_length = min(self.kwargs["max_question_length"], self.max_length // 2)
        room = self.max_length - self.question_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise RecipeError(f"`max_length`: {self.max_length} tokens leave no room for a context; set a larger one.")
        self.stride = min(self.kwargs["stride"], room // 2)
        self.tokenizer.truncation_side = "right"  # so that the windows are in the order of the text

    def problem(self, row: Row, with_targets: bool) -> str | None:
        for name in self.columns:
            if problem := text_problem(row, name):
                return problem
        return _answers_problem(row[self.target], row["context"]) if with_targets else None

    def learn_labels(self, rows: Dataset, source: str) -> None:
        answered = [bool(answers["text"]) for answers in rows[self.target]]
        if not any(answered):
            raise DataError(f"{source}: no question has an answer, so there is nothing to learn.")
        if not all(answered) and self.kwargs["null_score_threshold"] is None:
            self.kwargs["null_score_threshold"] = self.recipe.task_kwargs["null_score_threshold"] = 0.0

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 2}  # start and end; the checkpoint can have another number

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        encoded = self.tokenizer(
            self._truncated(rows["question"]),
            rows["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        # Start and end of each token in the context, in characters; [-1, -1] for other tokens.
        offsets = [
            [list(span) if part == 1 else [-1, -1] for span, part in zip(own, encoded.sequence_ids(i), strict=True)]
            for i, own in enumerate(encoded.pop("offset_mapping"))
        ]
        result = {**encoded, "offsets": offsets, "row": [indices[owner] for owner in owners]}
        if with_targets:
            result["labels"] = [
                self._label(
                    encoded["input_ids"][i], offsets[i], rows[self.target][owner], *self._extent(i, owners, offsets)
                )
                for i, owner in enumerate(owners)
            ]
        return result

    def _truncated(self, questions: list[str]) -> list[str]:
        """Cut questions to `question_length` tokens, so that the tokenizer then only needs to cut the context."""
        stripped = [question.strip() for question in questions]
        encoded = self.tokenizer(
            stripped,
            add_special_tokens=False,
            truncation=True,
            max_length=self.question_length,
            return_offsets_mapping=True,
        )
        return [
            question[: offsets[-1][1] if offsets else 0]
            for question, offsets in zip(stripped, encoded["offset_mapping"], strict=True)
        ]

    def _extent(self, i: int, owners: list[int], offsets: list[list[list[int]]]) -> tuple[float, float]:
        """Start and end of the part of the context in window `i`, in characters.

        The first window starts at 0 and the last one has no end: the tokenizer can drop characters there.
        """
        own = [span for span in offsets[i] if span[0] >= 0]
        is_first = i == 0 or owners[i - 1] != owners[i]
        is_last = i + 1 == len(owners) or owners[i + 1] != owners[i]
        return 0 if is_first else own[0][0], math.inf if is_last else own[-1][1]

    def _label(self, ids: list[int], offsets: list[list[int]], answers: Row, since: float, until: float) -> list[int]:
        """The first and last token of the first answer within characters `since` to `until`, or twice [CLS]."""
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
            inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > begin]
            if inside and since <= begin and end <= until:
                return [inside[0], inside[-1]]
        return [self._no_answer(ids)] * 2

    def _no_answer(self, ids: list[int]) -> int:
        """The token that stands for no answer."""
        token = self.tokenizer.cls_token_id
        return ids.index(token) if token in ids else 0

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        batch = super().collate(features)
        if "labels" in batch:
            batch["labels"] += batch["attention_mask"].argmax(1, keepdim=True)  # the length of padding on the left
        return batch

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(**inputs)
        # The model's own loss includes padding in the softmax, so it depends on the other rows of the batch.
        logits = torch.stack([output.start_logits, output.end_logits], 2).float()  # [batch, tokens, 2]
        logits = logits.masked_fill(batch["attention_mask"][:, :, None] == 0, -math.inf)
        return F.cross_entropy(logits, batch["labels"]), output

    def outputs(self, model: PreTrainedModel, batch: dict[str, Tensor], output: Any | None) -> list[Any]:
        output = output or model(**batch)
        logits = torch.stack([output.start_logits, output.end_logits], 1).float().cpu()
        return [own[:, mask] for own, mask in zip(logits, batch["attention_mask"].bool().cpu(), strict=True)]

    def answer(self, row: Row, features: list[Row], records: list[Any]) -> Row:
        passages: dict[tuple[int, int], float] = {}
        null_score = math.inf
        for feature, logits in zip(features, records, strict=True):
            null_score = min(null_score, logits[:, self._no_answer(feature["input_ids"])].sum().item())
            for begin, end, score in self._passages(torch.tensor(feature["offsets"]), logits):
                text = row["context"][begin:end]  # with spaces that belong to its first or last token
                span = begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
                if span[0] < span[1]:
                    passages[span] = max(score, passages.get(span, -math.inf))
        ranking = sorted(passages.items(), key=lambda each: -each[1])[: self.kwargs["n_best"]]
        if not ranking:  # the context has no tokens
            return {"prediction": "", "start": None, "score": 1.0}
        threshold, chosen, more = self.kwargs["null_score_threshold"], 0, {}
        if threshold is not None:
            more["null_score_difference"] = null_score - ranking[0][1]
            ranking.append(((0, 0), null_score))
            chosen = -1 if more["null_score_difference"] > threshold else 0
        shares = torch.tensor([score for _, score in ranking]).softmax(0)
        begin, end = ranking[chosen][0]
        start = begin if begin < end else None
        return {"prediction": row["context"][begin:end], "start": start, "score": shares[chosen].item(), **more}

    def _passages(self, offsets: Tensor, logits: Tensor) -> Iterator[tuple[int, int, float]]:
        """The best passages of a window.

        Args:
            offsets: Start and end of each token in the context, in characters, `[tokens, 2]`.
            logits: Start and end logits, `[2, tokens]`.

        Yields:
            Start and end of a passage in the context, in characters, and its score.
        """
        longest = self.kwargs["max_answer_length"]
        starts, ends = logits.masked_fill(offsets[:, 0] < 0, -math.inf)
        # [tokens, longest]: element [i, k] is the score of the passage from token i to token i + k.
        scores = starts[:, None] + F.pad(ends, (0, longest - 1), value=-math.inf).unfold(0, longest, 1)
        best = scores.flatten().topk(min(self.kwargs["n_best"], scores.numel()))
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if score > -math.inf:
                first, more = divmod(index, longest)
                yield int(offsets[first, 0]), int(offsets[first + more, 1]), score

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        predictions = [answer["prediction"] for answer in answers]
        result = _squad(predictions, targets)
        parts = {"has_answer": [bool(each["text"]) for each in targets]}
        parts["no_answer"] = [not each for each in parts["has_answer"]]
        if all(map(any, parts.values())):
            for part, chosen in parts.items():
                own = [(guess, true) for guess, true, mine in zip(predictions, targets, chosen, strict=True) if mine]
                result |= {f"{part}_{name}": value for name, value in _squad(*zip(*own, strict=True)).items()}
        return result


def _squad(predictions: Sequence[str], targets: Sequence[Any]) -> dict[str, float]:
    """Exact match and F1; case, punctuation and articles are ignored. The empty text stands for no answer."""
    from torchmetrics.functional.text import squad  # it takes two seconds

    scores = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [{"answers": {"text": each["text"] or [""]}, "id": str(i)} for i, each in enumerate(targets)],
    )
    return {name: float(value) / 100 for name, value in scores.items()}


def _answers_problem(answers: Any, context: str) -> str | None:
    keys = ("text", "answer_start")
    if not isinstance(answers, dict) or not all(isinstance(answers.get(key), list) for key in keys):
        return f"'answers' must be {{'text': [...], 'answer_start': [...]}}, got {answers!r}."
    if len(answers["text"]) != len(answers["answer_start"]):
        return f"'answers' has {len(answers['text'])} texts and {len(answers['answer_start'])} starts."
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not isinstance(text, str) or not text.strip():
            return f"an answer must be a text, got {text!r}. Use empty lists for a question without an answer."
        if not isinstance(start, int):
            return f"'answer_start' must be an integer, got {start!r}."
        if start < 0 or not context.startswith(text, start):
            place = context.find(text)
            where = f"it begins at character {place}" if place >= 0 else "the context does not contain it"
            return f"the answer {text!r} is not in the context at 'answer_start' {start}; {where}."
    return None
