"""Sequence-to-sequence language modeling: translation, summarization, generative question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..settings import TASK_SETTINGS
from .generation import TextGeneration
from .task import Columns, Row, text_problem

if TYPE_CHECKING:
    from torch import Tensor


class Seq2SeqLM(TextGeneration):
    """Generate `target` from `text` with an encoder-decoder.

    The loss is on the tokens of `target` (the tokenizer's `text_target`); the model shifts them to get the decoder's
    inputs. Texts are cut at `max_length` tokens, targets at `max_target_length`.

    A row: `{"text": "a text", "target": "its summary"}`.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"
    columns = {"text": "the input text"}
    target = "target"
    settings = TASK_SETTINGS["seq2seq-lm"]
    rouge = ("rouge1", "rouge2", "rougeL")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.kwargs["max_new_tokens"] is None:
            self.kwargs["max_new_tokens"] = self.kwargs["max_target_length"]
        for name in ("max_target_length", "max_new_tokens", "num_beams"):
            self.integer_setting(name)

    def problem(self, row: Row, with_targets: bool) -> str | None:
        problem = text_problem(row, "text")
        return text_problem(row, self.target) if with_targets and problem is None else problem

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        options = {"truncation": True, "verbose": False}
        encoded = self.tokenizer(rows["text"], max_length=self.max_length, **options)
        result = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "row": indices}
        if with_targets:
            length = self.kwargs["max_target_length"]
            targets = self.tokenizer(text_target=rows[self.target], max_length=length, **options)
            result["labels"] = targets["input_ids"]
        return result

    def collate_labels(self, labels: list[Any], input_ids: Tensor) -> Tensor:
        return pad_sequence([torch.tensor(each) for each in labels], batch_first=True, padding_value=-100)

    def generate_kwargs(self) -> dict[str, Any]:
        return {name: self.kwargs[name] for name in ("max_new_tokens", "num_beams")}
