"""Questions about a text and answers to them, which a model makes itself: the rows of the task `distil`."""

from __future__ import annotations

import copy
import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from ..adapters.start import init_from_text, token_ids
from ..api import PrefixTuningV2Config, get_peft_model
from .data import DataError
from .model import load_base, load_tokenizer
from .outputs import RECIPE
from .recipe import Recipe, RecipeError
from .run import train
from .settings import SelfStudy
from .tasks import TASK_CLASSES

_REQUESTS = (
    "Ask one question about a fact in this passage.",
    "Ask why something in this passage is so, or what follows from it.",
    "Ask for a short summary of a part of the text, and name the part.",
    "Ask for the facts of this passage as a list or a table, and name the form.",
    "Ask how somebody could use what this passage says, in a situation that you describe.",
    "Ask for something imaginative that is based on this passage, such as a dialogue, a rhyme or a quiz.",
)
"""What the model is asked to make, about a passage of the text (Eyuboglu et al. 2025 has five kinds of requests)."""
_PASSAGE = 400
"""Characters of a passage."""


def distil(
    text: str | os.PathLike[str],
    recipe: Recipe,
    settings: SelfStudy | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make questions about a text, and train a prefix on them that stands for the text.

    The questions are in the file `<output_dir>-questions.jsonl`. A call with the same arguments continues an
    interrupted one.

    Args:
        text: The file with the text, in UTF-8.
        recipe: A recipe of the task `distil`; its `data.train` is replaced. It is not changed.
        settings: How the questions are made.
        overwrite: Replace the run in `recipe.output_dir`. The questions are kept.
        quiet: Show no summary and no progress.

    Returns:
        The results of `train`.

    Raises:
        RecipeError: If the recipe is of another task, or see `self_study` and `train`.
        DataError: If the text is empty or no UTF-8, and as `train`.
        OSError: If a file cannot be read or written.

    Example:
        >>> distil("manual.txt", load_recipe("distil", output_dir="runs/manual"), SelfStudy(questions=1000))
    """
    if recipe.task != "distil":
        raise RecipeError(f"`task` must be distil, got {recipe.task}: use the recipe distil (`--config distil`).")
    try:
        contents = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is no text in UTF-8: {error}") from error
    folder = Path(recipe.output_dir)
    recipe = copy.deepcopy(recipe)
    recipe.data.train = str(folder.with_name(f"{folder.name}-questions.jsonl"))
    self_study(contents, recipe.data.train, recipe, settings)
    resume = (folder / RECIPE).is_file() and not overwrite
    return train(recipe, resume=resume, overwrite=overwrite, quiet=quiet)


def self_study(text: str, target: str | os.PathLike[str], recipe: Recipe, settings: SelfStudy | None = None) -> Path:
    """Have a model ask questions about a text and answer them, with the whole text in front.

    A model with a chat template gets messages, another one a plain text with `Question:` and `Answer:`. The rows are
    written batch by batch. If the file is there already, the missing rows are added: each batch has a seed of its
    own, so the rows are the same as without the interruption.

    Args:
        text: The text.
        target: The file to write, JSON lines with `context`, `prompt` and `text`.
        recipe: A recipe with the `model`, its `model_kwargs` and `trust_remote_code`.
        settings: How the rows are made.

    Returns:
        The path of `target`.

    Raises:
        RecipeError: If the model cannot read the text as a prefix, or `target` was made from another text, by another
            model or with other settings.
        DataError: If the text is empty, or `target` is damaged.

    Example:
        >>> self_study(Path("manual.txt").read_text(), "questions.jsonl", load_recipe("distil"), SelfStudy(200))
    """
    settings, target = settings or SelfStudy(), Path(target)
    if not text.strip():
        raise DataError("The text is empty.")
    dialog = _Dialog(load_tokenizer(recipe), text.strip())
    made_by = {"model": recipe.model, **asdict(settings)}
    del made_by["questions"]  # there can be more of them later
    done = _resume(target, dialog.context, made_by)
    if done >= settings.questions:
        return target
    writer = _Writer(recipe, dialog, settings)
    size = settings.batch_size
    with (
        target.open("a", encoding="utf-8") as file,
        tqdm(total=settings.questions, initial=done, desc="Questions", disable=None) as bar,
    ):
        for batch in range(done // size, -(-settings.questions // size)):
            for number, row in enumerate(writer.make(batch), start=batch * size):
                if row is not None and done <= number < settings.questions:
                    line = {"context": dialog.context, **row, "number": number, "made_by": made_by}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(size)
    return target


def _resume(target: Path, context: str, made_by: dict[str, Any]) -> int:
    """The number of the first question that a file lacks. Half a line at the end of the file is removed.

    Raises:
        RecipeError: If the file was made from another text, by another model or with other settings.
        DataError: If a line is damaged.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return 0
    done, end = 0, 0
    for count, line in enumerate(target.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            row = json.loads(line)
            done = row["number"] + 1
            same = row["context"] == context and row["made_by"] == made_by
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{target}, row {count} is damaged: remove the file, and the questions are made anew."
            ) from error
        if not same:
            raise RecipeError(
                f"{target} has questions that were made from another text, by another model or with other settings. "
                "Choose another `output_dir`, or remove the file."
            )
    os.truncate(target, end)
    return int(done)


class _Dialog:
    """The form of questions and answers: the chat template of a tokenizer, or a plain text if it has none.

    Args:
        tokenizer: The tokenizer.
        text: The text that the questions are about. In a chat it is the system message.

    Attributes:
        context: What stands in front of each question.
    """

    def __init__(self, tokenizer: Any, text: str):
        self._tokenizer, self._text, self.is_chat = tokenizer, text, bool(tokenizer.chat_template)
        self.context = f"{text}\n\n"
        if self.is_chat:
            one, other = self._render("a"), self._render("b")
            try:
                alone = str(tokenizer.apply_chat_template([self._system], tokenize=False))
            except TemplateError:
                alone = ""
            if not alone or not one.startswith(alone):  # some templates put the system message into the user's
                alone = one[: next(i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1)]
            self.context = alone

    def prompt(self, question: str) -> str:
        """The text of a question, up to its answer."""
        if not self.is_chat:
            return f"Question: {question}\nAnswer:"
        return self._render(question)[len(self.context) :]

    @property
    def _system(self) -> dict[str, str]:
        return {"role": "system", "content": self._text}

    def _render(self, question: str) -> str:
        messages = [self._system, {"role": "user", "content": question}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class _Writer:
    """A model that reads a text and writes questions and answers.

    The keys and values of the text are a prefix: the model answers as with the text in front.

    Args:
        recipe: The recipe with the model.
        dialog: The form of questions, with the text.
        settings: How the rows are made.

    Raises:
        RecipeError: If the model cannot be loaded, or its keys and values of the text are no prefix.
    """

    def __init__(self, recipe: Recipe, dialog: _Dialog, settings: SelfStudy):
        self._tokenizer: Any = load_tokenizer(recipe)
        base: Any
        base, _ = load_base(recipe, TASK_CLASSES[recipe.task](recipe, self._tokenizer))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision or "no")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dialog, self._settings = dialog, settings
        ids = token_ids(dialog.context, self._tokenizer)
        config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=len(ids), shift_positions=True)
        self._model: Any = get_peft_model(base.to(self._device, dtype), config).eval()
        try:
            init_from_text(self._model, ids)
        except ValueError as error:
            raise RecipeError(f"`model`: {recipe.model} cannot read the text as a prefix: {error}") from error

    def make(self, batch: int) -> list[dict[str, str] | None]:
        """Make the rows of a batch; `None` for one whose question or answer is empty."""
        settings, text = self._settings, self._dialog.context
        draw = random.Random(f"{settings.seed} {batch}")
        requests = []
        for _ in range(settings.batch_size):
            start = draw.randrange(max(len(text) - _PASSAGE, 1))
            passage = text[start : start + _PASSAGE].partition(" ")[2].strip()
            requests.append(f"{draw.choice(_REQUESTS)} Write the question alone.\n\nPassage: {passage}")
        with torch.random.fork_rng():
            torch.manual_seed(draw.getrandbits(63))
            questions = self._generate([self._dialog.prompt(each) for each in requests], settings.question_tokens)
            prompts = [self._dialog.prompt(question) for question in questions]
            answers = self._generate(prompts, settings.answer_tokens)
        return [
            {"prompt": prompt, "text": answer} if question and answer else None
            for question, prompt, answer in zip(questions, prompts, answers, strict=True)
        ]

    @torch.no_grad()
    def _generate(self, prompts: list[str], count: int) -> list[str]:
        inputs = self._tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not self._dialog.is_chat,
        )
        ids = self._model.generate(
            input_ids=inputs["input_ids"].to(self._device),
            attention_mask=inputs["attention_mask"].to(self._device),
            do_sample=True,
            temperature=self._settings.temperature,
            max_new_tokens=count,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        texts = self._tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() if self._dialog.is_chat else text.strip().partition("\n")[0] for text in texts]
