"""The worker in the model's process (process.py): a base model, its adapters, and the batches that they answer.

An adapter's folder is untrusted. Nothing in it can select code, a model or a path. The weights are safetensors, which
`AdapterPool` checks against the base model. Only the labels and the kind of problem are read from `recipe.yaml`.
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
MAX_TEXT_FILE = 100_000  # bytes of a config or a recipe; Python parses only some hundred KB of YAML per second
SETTLED = 0.05  # seconds; a file system may record the same time for two changes within some milliseconds

TASKS = {"classify": "SEQ_CLS", "generate": "CAUSAL_LM"}
AUTO_CLASSES = {
    "classify": transformers.AutoModelForSequenceClassification,
    "generate": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        stamp: The stamp of its files when they were read; `None` for the base model.
        labels: The labels of its head, in the order of the outputs.
        shift: The number of positions that its prefix takes.
    """

    stamp: Stamp | None
    labels: list[Any]
    shift: int


@dataclass(frozen=True)
class Row:
    """A question ready for the model: token ids, the adapter's folder for the pool, and the available positions."""

    question: Question
    folder: str | None
    labels: list[Any]
    input_ids: list[int]
    limit: float


class Rejection(Exception):
    """Raised for a question that is rejected, with a status and a sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.answer = {"status": status, "detail": detail}


class Worker:
    """A base model with its adapters.

    Args:
        kind: `"classify"` or `"generate"`.
        model: The base model.
        tokenizer: Its tokenizer.
        adapters: The folder that contains the folders of the adapters.
        settings: The limits.
        abandoned: For each row of a batch, 1 if no client waits for its answer any more; set by the server.
    """

    def __init__(
        self,
        kind: str,
        model: Any,
        tokenizer: Any,
        adapters: Path,
        settings: Settings,
        abandoned: Sequence[int] | None = None,
    ) -> None:
        self.pool = AdapterPool(model, settings.max_bytes, max_virtual_tokens=settings.max_virtual_tokens)
        self.tokenizer, self.settings = tokenizer, settings
        self.kind, self.abandoned = kind, [0] * settings.max_batch if abandoned is None else abandoned
        # Absolute, because the pool takes a relative path that does not exist as a name on the Hub.
        self.root = adapters.resolve()
        self.base = Adapter(None, [model.config.id2label[index] for index in range(model.config.num_labels)], 0)
        self.limit = positions_of(model) or tokenizer.model_max_length
        self.adapters: dict[str, Adapter] = {}
        self.rejected: dict[str, tuple[Stamp, int, str]] = {}

    def ping(self) -> int:
        """Return the id of the process; it answers once the model is in memory."""
        return os.getpid()

    def loaded(self) -> dict[str, int]:
        """Return the adapters in memory and their bytes."""
        return {Path(key).name: found.num_bytes for key, found in self.pool.loaded.items()}

    # ---- Adapters

    def find(self, name: str) -> Adapter:
        """Return an adapter in memory that equals the current content of its folder; load it if necessary.

        Raises:
            Rejection: If there is none, or it cannot be used. It is tried again when its files have changed.
        """
        folder = self.root / name
        stamp = stamp_of(folder)
        in_memory = str(folder) in self.pool.loaded
        if in_memory and self.adapters[name].stamp == stamp:
            self.pool.load(folder)  # marks it as recently used
            return self.adapters[name]
        if in_memory:
            self.pool.remove(folder)
        if stamp.files[0] is None:
            raise Rejection(404, f"There is no adapter {name!r}; GET /adapters lists them.")
        if name not in self.rejected or self.rejected[name][0] != stamp:
            self.rejected.pop(name, None)
            time.sleep(max(0.0, min(SETTLED, stamp.newest + SETTLED - time.time())))
            try:
                self.adapters[name] = self.load(folder, stamp)
            except (OSError, MemoryError) as error:
                self.rejected[name] = stamp, 503, f"Adapter {name!r} cannot be loaded now: {self.error_text(error)}"
            except BaseException as error:  # a panic in a Rust library is not an Exception
                self.rejected[name] = stamp, 422, f"Adapter {name!r} cannot be used: {self.error_text(error)}"
            if stamp_of(folder) != stamp:
                self.rejected[name] = stamp, 503, f"Adapter {name!r} is being written; retry."
        if name in self.rejected:
            if str(folder) in self.pool.loaded:
                self.pool.remove(folder)
            _, status, detail = self.rejected[name]
            if status == 503:  # the next request tries again, even if the files have not changed
                del self.rejected[name]
            raise Rejection(status, detail)
        return self.adapters[name]

    def load(self, folder: Path, stamp: Stamp) -> Adapter:
        """Load an adapter into memory.

        Raises:
            Exception: If it cannot be used. It may be in the pool nevertheless.
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
            raise ValueError("it is an adapter of another method.")
        # All adapters of a pool have one task. Without this check the first adapter would decide it.
        if config.task_type != TASKS[self.kind]:
            raise ValueError(f"it is for the task {config.task_type}, not for {TASKS[self.kind]}.")
        shift = config.num_virtual_tokens if config.shift_positions else 0
        if self.kind == "generate":
            self.pool.load(folder)
            return Adapter(stamp, [], shift)
        labels = read_labels(folder / RECIPE)
        return Adapter(stamp, self.labels_of_head(self.pool.load(folder).num_labels, labels), shift)

    def labels_of_head(self, size: int | None, labels: list[Any] | None) -> list[Any]:
        """Return the labels of an adapter's head: those of the recipe or base model, or the indices of the outputs.

        Args:
            size: The number of outputs of the adapter's own head; `None` if it uses the base model's head.
            labels: The labels of the recipe; `None` if it has none.

        Raises:
            ValueError: If the number of labels differs from the number of outputs.
        """
        count = len(self.base.labels) if size is None else size
        if labels is not None and len(labels) != count:
            raise ValueError(f"its {RECIPE} has {len(labels)} labels, and its head {count} outputs.")
        return labels or (self.base.labels if size is None else list(range(count)))

    def error_text(self, error: BaseException) -> str:
        """Return an error's text for clients: short, and without paths of this machine."""
        text = str(error) or type(error).__name__
        return text.replace(f"{self.root}{os.sep}", "")[:500]

    # ---- Batches

    def answer(self, batch: list[Question]) -> list[dict[str, Any]]:
        """Return an answer for each question. The answer of a rejected question has a `status` and a `detail`."""
        try:
            # Once per adapter, so that all rows of a batch use the same version of it.
            found = {name: self.find_or_rejection(name) for name in dict.fromkeys(each.adapter for each in batch)}
            prepared = [self.prepare(each, found[each.adapter]) for each in batch]
            rows = [row for row in prepared if isinstance(row, Row)]
            if len(batch) == 1 or self.fit_together(rows):
                compute = self.classify if self.kind == "classify" else self.generate
                computed = iter(compute(rows) if rows else [])
                return [next(computed) if isinstance(row, Row) else row for row in prepared]
        except BaseException as error:  # a panic in a Rust library is not an Exception
            log.error("The model failed on a batch of %d: %s", len(batch), error, exc_info=error)
            if len(batch) == 1:
                return [{"status": 500, "detail": "The model failed on this request; see the server's log."}]
        middle = len(batch) // 2  # the rows do not fit together, or one of them caused the error
        return self.answer(batch[:middle]) + self.answer(batch[middle:])

    def fit_together(self, rows: list[Row]) -> bool:
        """Return whether each row has enough positions for the width of the batch, and all adapters fit in memory."""
        width = max((len(row.input_ids) for row in rows), default=0)
        width += max((row.question.max_new_tokens for row in rows), default=0)
        loaded = {None, *self.pool.loaded}
        return all(width <= row.limit and row.folder in loaded for row in rows)

    def find_or_rejection(self, name: str | None) -> Adapter | Rejection:
        """Return the adapter of a name, the base model for `None`, or the `Rejection` that `find` raises."""
        if name is None:
            return self.base
        try:
            return self.find(name)
        except Rejection as error:
            return error

    def prepare(self, question: Question, adapter: Adapter | Rejection) -> Row | dict[str, Any]:
        """Return a row of a batch, or the answer to a rejected question."""
        if isinstance(adapter, Rejection):
            return adapter.answer
        if self.kind == "classify" and len(adapter.labels) < 2:
            return Rejection(422, "The head has one output, for regression; this server answers with labels.").answer
        input_ids = self.tokenizer(question.text, verbose=False)["input_ids"]
        limit = self.limit - adapter.shift
        if not input_ids or len(input_ids) + question.max_new_tokens > limit:
            moved = f"; the prefix takes {adapter.shift} positions" if adapter.shift else ""
            return Rejection(
                422,
                f"The text has {len(input_ids)} tokens, and the request asks for {question.max_new_tokens} new ones. "
                f"The model takes 1 to {limit} in all{moved}.",
            ).answer
        folder = None if question.adapter is None else str(self.root / question.adapter)
        return Row(question, folder, adapter.labels, input_ids, limit)

    def classify(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Return the label and its probability for each row."""
        inputs = self.tokenizer.pad({"input_ids": [row.input_ids for row in rows]}, return_tensors="pt")
        logits = self.pool([row.folder for row in rows], **inputs.to(self.pool.model.device)).logits
        answers = []
        for row, scores in zip(rows, logits.float().cpu(), strict=True):
            # If another row has a larger head, the outputs of this row end with padding.
            probabilities = scores[: len(row.labels)].softmax(-1).tolist()
            best = max(range(len(row.labels)), key=probabilities.__getitem__)
            if not math.isfinite(probabilities[best]):
                raise ValueError(f"{row.folder}: the logits are not finite.")
            answers.append({"label": row.labels[best], "probability": probabilities[best]})
        return answers

    def generate(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Return the greedy continuation of each row."""
        ids = {"input_ids": [row.input_ids for row in rows]}
        inputs = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self.pool.model.device)
        width = inputs["input_ids"].shape[1]

        def finished(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            count = tokens.shape[1] - width
            over = [count >= row.question.max_new_tokens or bool(self.abandoned[row.question.row]) for row in rows]
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
    """The state of an adapter's files, for detecting changes.

    Attributes:
        files: For each of `FILES` its identity, size and times; `None` if it does not exist.
        newest: The time of the last change.
    """

    files: tuple[tuple[int, ...] | None, ...]
    newest: float


def stamp_of(folder: Path) -> Stamp:
    """Return the stamp of an adapter's folder."""
    stats = []
    for name in FILES:
        try:
            stats.append(os.stat(folder / name))
        except OSError:
            stats.append(None)
    files = (each and (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in stats)
    return Stamp(tuple(files), max((each.st_ctime for each in stats if each), default=0.0))


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases: with them a small file can expand to billions of items."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read_labels(path: Path) -> list[Any] | None:
    """Return the labels in an adapter's recipe; `None` if there is no recipe or it has no labels.

    Raises:
        ValueError: If the recipe cannot be read, or the adapter was not trained to answer with one of several labels.
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
    """Return whether a value is a label that JSON can represent."""
    if isinstance(value, str):
        return len(value) <= 1000 and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


# ---- The base model


def make_worker(kind: str, name: str, adapters: Path, settings: Settings, abandoned: Sequence[int]) -> Worker:
    """Load the base model, on the GPU if there is one, and return its worker."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = AUTO_CLASSES[kind].from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    return Worker(kind, model, load_tokenizer(name), adapters, settings, abandoned)


def load_tokenizer(name: str) -> Any:
    """Return a tokenizer that can pad."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(model: nn.Module) -> int | None:
    """Return the number of tokens that a model takes; `None` if its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1  # RoBERTa's positions start after that of padding
    return limit
