"""Causal language modeling: texts, or completions of prompts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .generation import TextGeneration
from .task import Columns, Row, text_problem

if TYPE_CHECKING:
    from torch import Tensor


class CausalLM(TextGeneration):
    """Train on `text`, after `prompt` if a row has one. The column of the text may also be called `completion`.

    The loss is on the tokens of `text` and on an end-of-sequence token after it, not on the prompt. Prompt and text
    are tokenized separately, so that generation starts from the same tokens as training. Nothing is inserted between
    them: one of them must contain the space or the line break.

    If prompt and text together are longer than `max_length`, the prompt is cut at its beginning (after a
    beginning-of-sequence token), and then the text at its end. A text without a prompt that is longer than
    `max_length` is cut into blocks, and all blocks are used.

    With `packing`, texts without prompts are joined, each with its end-of-sequence token, and cut into blocks of
    `max_length` tokens, so that there is no padding (GPT-3, Brown et al. 2020, appendix B). There is no mask between
    the texts of a block. 1,000 texts are joined at a time, and the last block of these is shorter. Evaluation does not
    pack.

    The prediction is the text generated after `prompt`. Only the last `max_length - max_new_tokens` tokens of the
    prompt are used.

    A row: `{"prompt": "a question\\n", "text": "the answer"}`.

    Raises:
        RecipeError: As for `Task`, and if the tokenizer has no end-of-sequence token.
    """

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    columns = {}
    optional_columns = {"prompt": "the text before `text`, not in the loss; predictions need it"}
    target = "text"
    settings = TASK_SETTINGS["causal-lm"]
    rouge = ("rougeL",)
    lower_is_better = ("loss", "perplexity")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.tokenizer.eos_token_id is None:
            raise RecipeError(f"`model`: the tokenizer of {self.recipe.model} has no end-of-sequence token.")
        self.answers_with_labels = not self.kwargs["generate"]  # without `generate` there are no predictions
        if self.kwargs["max_new_tokens"] is None:
            self.kwargs["max_new_tokens"] = max(min(64, self.max_length // 2), 1)
        if self.integer_setting("max_new_tokens") >= self.max_length:
            raise RecipeError(
                "`max_length` counts prompt and generated text together, so it must be above "
                f"`task_kwargs.max_new_tokens` ({self.kwargs['max_new_tokens']}), got {self.max_length}."
            )

    def target_column(self, names: Collection[str]) -> str:
        return "completion" if "text" not in names and "completion" in names else "text"

    def problem(self, row: Row, with_targets: bool) -> str | None:
        prompt = row.get("prompt")
        if not isinstance(prompt, (str, type(None))):
            messages = " For conversations, choose the task chat." if isinstance(prompt, list) else ""
            return f"'prompt' must be a text, got {prompt!r}.{messages}"
        if prompt and with_targets and self.kwargs.get("packing"):
            return "the row has a prompt, but `task_kwargs.packing` is for texts without prompts."
        if not (prompt or "").strip() and (self.kwargs["generate"] or not with_targets):
            return "there is no 'prompt' to generate from. If the column has another name, set `data.columns`."
        return text_problem(row, self.target_column(row.keys())) if with_targets else None

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        prompts = self._prompts(rows)
        result: Columns = {"row": [], "input_ids": [], "attention_mask": []}
        if not with_targets:
            for index, (_, prompt) in zip(indices, prompts, strict=True):
                self._add_prompt(result, index, prompt)
            return result
        result["labels"] = []
        for index, (has_prompt, prompt), text in zip(indices, prompts, self._texts(rows), strict=True):
            if has_prompt:
                self._add_completion(result, index, prompt, text)
            else:
                for block in self._blocks(prompt + text):
                    self._add(result, index, block, first_label=0)
        return result

    def training_features(self, rows: Columns, indices: list[int], with_targets: bool = True) -> Columns:
        if not self.kwargs.get("packing"):
            return self.features(rows, indices, with_targets)
        result: Columns = {"row": [], "input_ids": [], "attention_mask": [], "labels": []}
        texts = zip(self._prompts(rows), self._texts(rows), strict=True)
        for block in self._blocks([token for (_, start), text in texts for token in start + text]):
            self._add(result, indices[0], block, first_label=0)
        return result

    def _prompts(self, rows: Columns) -> list[tuple[bool, list[int]]]:
        """For each row whether it has a prompt, and its tokens: without a prompt those that start every text."""
        prompts = rows.get("prompt") or [None] * len(rows[self.target_column(rows.keys())])
        return list(zip(map(bool, prompts), self._tokens([prompt or "" for prompt in prompts]), strict=True))

    def _texts(self, rows: Columns) -> list[list[int]]:
        texts = self._tokens(rows[self.target_column(rows.keys())], add_special_tokens=False)
        return [[*text, self.tokenizer.eos_token_id] for text in texts]

    def _tokens(self, texts: list[str], **options: Any) -> list[list[int]]:
        """The tokens of texts, without an end-of-sequence token that the tokenizer adds."""
        end = [self.tokenizer.eos_token_id]
        found = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return [ids[:-1] if ids[-1:] == end else ids for ids in found]

    def _last_tokens(self, prompt: list[int], count: int) -> list[int]:
        """Cut a prompt to `count` tokens at its beginning, after a beginning-of-sequence token."""
        start = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        return start + prompt[max(len(prompt) - count + len(start), len(start)) :]

    def _blocks(self, ids: list[int]) -> list[list[int]]:
        return [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]

    def _add(self, features: Columns, row: int, ids: list[int], first_label: int | None = None) -> None:
        """Add a feature; with `labels` for the tokens from index `first_label`, if it is not `None`."""
        features["row"].append(row)
        features["input_ids"].append(ids)
        features["attention_mask"].append([1] * len(ids))
        if first_label is not None:
            first = max(first_label, 1)  # no token precedes the first one, so nothing predicts it
            features["labels"].append([-100] * first + ids[first:])

    def _add_prompt(self, features: Columns, row: int, prompt: list[int]) -> None:
        """Add the feature of a prompt to generate from."""
        self._add(features, row, self._last_tokens(prompt, self.max_length - self.kwargs["max_new_tokens"]))

    def _add_completion(self, features: Columns, row: int, prompt: list[int], text: list[int]) -> None:
        """Add the feature of a prompt and the text after it, with labels for the text."""
        prompt = self._last_tokens(prompt, max(self.max_length - len(text), 1))
        self._add(features, row, (prompt + text)[: self.max_length], first_label=len(prompt))

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        # Generation continues at the right end, so padding is on the left. For the loss it is on the right, since
        # models count positions from the left and include padding.
        self.tokenizer.padding_side = "right" if "labels" in features[0] else "left"
        return super().collate(features)

    def generate_kwargs(self) -> dict[str, Any]:
        # The model's generation config can lack the end-of-sequence token that the training texts end with.
        return {"max_new_tokens": self.kwargs["max_new_tokens"], "eos_token_id": self.tokenizer.eos_token_id}

    def generated_tokens(self, sequences: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return sequences[:, batch["input_ids"].shape[1] :]

    @property
    def default_metric(self) -> str:
        return "rougeL" if self.kwargs["generate"] else "loss"

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        return super().metrics(answers, targets) if self.kwargs["generate"] else {}
