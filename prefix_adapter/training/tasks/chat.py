"""Chat: conversations in the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ..data import rows_of
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .causal_lm import CausalLM
from .task import Columns, Row

Messages = list[dict[str, Any]]
_ANSWERS, _QUESTIONS = "assistant", "user"
"""The role of the messages to learn, and that of a prompt that is a text."""


class _Conversation(NamedTuple):
    """A row.

    Attributes:
        messages: All messages.
        start: The number of messages at the beginning that are not learned.
        tools: The functions that the model may call, as JSON schemas.
    """

    messages: Messages
    start: int = 0
    tools: list[Any] | None = None


class Chat(CausalLM):
    """Train on the assistant's messages of conversations, each after everything that stands before it.

    The tokenizer's chat template renders the conversation. The loss is on the tokens of all answers, each with the
    special token that ends it, and on nothing else. The beginning of an answer (`<|im_start|>assistant`) is not in the
    loss, because generation starts after it.

    A conversation may also be given as `prompt` and `completion`. Then only the answers in `completion` are in the
    loss. Each of the two columns has a list of messages, or a text: a prompt of one message of the user, a completion
    of one answer.

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
    optional_columns = {
        "completion": "the answers after `prompt`: a text, or a list of messages",
        "tools": "the functions that the model may call: a list of JSON schemas, or such a list as text",
    }
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
        return self._tokenize(self._answers(_Conversation(messages))[0][1])[-1]

    def input_columns(self, names: Collection[str]) -> dict[str, str]:
        if _has_prompt(names):
            return {"prompt": "the messages before `completion`: a text, or a list of messages"}
        return self.columns

    def target_column(self, names: Collection[str]) -> str:
        return "completion" if _has_prompt(names) else "messages"

    def problem(self, row: Row, with_targets: bool) -> str | None:
        if not _has_prompt(row.keys()):
            names = ["messages"]
        elif with_targets or row.get("completion") is not None:
            names = ["prompt", "completion"]
        else:
            names = ["prompt"]
        for name in names:
            if problem := _messages_problem(name, row[name]):
                return problem
        try:
            conversation = _read(row)
        except ValueError as error:
            return f"'tools' must be a list of mappings, or such a list as JSON: {error}"
        messages = conversation.messages
        if with_targets and messages[-1]["role"] != _ANSWERS:
            return f"the last message of {names[-1]!r} must be of {_ANSWERS!r}, got {messages[-1]['role']!r}."
        if conversation.start and messages[conversation.start - 1]["role"] == _ANSWERS:
            return f"the last message of 'prompt' must not be of {_ANSWERS!r}: an answer belongs to 'completion'."
        if not _question(messages):
            return f"there is no message before the last one of {_ANSWERS!r}."
        try:
            self._answers(conversation)
            self._render(_question(messages), conversation.tools, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            return f"the chat template of {self.recipe.model} does not take the conversation: {error}"
        return None

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        result: Columns = {"row": [], "input_ids": [], "attention_mask": []}
        conversations = list(map(_read, rows_of(rows)))
        if not with_targets:
            for index, (messages, _, tools) in zip(indices, conversations, strict=True):
                prompt = self._render(_question(messages), tools, add_generation_prompt=True)
                self._add_prompt(result, index, self._tokenize(prompt))
            return result
        result["labels"] = []
        for index, conversation in zip(indices, conversations, strict=True):
            answers = self._answers(conversation)
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

    def _answers(self, conversation: _Conversation) -> list[tuple[str, str]]:
        """The text before each answer to learn, and the text of the answer up to the token that ends it.

        Raises:
            ValueError: If an answer does not begin where generation would begin.
        """
        found = []
        messages, start, tools = conversation
        for number, message in enumerate(messages):
            if number >= start and message["role"] == _ANSWERS:
                before = self._render(messages[:number], tools, add_generation_prompt=True)
                after = self._render(messages[: number + 1], tools, add_generation_prompt=False)
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

    def _render(self, messages: Messages, tools: list[Any] | None, add_generation_prompt: bool) -> str:
        template = self.tokenizer.apply_chat_template
        return str(template(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _tokenize(self, text: str) -> list[int]:
        # The template has written the special tokens.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def generate_kwargs(self) -> dict[str, Any]:
        return {**super().generate_kwargs(), "eos_token_id": sorted({self.tokenizer.eos_token_id, self._end})}

    def metrics(self, answers: list[Row], targets: list[Any]) -> dict[str, float]:
        return super().metrics(answers, [_messages(target, _ANSWERS)[-1].get("content") or "" for target in targets])


def _has_prompt(names: Collection[str]) -> bool:
    """Whether conversations are given as `prompt` and `completion`."""
    return "messages" not in names and "prompt" in names


def _read(row: Row) -> _Conversation:
    """The conversation of a row.

    Raises:
        ValueError: If `tools` is no list of mappings.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise ValueError(f"got {tools!r}")
    tools = _without_missing(tools) if tools else None
    if not _has_prompt(row.keys()):
        return _Conversation(_messages(row["messages"], _QUESTIONS), 0, tools)
    prompt, completion = _messages(row["prompt"], _QUESTIONS), _messages(row.get("completion"), _ANSWERS)
    return _Conversation(prompt + completion, len(prompt), tools)


def _messages(value: Any, role: str) -> Messages:
    """The messages of a valid column; a text is one message of this role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _without_missing(value or [])


def _messages_problem(name: str, value: Any) -> str | None:
    """Describe what is wrong with a column of messages; `None` if it is valid."""
    if isinstance(value, str) and name != "messages":
        return None if value.strip() else f"{name!r} is empty."
    if not isinstance(value, list) or not value:
        text = "" if name == "messages" else "a text or "
        return f"{name!r} must be {text}a list of messages with 'role' and 'content', got {value!r}."
    for number, message in enumerate(value, start=1):
        keys = ("role",) if isinstance(message, dict) and message.get("tool_calls") else ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            return f"message {number} of {name!r} must have a text 'role' and a text 'content', got {message!r}."
    return None


def _question(messages: Messages) -> Messages:
    """The messages before the answer at the end, if there is one."""
    return messages[:-1] if messages[-1]["role"] == _ANSWERS else messages


def _without_missing(value: Any) -> Any:
    """The value without keys that only mappings of other rows have: Arrow adds them to all."""
    if isinstance(value, dict):
        return {key: _without_missing(each) for key, each in value.items() if each is not None}
    return [_without_missing(each) for each in value] if isinstance(value, list) else value
