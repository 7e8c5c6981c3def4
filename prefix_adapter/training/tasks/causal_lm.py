"""Writing on: a text, or what completes a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .generation import TextGeneration
from .task import Columns, Row

if TYPE_CHECKING:
    from torch import Tensor


class CausalLM(TextGeneration):
    """Learn to write `text`: all by itself, or where there is a `prompt`, after it.

    The loss is on the tokens of `text` and on the end-of-sequence token that is put after it, not on the prompt's.
    Prompt and text are tokenized apart, so that generation starts from the very tokens that training did; nothing is
    put between them, so one of them must have the space or the line break.

    A prompt and a text that are longer than `max_length` together: the prompt loses its beginning (but not a
    beginning-of-sequence token), and only if that is not enough the text loses its end. A text without a prompt that
    is longer than `max_length` is cut into blocks, and nothing of it is lost.

    With `packing`, texts without prompts are joined, each with its end-of-sequence token, and training takes blocks of
    `max_length` tokens of that (as GPT-3, Brown et al. 2020, appendix B): no padding. A text sees those before it in
    its block; there is no mask between them. Texts are joined by the thousand, and the last block of each thousand is
    shorter. Evaluation is on every text for itself.

    A prediction is what is generated after `prompt`, of which the last `max_length - max_new_tokens` tokens are read.

    Raises:
        RecipeError: also if the tokenizer has no end-of-sequence token.
    """

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    columns = {}
    optional_columns = {"prompt": "what stands before the text and is not learnt; predictions need it"}
    target = "text"
    settings = TASK_SETTINGS["causal-lm"]
    rouge = ("rougeL",)
    lower_is_better = ("loss", "perplexity")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.tokenizer.eos_token_id is None:
            raise RecipeError(f"`model`: the tokenizer of {self.recipe.model} has no end-of-sequence token.")
        self.answers_with_labels = not self.kwargs["generate"]  # without it evaluation asks for no answers
        if self.kwargs["max_new_tokens"] is None:
            self.kwargs["max_new_tokens"] = max(min(64, self.max_length // 2), 1)
        if self.at_least_one("max_new_tokens") >= self.max_length:
            raise RecipeError(
                "`max_length` is that of prompt and generated text together: it must be more than "
                f"`task_kwargs.max_new_tokens` ({self.kwargs['max_new_tokens']}), got {self.max_length}."
            )

    def problem(self, row: Row, solved: bool) -> str | None:
        prompt = row.get("prompt")
        if not isinstance(prompt, (str, type(None))):
            return f"'prompt' must be a text, it is {prompt!r}."
        if prompt and solved and self.kwargs["packing"]:
            return "it has a prompt: `task_kwargs.packing` is for texts without."
        if not (prompt or "").strip() and (self.kwargs["generate"] or not solved):
            return "there is no 'prompt' from which to generate. If it is called otherwise, say so: `data.columns`."
        return self.problem_of(row, "text") if solved else None

    def features(self, rows: Columns, indices: list[int], solved: bool) -> Columns:
        prompts = self._prompts(rows)
        result: Columns = {"row": [], "input_ids": [], "attention_mask": []}
        if not solved:
            room = self.max_length - self.kwargs["max_new_tokens"]
            for index, (_, prompt) in zip(indices, prompts, strict=True):
                self._add(result, index, self._last(prompt, room))
            return result
        result["labels"] = []
        for index, (given, prompt), text in zip(indices, prompts, self._texts(rows), strict=True):
            if given:
                prompt = self._last(prompt, max(self.max_length - len(text), 1))
                self._add(result, index, (prompt + text)[: self.max_length], learnt_from=len(prompt))
            else:
                for block in self._blocks(prompt + text):
                    self._add(result, index, block, learnt_from=0)
        return result

    def training_features(self, rows: Columns, indices: list[int], solved: bool = True) -> Columns:
        if not self.kwargs["packing"]:
            return self.features(rows, indices, solved)
        result: Columns = {"row": [], "input_ids": [], "attention_mask": [], "labels": []}
        texts = zip(self._prompts(rows), self._texts(rows), strict=True)
        for block in self._blocks([token for (_, start), text in texts for token in start + text]):
            self._add(result, indices[0], block, learnt_from=0)
        return result

    def _prompts(self, rows: Columns) -> list[tuple[bool, list[int]]]:
        """For each row whether it has a prompt, and its tokens; those without have what every text begins with."""
        prompts = rows.get("prompt") or [None] * len(rows[self.target])
        return list(zip(map(bool, prompts), self._tokens([prompt or "" for prompt in prompts]), strict=True))

    def _texts(self, rows: Columns) -> list[list[int]]:
        texts = self._tokens(rows[self.target], add_special_tokens=False)
        return [[*text, self.tokenizer.eos_token_id] for text in texts]

    def _tokens(self, texts: list[str], **options: Any) -> list[list[int]]:
        """The tokens of texts, without an end-of-sequence token that the tokenizer puts there itself."""
        end = [self.tokenizer.eos_token_id]
        found = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return [ids[:-1] if ids[-1:] == end else ids for ids in found]

    def _last(self, prompt: list[int], count: int) -> list[int]:
        """The last tokens of a prompt; a beginning-of-sequence token stays and is one of them."""
        start = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        return start + prompt[max(len(prompt) - count + len(start), len(start)) :]

    def _blocks(self, ids: list[int]) -> list[list[int]]:
        return [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]

    def _add(self, features: Columns, row: int, ids: list[int], learnt_from: int | None = None) -> None:
        features["row"].append(row)
        features["input_ids"].append(ids)
        features["attention_mask"].append([1] * len(ids))
        if learnt_from is not None:
            # Nothing stands before the first token that it could be told from; models shift the labels by one.
            first = max(learnt_from, 1)
            features["labels"].append([-100] * first + ids[first:])

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        # Generation goes on at the right end. Not so the loss: models count positions from the left, padding or not.
        self.tokenizer.padding_side = "right" if "labels" in features[0] else "left"
        return super().collate(features)

    def generation(self) -> dict[str, Any]:
        # Of the model's own tokens to stop at, the one that was trained may be none.
        return {"max_new_tokens": self.kwargs["max_new_tokens"], "eos_token_id": self.tokenizer.eos_token_id}

    def generated(self, sequences: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return sequences[:, batch["input_ids"].shape[1] :]

    @property
    def default_metric(self) -> str:
        return "rougeL" if self.kwargs["generate"] else "loss"

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}

    def metrics(self, answers: list[Row], solutions: list[Any]) -> dict[str, float]:
        return super().metrics(answers, solutions) if self.kwargs["generate"] else {}
