"""The examples that no test of a task covers, run as a user runs them, on a few rows."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import example
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, ModernBertConfig

ROOT = Path(__file__).resolve().parents[2]


def first_rows(source: Path, target: Path, count: int = 500) -> Path:
    """Copy the first rows of a compressed file. A whole file takes longer to read than a few steps take."""
    target.parent.mkdir(exist_ok=True)
    with gzip.open(source, "rb") as file, gzip.open(target, "wb") as copy:
        copy.writelines(itertools.islice(file, count))
    return target


def test_klue_nli(shared, minilm, tmp_path):
    for name in ("train.jsonl.gz", "dev.jsonl.gz"):
        first_rows(shared / "data" / "klue-nli" / name, tmp_path / "data" / name)
    example(
        *("klue_nli.py", "--data", tmp_path / "data", "--model", minilm, "--output", tmp_path / "out"),
        *("--max-rows", 8, "--max-steps", 1, "--learning-rate", 1e-3),
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["steps"], results["learning_rates"], results["rows"]["train"]) == (1, [1e-3, 1e-3], 8)
    # An MLP of 512, whose table is what is left, and three classes.
    assert results["trained_parameters"] == 20 * 384 + 384 * 512 + 512 + 512 * 4608 + 4608 + 384 * 3 + 3


def test_ner(shared, minilm, tmp_path):
    data = shared / "data" / "wnut17-ner"
    shown = example(
        *("ner.py", "--train", data / "train.jsonl.gz", "--validation", data / "dev.jsonl.gz", "--model", minilm),
        *("--output", tmp_path / "out", "--max-rows", 48, "--epochs", 1),
    )
    assert {"precision", "recall", "f1"} < json.loads((tmp_path / "out" / "results.json").read_text())[
        "validation"
    ].keys()
    assert re.search(r"^Ravi/\S+ flew/\S+ from/\S+ Lima/\S+", shown, re.MULTILINE)


def test_ner_with_modernbert(shared, minilm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    rows = first_rows(shared / "data" / "wnut17-ner" / "train.jsonl.gz", tmp_path / "data" / "train.jsonl.gz")
    shown = example(
        *("ner.py", "--train", rows, "--model", tmp_path / "base", "--entry-point", "attention"),
        *("--output", tmp_path / "out", "--max-rows", 24, "--epochs", 1),
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["entry_point"] == "attention"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(key.split(".")[2] for key in saved) == ["classifier"] * 2 + ["head"] * 2 + ["prefix_tuning_v2"]
    assert re.search(r"^Ravi/\S+ flew/\S+ from/\S+ Lima/\S+", shown, re.MULTILINE)


@pytest.mark.slow
def test_multitask(shared, minilm, tmp_path):
    files = []
    for task, data in (("ner", "wnut17-ner"), ("pos", "ud-ewt-pos")):
        for option, name in ((f"--{task}", "train"), (f"--{task}-validation", "dev")):
            source = shared / "data" / data / f"{name}.jsonl.gz"
            files += [option, first_rows(source, tmp_path / "data" / f"{task}-{name}.jsonl.gz")]
    shown = example(
        *("multitask.py", *files, "--model", minilm, "--output", tmp_path, "--max-rows", 24, "--epochs", 1)
    )
    assert len(re.findall(r"^(?:ner|pos), (?:together|then alone): \d\.\d{3} ", shown, re.MULTILINE)) == 3
    prefix = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight"
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shared/ner", "shared/pos", "ner")]
    assert torch.equal(saved[0][prefix], saved[1][prefix])
    # Alone it made two steps from there, at rates of 1e-1 and 5e-2; AdamW moves a weight by the rate, roughly.
    assert 0 < (saved[2][prefix] - saved[0][prefix]).abs().max() < 0.2


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hf_trainer(own_process, shared, minilm, tmp_path):
    """In a process of its own it imports the package by itself."""
    data = shared / "data" / "banking77"
    train = first_rows(data / "train.jsonl.gz", tmp_path / "train.jsonl.gz")
    validation = first_rows(data / "test.jsonl.gz", tmp_path / "validation.jsonl.gz")
    arguments = ("--train", train, "--validation", validation, "--model", minilm)
    arguments += ("--output", tmp_path / "out", "--max-rows", 64, "--epochs", 1)
    if own_process:
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, ROOT / "examples" / "hf_trainer.py", *map(str, arguments)]
        shown = subprocess.run(
            command,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    else:
        shown = example("hf_trainer.py", *arguments)
    assert "validation accuracy" in shown
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
