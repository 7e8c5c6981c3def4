"""Tiny base models with tokenizers in folders, and small files of rows."""

import json
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefix_adapter.training import reports

WORDS = [f"w{i}" for i in range(80)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_base(folder: Path, kind: str, auto_class: str = "AutoModel", **changes) -> str:
    """Save a tiny random model of `tiny.CONFIGS` with a word-level tokenizer over `WORDS`, without dropout."""
    vocabulary = {word: i for i, word in enumerate(_SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    if kind in ("bert", "roberta"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        if kind == "roberta":  # positions start after the padding token's id
            changes = {"pad_token_id": 0, **changes}
    elif kind in ("t5", "bart"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 5)]
        )
        changes = {"eos_token_id": 5, "pad_token_id": 0, "decoder_start_token_id": 0, **changes}
    else:
        changes = {"eos_token_id": 5, "pad_token_id": 0, **changes}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    no_dropout = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "t5": {"dropout_rate": 0.0},
        "bart": {"dropout": 0.0},
        "llama": {},
    }
    tiny.model(kind, auto_class, **{**no_dropout[kind], **changes}).save_pretrained(folder)
    return str(folder)


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
