"""Chat: conversations in the tokenizer's chat template."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .causal_lm import CausalLM
from .task import Columns, Row

Messages = list[dict[str, Any]]
_ANSWERS = "assistant"
"""The role of the messages to learn."""


class Chat(CausalLM):
    """Train on the assistant's messages of conversations, each after everything that stands before it.

    The tokenizer's chat template renders the conversation. The loss is on the tokens of all answers, each with the
    special token that ends it, and on nothing else. The beginning of an answer (`<|im_start|>assistant`) is not in the
    loss, because generation starts after it.

    A conversation is one feature if it fits into `max_length` and the template renders its beginning in the same way
    as without the rest (some templates leave out the reasoning in earlier answers, for example). Otherwise each answer
    is a feature of its own, after the conversation before it, which is cut at its beginning.

    The prediction is the answer generated after the last message that is not an answer. Only the last
    `max_length - max_new_tokens` tokens before it are used.

    A row: `{"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "the answer"}]}`.

    Raises:
        RecipeError: As for `CausalLM`, and if the tokenizer has no chat template, or one that ends answers without a
            special token.
    """

    columns = {"messages": "the conversation: a list of messages with `role` and `content`"}
    optional_columns = {}
    target = "messages"
    settings = TASK_SETTINGS["chat"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not self.tokenizer.chat_template:
            raise RecipeError(
                f"`model`: the tokenizer of {self.recipe.model} has no chat template. Choose a model that was trained "
                "for chat, or use the task causal-lm, whose prompts are used as they are."
            )
        known = self.tokenizer.added_tokens_decoder
        if not (self._end in known and known[self._end].special):
            raise RecipeError(
                f"`model`: the chat template of {self.recipe.model} ends an answer with "
                f"{self.tokenizer.decode([self._end])!r}, which is no special token, so generation would not stop."
            )

    @cached_property
    def _end(self) -> int:
        """The token with which the template ends an answer."""
        messages = [{"role": "user", "content": "x"}, {"role": _ANSWERS, "content": "x"}]
        return self._tokenize(self._answers(messages)[0][1])[-1]

    def problem(self, row: Row, with_targets: bool) -> str | None:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return f"'messages' must be a list of messages with 'role' and 'content', got {messages!r}."
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                return f"message {number} must have a text 'role' and a text 'content', got {message!r}."
        messages = _without_missing(messages)
        if with_targets and messages[-1]["role"] != _ANSWERS:
            return f"the last message must be of {_ANSWERS!r}, got {messages[-1]['role']!r}."
        if not _question(messages):
            return f"there is no message before the last one of {_ANSWERS!r}."
        try:
            self._answers(messages)
            self._render(_question(messages), add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            return f"the chat template of {self.recipe.model} does not take the conversation: {error}"
        return None

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        result: Columns = {"row": [], "input_ids": [], "attention_mask": []}
        conversations = [_without_missing(messages) for messages in rows["messages"]]
        if not with_targets:
            for index, messages in zip(indices, conversations, strict=True):
                prompt = self._render(_question(messages), add_generation_prompt=True)
                self._add_prompt(result, index, self._tokenize(prompt))
            return result
        result["labels"] = []
        for index, messages in zip(indices, conversations, strict=True):
            answers = self._answers(messages)
            ids, labels = self._whole(answers)
            if 0 < len(ids) <= self.max_length:
                self._add(result, index, ids)
                result["labels"].append(labels)
                continue
            for before, answer in answers:
                self._add_completion(result, index, self._tokenize(before), self._tokenize(answer))
        return result

    def training_features(self, rows: Columns, indices: list[int], with_targets: bool = True) -> Columns:
        return self.features(rows, indices, with_targets)

    def _answers(self, messages: Messages) -> list[tuple[str, str]]:
        """The text before each answer, and the text of the answer up to the token that ends it.

        Raises:
            ValueError: If an answer does not begin where generation would begin.
        """
        found = []
        for number, message in enumerate(messages):
            if message["role"] == _ANSWERS:
                before = self._render(messages[:number], add_generation_prompt=True)
                after = self._render(messages[: number + 1], add_generation_prompt=False)
                if not after.startswith(before):
                    raise ValueError(
                        f"message {number + 1} does not begin where generation would begin, after {before[-30:]!r}"
                    )
                found.append((before, after[len(before) :].rstrip()))
        return found

    def _whole(self, answers: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens and labels of a conversation; empty if its beginning is rendered differently without the rest."""
        ids: list[int] = []
        labels: list[int] = []
        text = ""
        for before, answer in answers:
            if not before.startswith(text):
                return [], []
            between, own = self._tokenize(before[len(text) :]), self._tokenize(answer)
            ids += between + own
            labels += [-100] * len(between) + own
            text = before + answer
        return ids, labels

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        template = self.tokenizer.apply_chat_template
        return str(template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _tokenize(self, text: str) -> list[int]:
        # The template has written the special tokens.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def generate_kwargs(self) -> dict[str, Any]:
        return {**super().generate_kwargs(), "eos_token_id": sorted({self.tokenizer.eos_token_id, self._end})}

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        return super().metrics(answers, [messages[-1]["content"] for messages in targets])


def _question(messages: Messages) -> Messages:
    """The messages before the answer at the end, if there is one."""
    return messages[:-1] if messages[-1]["role"] == _ANSWERS else messages


def _without_missing(messages: Messages) -> Messages:
    """The messages without keys that only messages of other rows have: Arrow adds them to all."""
    return [{key: value for key, value in each.items() if value is not None} for each in messages]
