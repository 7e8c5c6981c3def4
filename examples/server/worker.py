"""A base model, its adapters, and the batches that they answer: what runs in the model's process (process.py).

An adapter's folder is a stranger's. Nothing in it chooses code, a model or a path: the weights are safetensors, which
`AdapterPool` checks against the base model, and of `recipe.yaml` only the labels and the kind of problem are read.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from process import Question
from settings import Settings
from torch import nn

from prefix_adapter import AdapterPool, PrefixTuningV2Config

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECIPE)
MAX_TEXT_FILE = 100_000  # bytes of a config or a recipe: Python parses YAML at a few hundred KB a second
SETTLED = 0.05  # seconds: a file system may give two changes within some milliseconds the same time

TASKS = {"classify": "SEQ_CLS", "generate": "CAUSAL_LM"}
AUTO_CLASSES = {
    "classify": transformers.AutoModelForSequenceClassification,
    "generate": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Adapter:
    """What answers need to know of an adapter in memory.

    Attributes:
        stamp: of its files when they were read; `None` for the base model.
        labels: of its head, in the order of the outputs.
        shift: positions that are lost to its prefix.
    """

    stamp: Stamp | None
    labels: list[Any]
    shift: int


@dataclass(frozen=True)
class Row:
    """A question that can be computed: token ids, the adapter's folder for the pool, and the positions there are."""

    question: Question
    folder: str | None
    labels: list[Any]
    input_ids: list[int]
    limit: float


