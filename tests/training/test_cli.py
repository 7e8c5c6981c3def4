"""The command `prefix-adapter`, from training to publishing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import topic_rows, write_rows
from safetensors.torch import load_file

from prefix_adapter.cli import main

ROOT = Path(__file__).resolve().parents[2]


def call(capsys, *arguments):
    """Run a command in this process; what it printed."""
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def options(base, topics, output, *more):
    return [
        *("train", "--task", "sequence-classification", "--model", base, "--output_dir", output),
        *("--data.train", topics["train"], "--data.validation", topics["validation"], "--batch_size", "8"),
        *("--num_train_epochs", "2", "--max_length", "16", "--adapter.num_virtual_tokens", "4", *more),
    ]


def test_from_rows_to_a_folded_adapter(tiny_bert, topics, tmp_path, capsys):
    out = tmp_path / "out"
    printed = call(capsys, *options(tiny_bert, topics, out, "--adapter.prefix_projection", "true"))
    assert str(out) in printed
    recorded = json.loads((out / "results.json").read_text())["validation"]

    assert json.loads(call(capsys, "evaluate", out)) == pytest.approx(recorded, abs=1e-6)

    rows = write_rows(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in topic_rows(5)])
    call(capsys, "predict", out, rows, tmp_path / "answers.jsonl", "--chunk_size", "2")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["prediction"] for answer in answers} <= {"a", "b"}
    assert len(answers) == 5

    shown = json.loads(call(capsys, "info", out, "--json"))
    assert (shown["peft_type"], shown["settings"]["num_virtual_tokens"]) == ("PREFIX_TUNING_V2", 4)
    assert shown["parameters"] == {"prefix": 4 * 3 * 2 * 32, "other": 32 * 2 + 2}
    weights = load_file(out / "adapter_model.safetensors")
    assert {name: each["shape"] for name, each in shown["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in weights.items()
    }
    assert "num_virtual_tokens  4" in call(capsys, "info", out)

    (best,) = {path.name for path in (out / "checkpoints").iterdir() if path.name.endswith(f"{12:06d}")}
    call(capsys, "fold", out / "checkpoints" / best, tmp_path / "folded")
    assert load_file(tmp_path / "folded" / "adapter_model.safetensors").keys() == weights.keys()


def test_resume_needs_the_folder_alone(tiny_bert, topics, tmp_path, capsys):
    out = tmp_path / "out"
    call(capsys, *options(tiny_bert, topics, out))
    before = (out / "adapter_model.safetensors").read_bytes()
    call(capsys, "train", "--resume", out)
    assert (out / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--learning_rate", "-1"], "learning_rate"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--adapter.num_tokens", "4"], "adapter.num_tokens"),
        (["--adapter.peft_type", "MAGIC"], "MAGIC"),
        (["--task_kwargs.stride", "4"], "stride"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--metric_for_best_model", "beauty"], "beauty"),
        (["--lr_scheduler_type", "sawtooth"], "sawtooth"),
    ],
)
def test_mistakes_end_in_one_message(tiny_bert, topics, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        main([str(each) for each in options(tiny_bert, topics, tmp_path / "out", *change)])
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_mistakes_on_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit, match="no run"):
        main(["train", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no adapter"):
        main(["info", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no adapter"):
        main(["push", str(tmp_path), "user/name"])
    with pytest.raises(SystemExit):
        main(["train", "--lerning_rate", "1"])
    assert "lerning_rate" in capsys.readouterr().err


def test_help_suffices(capsys):
    for command in (
        "train",
        "train-together",
        "search",
        "evaluate",
        "predict",
        "info",
        "fold",
        "import",
        "export",
        "push",
    ):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert stopped.value.code == 0
        assert len(shown) > 300
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in ("num_train_epochs", "null_score_threshold", "roberta-large-squad2", "gradient_accumulation_steps"):
        assert name in shown


def test_it_runs_as_a_module():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "prefix_adapter", "info", str(ROOT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "holds no adapter" in done.stderr
    assert "Traceback" not in done.stderr
