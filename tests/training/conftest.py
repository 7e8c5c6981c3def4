"""Tiny base models with tokenizers in folders, and small files of rows."""

import json
from pathlib import Path

import pytest
import tiny

from prefix_adapter.training import reports

WORDS = [f"w{i}" for i in range(80)]


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_base(folder: Path, kind: str, auto_class: str = "AutoModel", **changes) -> str:
    """Save a tiny random model of `tiny.CONFIGS` with a tokenizer over `WORDS`, without dropout."""
    return tiny.save(folder, kind, WORDS, auto_class, **changes)


@pytest.fixture
def with_curve() -> None:
    """For tests that need the plot of a run."""


@pytest.fixture(autouse=True)
def _without_curve(request, monkeypatch) -> None:
    """Leave out the plot of a run in all other tests. Drawing it takes longer than a tiny run."""
    if "with_curve" not in request.fixturenames:
        monkeypatch.setattr(reports, "draw_curve", lambda *args: None)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """The folder of a tiny random BERT with a tokenizer."""
    return save_base(tmp_path_factory.mktemp("base") / "bert", "bert")


def topic_rows(count: int, start: int = 0) -> list[dict]:
    """Texts of a few words with two labels: one has the words `w0` to `w4`, the other `w40` to `w44`."""
    rows = []
    for i in range(start, start + count):
        offset = 40 * (i % 2)
        text = " ".join(f"w{offset + (i * 7 + j * 3) % 5}" for j in range(3 + i % 4))
        rows.append({"text": text, "label": "ab"[i % 2]})
    return rows


@pytest.fixture
def topics(tmp_path) -> dict[str, str]:
    """Files with texts of two topics: 48 training rows and 19 validation rows."""
    return {
        "train": write_rows(tmp_path / "train.jsonl", topic_rows(48)),
        "validation": write_rows(tmp_path / "validation.jsonl", topic_rows(19, 100)),
    }