class Refusal(Exception):
    """A question that gets another status than 200, and a sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.answer = {"status": status, "detail": detail}


class Worker:
    """A base model with its adapters.

    Args:
        kind: `"classify"` or `"generate"`.
        model: the base model.
        tokenizer: its tokenizer.
        adapters: the folder whose folders are adapters.
        settings: the server's.
        gone: for each row of a batch, whether nobody waits for its answer any more; set by the server.
    """

    def __init__(
        self,
        kind: str,
        model: Any,
        tokenizer: Any,
        adapters: Path,
        settings: Settings,
        gone: Sequence[int] | None = None,
    ) -> None:
        self.pool = AdapterPool(model, settings.max_bytes, max_virtual_tokens=settings.max_virtual_tokens)
        self.tokenizer, self.settings = tokenizer, settings
        self.kind, self.gone = kind, [0] * settings.max_batch if gone is None else gone
        # Absolute: the pool takes a relative path that does not exist for a name on the Hub.
        self.root = adapters.resolve()
        self.base = Adapter(None, [model.config.id2label[index] for index in range(model.config.num_labels)], 0)
        self.limit = positions_of(model) or tokenizer.model_max_length
        self.adapters: dict[str, Adapter] = {}
        self.refused: dict[str, tuple[Stamp, int, str]] = {}

    def ping(self) -> int:
        """The process's id, once the model is in memory."""
        return os.getpid()

    def loaded(self) -> dict[str, int]:
        """The adapters in memory, and their bytes."""
        return {Path(key).name: found.num_bytes for key, found in self.pool.loaded.items()}

    # ---- Adapters

    def find(self, name: str) -> Adapter:
        """An adapter that is in memory and is what its folder holds now.

        Raises:
            Refusal: if there is none, or it cannot be used. It is tried again when its files have changed.
        """
        folder = self.root / name
        stamp = stamp_of(folder)
        in_memory = str(folder) in self.pool.loaded
        if in_memory and self.adapters[name].stamp == stamp:
            self.pool.load(folder)  # so that it is not the first to be dropped
            return self.adapters[name]
        if in_memory:
            self.pool.remove(folder)
        if stamp.files[0] is None:
            raise Refusal(404, f"There is no adapter {name!r}; GET /adapters lists them.")
        if name not in self.refused or self.refused[name][0] != stamp:
            self.refused.pop(name, None)
            time.sleep(max(0.0, min(SETTLED, stamp.newest + SETTLED - time.time())))
            try:
                self.adapters[name] = self.load(folder, stamp)
            except (OSError, MemoryError) as error:
                self.refused[name] = stamp, 503, f"Adapter {name!r} cannot be loaded now: {self.say(error)}"
            except BaseException as error:  # a panic of a library in Rust is no Exception
                self.refused[name] = stamp, 422, f"Adapter {name!r} cannot be used: {self.say(error)}"
            if stamp_of(folder) != stamp:
                self.refused[name] = stamp, 503, f"Adapter {name!r} is being written; ask again."
        if name in self.refused:
            if str(folder) in self.pool.loaded:
                self.pool.remove(folder)
            _, status, detail = self.refused[name]
            if status == 503:  # the next request tries again, whether the files have changed or not
                del self.refused[name]
            raise Refusal(status, detail)
        return self.adapters[name]

    def load(self, folder: Path, stamp: Stamp) -> Adapter:
        """Have an adapter in memory.

        Raises:
            Exception: if it cannot be; it may be in the pool all the same.
        """
        for name in FILES:
            path = (folder / name).resolve()
            if not path.is_relative_to(self.root):
                raise ValueError(f"its {name} is a link that leads out of the folder of adapters.")
            if path.exists() and not path.is_file():
                raise ValueError(f"its {name} is not a file.")
            if name != SAFETENSORS_WEIGHTS_NAME and path.exists() and path.stat().st_size > MAX_TEXT_FILE:
                raise ValueError(f"its {name} has more than {MAX_TEXT_FILE:,} bytes.")
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, PrefixTuningV2Config):
            raise ValueError("it is of another method.")
        # All adapters of a pool are for one task, and the first would decide for which.
        if config.task_type != TASKS[self.kind]:
            raise ValueError(f"it is for the task {config.task_type}, and not for {TASKS[self.kind]}.")
        shift = config.num_virtual_tokens if config.shift_positions else 0
        if self.kind == "generate":
            self.pool.load(folder)
            return Adapter(stamp, [], shift)
        labels = read_labels(folder / RECIPE)
        return Adapter(stamp, self.labels_of_head(self.pool.load(folder).num_labels, labels), shift)

    def labels_of_head(self, size: int | None, labels: list[Any] | None) -> list[Any]:
        """The labels of an adapter's head: the recipe's, or the base model's, or the numbers of the outputs.

        Args:
            size: outputs of the adapter's own head; `None` if it has the base model's.
            labels: the recipe's, if there are any.

        Raises:
            ValueError: if the recipe's are not as many as the head's outputs.
        """
        count = len(self.base.labels) if size is None else size
        if labels is not None and len(labels) != count:
            raise ValueError(f"its {RECIPE} has {len(labels)} labels, and its head {count} outputs.")
        return labels or (self.base.labels if size is None else list(range(count)))

    def say(self, error: BaseException) -> str:
        """An error for a stranger: short, and without the paths of this machine."""
        words = str(error) or type(error).__name__
        return words.replace(f"{self.root}{os.sep}", "")[:500]

    # ---- Batches

    def answer(self, batch: list[Question]) -> list[dict[str, Any]]:
        """An answer for each question; one with a `status` and a `detail` where something is wrong."""
        try:
            # Once for each adapter, so that all rows of a batch mean the same version of it.
            found = {name: self.try_to_find(name) for name in dict.fromkeys(each.adapter for each in batch)}
            prepared = [self.prepare(each, found[each.adapter]) for each in batch]
            rows = [row for row in prepared if isinstance(row, Row)]
            if len(batch) == 1 or self.fit_together(rows):
                compute = self.classify if self.kind == "classify" else self.generate
                computed = iter(compute(rows) if rows else [])
                return [next(computed) if isinstance(row, Row) else row for row in prepared]
        except BaseException as error:  # a panic of a library in Rust is no Exception
            log.error("The model failed on a batch of %d: %s", len(batch), error, exc_info=error)
            if len(batch) == 1:
                return [{"status": 500, "detail": "The model failed on this request; see the server's log."}]
        middle = len(batch) // 2  # the rows do not fit together, or one of them is to blame
        return self.answer(batch[:middle]) + self.answer(batch[middle:])

    def fit_together(self, rows: list[Row]) -> bool:
        """Whether each row has the positions that the longest ones need, and all adapters fit into memory."""
        width = max((len(row.input_ids) for row in rows), default=0)
        width += max((row.question.max_new_tokens for row in rows), default=0)
        loaded = {None, *self.pool.loaded}
        return all(width <= row.limit and row.folder in loaded for row in rows)

    def try_to_find(self, name: str | None) -> Adapter | Refusal:
        """`find`, which also knows the base model, with what it raises as a value."""
        if name is None:
            return self.base
        try:
            return self.find(name)
        except Refusal as error:
            return error

    def prepare(self, question: Question, adapter: Adapter | Refusal) -> Row | dict[str, Any]:
        """A row of a batch, or the answer to a question that is refused."""
        if isinstance(adapter, Refusal):
            return adapter.answer
        if self.kind == "classify" and len(adapter.labels) < 2:
            return Refusal(422, "The head has one output, a number; this server answers with labels.").answer
        input_ids = self.tokenizer(question.text, verbose=False)["input_ids"]
        limit = self.limit - adapter.shift
        if not input_ids or len(input_ids) + question.max_new_tokens > limit:
            moved = f"; its prefix takes {adapter.shift} of its positions" if adapter.shift else ""
            return Refusal(
                422,
                f"The text has {len(input_ids)} tokens, and {question.max_new_tokens} new ones are asked for. The "
                f"model takes 1 to {limit} in all{moved}.",
            ).answer
        folder = None if question.adapter is None else str(self.root / question.adapter)
        return Row(question, folder, adapter.labels, input_ids, limit)

    def classify(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Label and probability."""
        inputs = self.tokenizer.pad({"input_ids": [row.input_ids for row in rows]}, return_tensors="pt")
        logits = self.pool([row.folder for row in rows], **inputs.to(self.pool.model.device)).logits
        answers = []
        for row, scores in zip(rows, logits.float().cpu(), strict=True):
            # Behind the outputs of a row's own head there is padding, if another row has a larger head.
            probabilities = scores[: len(row.labels)].softmax(-1).tolist()
            best = max(range(len(row.labels)), key=probabilities.__getitem__)
            if not math.isfinite(probabilities[best]):
                raise ValueError(f"{row.folder}: the logits are not finite.")
            answers.append({"label": row.labels[best], "probability": probabilities[best]})
        return answers

    def generate(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The greedy continuation."""
        ids = {"input_ids": [row.input_ids for row in rows]}
        inputs = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self.pool.model.device)
        width = inputs["input_ids"].shape[1]

        def finished(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            count = tokens.shape[1] - width
            over = [count >= row.question.max_new_tokens or bool(self.gone[row.question.row]) for row in rows]
            return torch.tensor(over, device=tokens.device)

        tokens = self.pool.generate(
            [row.folder for row in rows],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max(row.question.max_new_tokens for row in rows),
            stopping_criteria=transformers.StoppingCriteriaList([finished]),
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [
            {"text": self.tokenizer.decode(new[: row.question.max_new_tokens], skip_special_tokens=True)}
            for row, new in zip(rows, tokens[:, width:], strict=True)
        ]


# ---- An adapter's folder


@dataclass(frozen=True)
class Stamp:
    """What tells whether the files of an adapter have changed.

    Attributes:
        files: for each of `FILES` its identity, size and times; `None` where there is none.
        newest: the last change.
    """

    files: tuple[tuple[int, ...] | None, ...]
    newest: float


def stamp_of(folder: Path) -> Stamp:
    """The stamp of an adapter's folder."""
    stats = []
    for name in FILES:
        try:
            stats.append(os.stat(folder / name))
        except OSError:
            stats.append(None)
    files = (each and (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in stats)
    return Stamp(tuple(files), max((each.st_ctime for each in stats if each), default=0.0))


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a small file with them can stand for billions of items."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read_labels(path: Path) -> list[Any] | None:
    """The labels that an adapter was trained with, if its folder has the recipe and the recipe has labels.

    Raises:
        ValueError: if the recipe cannot be read, or the adapter was not trained to answer with one of several labels.
    """
    if not path.is_file():
        return None
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"its {RECIPE} cannot be read: {error}") from error
    recipe = recipe if isinstance(recipe, dict) else {}
    options = recipe.get("task_kwargs")
    kind = options.get("problem_type") if isinstance(options, dict) else None
    if kind not in (None, "single_label_classification"):
        raise ValueError("it was not trained to answer with one of several labels, as this server does.")
    labels = recipe.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(is_label(label) for label in labels):
        raise ValueError(f"the labels in its {RECIPE} must be a list of short texts or of integers.")
    return labels


def is_label(value: Any) -> bool:
    """Whether a value is a label that can be put into JSON."""
    if isinstance(value, str):
        return len(value) <= 1000 and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


# ---- The base model


def make_worker(kind: str, name: str, adapters: Path, settings: Settings, gone: Sequence[int]) -> Worker:
    """A worker with the base model of a name, on the GPU if there is one."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = AUTO_CLASSES[kind].from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    return Worker(kind, model, load_tokenizer(name), adapters, settings, gone)


def load_tokenizer(name: str) -> Any:
    """A tokenizer that can pad."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model takes, if its config says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1  # RoBERTa's positions start behind that of padding
    return limit
