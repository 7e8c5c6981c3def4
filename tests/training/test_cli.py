"""The command `prefix-adapter`, from training to publishing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import topic_rows, write_rows
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config
from prefix_adapter.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def call(capsys, *arguments):
    """Run a command in this process, and return its output."""
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

    told = {"split": "validation", "source": topics["validation"], "rows": 19}
    assert json.loads(call(capsys, "evaluate", out)) == told | {
        k: pytest.approx(v, abs=1e-6) for k, v in recorded.items()
    }

    rows = write_rows(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in topic_rows(5)])
    call(capsys, "predict", out, rows, tmp_path / "answers.jsonl", "--chunk_size", "2", "--bad_rows", "skip")
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
        (["--adapter.num_virtual_token", "4"], r"adapter.num_virtual_token`.* Did you mean num_virtual_tokens\?"),
        (["--adapter.peft_type", "LORAA"], r"no method 'LORAA'.* Did you mean LORA\?"),
        (["--task_kwargs.stride", "4"], "stride"),
        (["--model", "/nowhere"], "There is no folder '/nowhere', and on the Hub: "),
        (["--adapter", "{peft_type: NONE}"], r"nothing is trained, and classifier of \S+ would have random .* HEAD"),
        (["--metric_for_best_model", "beauty"], "beauty"),
        (["--lr_scheduler_type", "sawtooth"], "sawtooth"),
    ],
)
def test_mistakes_end_in_one_message(tiny_bert, topics, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        main([str(each) for each in options(tiny_bert, topics, tmp_path / "out", *change)])
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no run"):
        main(["train", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no adapter"):
        main(["info", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no adapter"):
        main(["push", str(tmp_path), "user/name"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trian", "there is no command 'trian'. Did you mean train?"),
        ("train --learning_rat 3", "there is no option --learning_rat. Did you mean --learning_rate?"),
        ("train --learning_rat=3", "there is no option --learning_rat. Did you mean --learning_rate?"),
        ("train --data.trian x", "there is no option --data.trian. Did you mean --data.train?"),
        ("search --search.trials 3", "there is no option --search.trials. Did you mean --search.n_trials?"),
        ("evaluate a --predict b", "there is no option --predict. Did you mean --predictions?"),
        ("train --batch_size x", "--batch_size must be a whole number, got x."),
        ("train --batch_size 2.5", "--batch_size must be a whole number, got 2.5."),
        ("train --learning_rate high", "--learning_rate must be a number or null, got high."),
        ("train --task causal", "--task must be one of sequence-classification, "),
        ("train --mixed_precision fp8", "--mixed_precision must be one of no, fp16, bf16 or null, got fp8."),
        ("train --gradient_checkpointing 1", "--gradient_checkpointing must be true or false, got 1."),
        ("train --labels 3", "--labels must be a list, such as '[a, b]' or null, got 3."),
        ("train --adapter 3", "--adapter must be a mapping, such as '{key: value}', got 3."),
        ("train --data 3", "--data must be a mapping, got '3'."),
        ("train --seed 1 2", "unexpected argument '2'."),
        ("train --model", "--model needs a value."),
        ("train --resume", "--resume needs a value."),
        ("train --config nowhere.yaml", "--config: There is no file 'nowhere.yaml'"),
        ("train --task causal-lm", "there must be a value for model, output_dir."),
        ("search --search.n_trials x", "--search.n_trials must be a whole number, got x."),
        ("search --search.sampler x", "--search.sampler must be one of tpe, random, grid, got x."),
        ("predict a", "there must be a value for source, target."),
        ("predict a b c --chunk_size 0", "--chunk_size must be a whole number of at least 1, got '0'."),
        ("evaluate a --batch_size x", "--batch_size must be a whole number of at least 1, got 'x'."),
        ("import a b --task_type X", "--task_type must be one of 'SEQ_CLS', "),
    ],
)
def test_mistakes_on_the_command_line_end_in_two_lines(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in shown
    assert len(shown.splitlines()) == 2 and "typing" not in shown and "<class" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_options_cannot_be_abbreviated(capsys, command):
    """Abbreviated options are errors, for instance --learning_rat."""
    options = [each for each in re.findall(r"(?m)^ +(--[\w.]{4,})", shown_help(capsys, command)) if each != "--help"]
    assert options
    for option in options[:3]:
        with pytest.raises(SystemExit) as stopped:
            main([command, *("a" for _ in range(3)), option[:-1], "1"])
        shown = capsys.readouterr().err
        assert stopped.value.code == 2 and re.search(
            "there (is no option|must be a value)|unexpected arg|must be one", shown
        )


def shown_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_suffices(capsys):
    for command in COMMANDS:
        assert len(shown_help(capsys, command)) > 300
    shown = shown_help(capsys, "train")
    for name in ("num_train_epochs", "null_score_threshold", "roberta-large-squad2", "gradient_accumulation_steps"):
        assert name in shown
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(f"(?m)^  {command} ", shown) for command in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out.strip()) == (0, prefix_adapter.__version__)


def run(*command, **more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **more}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.fixture
def script(tmp_path) -> Path:
    """The script that pip installs."""
    path = tmp_path / "prefix-adapter"
    path.write_text("import sys\nfrom prefix_adapter.cli import main\nsys.exit(main())\n")
    return path


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        ("script", "--help"),
        ("module", "train --help"),
        ("script", "search --help"),
        ("module", "train --learning_rat 3"),
        ("script", "train --seed x"),
        ("module", "predict"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(script, how, arguments):
    called = ["-m", "prefix_adapter"] if how == "module" else [script]
    done = run(*called, *arguments.split(), PYTHONPROFILEIMPORTTIME="1")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "prefix_adapter.cli" in imported
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "numpy", "optuna"}
    assert not imported & heavy


def test_redirected_output_has_no_bars_of_the_libraries(script, monkeypatch):
    """The libraries are imported after the command has begun."""
    for library in ("HF_HUB", "HF_DATASETS"):
        monkeypatch.delenv(f"{library}_DISABLE_PROGRESS_BARS", raising=False)  # left by a command of another test
    script.write_text(
        "import contextlib\n"
        "from prefix_adapter.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--resume'])\n"
        "import datasets, huggingface_hub.utils as hub\n"
        "print(hub.are_progress_bars_disabled(), datasets.is_progress_bar_enabled())"
    )
    assert run(script).stdout.split() == ["True", "False"]


@pytest.mark.slow
def test_it_runs_as_a_program(tmp_path):
    """The command line imports peft late, and PEFT must know the method nevertheless."""
    PrefixTuningV2Config(num_virtual_tokens=3).save_pretrained(tmp_path)
    save_file({"prefix": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    done = run("-m", "prefix_adapter", "fold", tmp_path, tmp_path / "folded")
    assert "is a table already (`prefix_projection=False`)" in done.stderr


def test_the_traceback_is_shown_when_asked_for(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no adapter"):
        main(["info", str(tmp_path), "--debug"])
    monkeypatch.setenv("PREFIX_ADAPTER_DEBUG", "1")
    with pytest.raises(ValueError, match="holds no adapter"):
        main(["info", str(tmp_path)])


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    def fail(*arguments):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("prefix_adapter.adapters.saved.describe_adapter", fail)
    with pytest.raises(KeyError, match="a mistake of ours"):
        main(["info", "x"])


def test_printed_control_characters_are_escaped(tmp_path, capsys):
    escape = "\x1b[2J\x9b\u202e"
    # A config of this package rejects such a name.
    LoraConfig(base_model_name_or_path=f"a{escape}").save_pretrained(tmp_path)
    save_file({f"b{escape}": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    shown = call(capsys, "info", tmp_path) + call(capsys, "info", tmp_path, "--json")
    assert r"a\u001b[2J\u009b\u202e" in shown and r"b\u001b[2J" in shown
    assert all(each.isprintable() or each == "\n" for each in shown)
    assert json.loads(call(capsys, "info", tmp_path, "--json"))["base_model"] == f"a{escape}"
    with pytest.raises(SystemExit) as stopped:
        main(["info", f"/no{escape}where"])
    assert "\x1b" not in str(stopped.value) and "no" in str(stopped.value)
