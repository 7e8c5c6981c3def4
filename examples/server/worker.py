"""The server's other process: a base model, its adapters, and the batches that they answer.

It is a process of its own so that Python has a core for the model and another for HTTP. What passes between the two is
text, numbers and lists; errors are sentences, as not every exception survives the way.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from prefix_adapter import AdapterPool


@dataclass(frozen=True)
class Question:
    """What a batch has in a row: an adapter's folder (`None` for the base model), token ids, how many to generate."""

    adapter: str | None
    input_ids: list[int]
    max_new_tokens: int = 0


class Worker:
    """A base model with its adapters.

    Args:
        kind: `"classify"` or `"generate"`.
        model: the base model.
        tokenizer: its tokenizer.
        max_bytes: of the adapters in memory.
    """

    def __init__(self, kind: str, model: Any, tokenizer: Any, max_bytes: int | None = None) -> None:
        self.pool, self.tokenizer = AdapterPool(model, max_bytes), tokenizer
        self.compute = {"classify": self.classify, "generate": self.generate}[kind]
        self.labels: dict[str, list[Any]] = {}

    def load(self, folder: str) -> str:
        """Have an adapter in memory; why it cannot be, or nothing."""
        try:
            self.pool.load(folder)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def loaded(self) -> dict[str, int]:
        """The adapters in memory, and their bytes."""
        return {Path(key).name: found.num_bytes for key, found in self.pool.loaded.items()}

    def answer(self, batch: list[Question]) -> list[dict[str, Any]]:
        """An answer for each question; `error` has what went wrong."""
        try:
            return self.compute(batch)
        except Exception as error:
            if len(batch) == 1:
                return [{"error": f"{type(error).__name__}: {error}"}]
        return [answer for each in batch for answer in self.answer([each])]  # one of them is to blame

    def classify(self, batch: list[Question]) -> list[dict[str, Any]]:
        """Label and probability."""
        inputs = self.tokenizer.pad({"input_ids": [each.input_ids for each in batch]}, return_tensors="pt")
        logits = self.pool([each.adapter for each in batch], **inputs.to(self.pool.model.device)).logits
        answers = []
        for question, row in zip(batch, logits.float().softmax(-1).tolist(), strict=True):
            labels = self.labels_of(question.adapter) or list(range(self.pool.model.config.num_labels))
            best = max(range(len(labels)), key=row.__getitem__)
            answers.append({"label": labels[best], "probability": row[best]})
        return answers

    def labels_of(self, folder: str | None) -> list[Any]:
        """The labels that an adapter was trained with, if its folder has the recipe."""
        if folder is None or not (Path(folder) / "recipe.yaml").is_file():
            return []
        if folder not in self.labels:
            recipe = yaml.safe_load((Path(folder) / "recipe.yaml").read_text(encoding="utf-8"))
            self.labels[folder] = recipe.get("labels") or []
        return self.labels[folder]

    def generate(self, batch: list[Question]) -> list[dict[str, Any]]:
        """The greedy continuation."""
        ids = {"input_ids": [each.input_ids for each in batch]}
        inputs = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self.pool.model.device)
        tokens = self.pool.generate(
            [each.adapter for each in batch],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max(each.max_new_tokens for each in batch),
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            {"text": self.tokenizer.decode(row[: each.max_new_tokens], skip_special_tokens=True)}
            for each, row in zip(batch, new, strict=True)
        ]


def load_tokenizer(name: str) -> Any:
    """A tokenizer that can pad."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_AUTO_CLASSES = {
    "classify": transformers.AutoModelForSequenceClassification,
    "generate": transformers.AutoModelForCausalLM,
}
_worker: Worker | None = None


def _start(kind: str, name: str, max_bytes: int | None, threads: int | None) -> None:
    global _worker
    if threads:
        torch.set_num_threads(threads)
    model = _AUTO_CLASSES[kind].from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    _worker = Worker(kind, model, load_tokenizer(name), max_bytes)


def call(method: str, *args: Any) -> Any:
    """A method of the process's worker."""
    return getattr(_worker, method)(*args)


def new_process(kind: str, name: str, max_bytes: int | None, threads: int | None) -> ProcessPoolExecutor:
    """A process with a worker, for `submit(call, ...)`. CUDA wants one that is not forked."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start, (kind, name, max_bytes, threads))
