"""The output folder: one run at a time, runs that are made longer, runs that are stopped."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import durable, go_on, in_child, make, was_killed  # noqa: F401 (`make` is a fixture)
from test_loop import Crash, before_step, crash, lines, train_scripted, what_counts
from transformers.trainer_utils import SchedulerType

from prefix_adapter.cli import main
from prefix_adapter.training import RecipeError, TrainingInterrupted, files, run, train
from prefix_adapter.training.model import new_scheduler

# ---- One run in a folder


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_run_in_a_folder_is_refused(make, tmp_path, how):  # noqa: F811
    train(make("whole"))
    refused = []

    def second(step, metrics):
        with pytest.raises(RecipeError, match=rf"`output_dir`: process {os.getpid()} on .* is working in .*out") as e:
            train(make("out"), **how)
        refused.append(e)

    train(make("out"), on_evaluation=second)
    assert len(refused) == 2
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    assert not list((tmp_path / "out").glob(".*"))


def test_the_folder_of_a_process_that_was_killed_is_free(make, tmp_path):  # noqa: F811
    train(make("whole"))
    report, flag, folder = tmp_path / "report", tmp_path / "flag", tmp_path / "out"

    def wait(step, metrics):
        flag.write_text("")
        if os.fork() == 0:  # a child process that lives longer does not keep the lock
            time.sleep(1)
            os._exit(0)
        time.sleep(60)

    child = in_child(lambda: train(make("out"), on_evaluation=wait), report)
    while not flag.exists():
        time.sleep(0.01)
    with pytest.raises(RecipeError, match=rf"process {child} on"):
        train(make("out"), resume=True)
    os.kill(child, signal.SIGKILL)
    assert was_killed(child, report)
    assert (folder / ".run.lock").exists()
    go_on(make("out"))
    assert what_counts(folder) == what_counts(tmp_path / "whole")
    assert not list(folder.glob(".*"))


def test_a_run_that_cannot_start_leaves_no_folder(make, tmp_path):  # noqa: F811
    bad = make("new/er")
    bad.data.train = str(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        train(bad)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    bad.output_dir = str(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        train(bad)
    assert os.listdir(tmp_path / "empty") == []


def test_lock_without_an_owner_file(tmp_path):
    with files.lock_folder(tmp_path):
        (tmp_path / ".run.json").write_text("{")
        with pytest.raises(RecipeError, match="another process is working"), files.lock_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_to(make, tmp_path, monkeypatch):  # noqa: F811
    def mkdir(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(run, "load_tokenizer", None)  # the error comes before anything is loaded
    with pytest.raises(PermissionError, match=r"Permission denied: '.*out'"):
        train(make("out"))


# ---- A finished run that is made longer

CONSTANT = {"lr_scheduler_type": "constant", "num_train_epochs": 2}


@pytest.mark.parametrize("changes", [{"num_train_epochs": 4}, {"num_train_epochs": 4, "max_steps": 7}])
def test_a_longer_run_is_the_same_as_one_that_was_long_from_the_start(make, tmp_path, changes):  # noqa: F811
    train(make("whole", **{**CONSTANT, **changes}))
    results = train(make("longer", **CONSTANT))
    assert results["steps"] == 4
    results = train(make("longer", **{**CONSTANT, **changes}), resume=True)
    assert results["steps"] == changes.get("max_steps", 8)
    assert what_counts(tmp_path / "longer") == what_counts(tmp_path / "whole")
    saved = load_file(tmp_path / "longer" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    assert f"num_train_epochs: {changes['num_train_epochs']}" in (tmp_path / "longer" / "recipe.yaml").read_text()


def rates(folder) -> dict[int, float]:
    return {line["step"]: line["learning_rate/adapter"] for line in lines(folder) if line["split"] == "train"}


@pytest.mark.parametrize("changes", [{}, {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2}])
def test_the_schedule_of_a_longer_run(make, tmp_path, changes):  # noqa: F811
    train(make("whole", num_train_epochs=4, **changes))
    train(make("longer", num_train_epochs=2, **changes))
    before = rates(tmp_path / "longer")
    train(make("longer", num_train_epochs=4, **changes), resume=True)
    long, whole = rates(tmp_path / "longer"), rates(tmp_path / "whole")
    assert list(long) == list(whole) == list(range(1, 9))
    assert {step: long[step] for step in range(1, 5)} == before
    assert {step: long[step] for step in range(5, 9)} == {step: whole[step] for step in range(5, 9)}
    assert long[5] > long[4]


@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_every_schedule_is_a_function_of_the_step(make, name):  # noqa: F811
    """`Loop` needs schedules that give a factor for each step."""
    settings = {"lr_scheduler_kwargs": {"num_decay_steps": 2}} if name == "warmup_stable_decay" else {}
    settings = {"lr_scheduler_kwargs": {"min_lr": 0.001}} if "min_lr" in name else settings
    recipe = make("out", lr_scheduler_type=name, **settings)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        schedule = new_scheduler(recipe, optimizer, 10, 5)
    except RecipeError:
        assert name in ("reduce_lr_on_plateau", "greedy")
        return
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)


def test_a_longer_run_that_is_killed_goes_on_as_the_longer_one(make, tmp_path, monkeypatch):  # noqa: F811
    train(make("whole", **{**CONSTANT, "num_train_epochs": 4}))
    train(make("longer", **CONSTANT))
    with monkeypatch.context() as patch:
        before_step(patch, 6, crash)
        with pytest.raises(Crash):
            train(make("longer", **{**CONSTANT, "num_train_epochs": 4}), resume=True)
    main(["train", "--resume", str(tmp_path / "longer")])
    assert what_counts(tmp_path / "longer") == what_counts(tmp_path / "whole")


def test_on_the_command_line(make, tmp_path, capsys):  # noqa: F811
    train(make("out", **CONSTANT))
    main(["train", "--resume", str(tmp_path / "out"), "--num_train_epochs", "3"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 6
    assert "Resuming after step 4 of 6." in capsys.readouterr().out
    main(["train", "--resume", str(tmp_path / "out")])
    assert "With a larger `num_train_epochs` or `max_steps`" in capsys.readouterr().out


def test_a_run_is_not_made_shorter(make, tmp_path):  # noqa: F811
    train(make("out", **CONSTANT))
    before = durable(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"`num_train_epochs`.* 4 steps, and these values allow 2"):
        train(make("out", **{**CONSTANT, "num_train_epochs": 1}), resume=True)
    assert durable(tmp_path / "out") == before


def test_a_run_that_stopped_early_is_made_longer_by_its_patience(make, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings = {**CONSTANT, "num_train_epochs": 4, "eval_steps": 1, "early_stopping_patience": 1}
    assert train_scripted(monkeypatch, [0.5, 0.4, 0.5], make("out", **settings))["steps"] == 2
    assert train(make("out", **settings), resume=True)["steps"] == 2
    assert "a larger `early_stopping_patience`" in capsys.readouterr().out
    settings["early_stopping_patience"] = 9
    assert train(make("out", **settings), resume=True)["steps"] == 8


# ---- Runs that are stopped


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def stopped(capsys, *arguments) -> str:
    """Run a command that is stopped, and return its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 128 + signal.SIGINT
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_ctrl_c_before_the_first_step(make, tmp_path, monkeypatch, capsys):  # noqa: F811
    make("recipe").save(tmp_path / "recipe.yaml")
    call = ("train", "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_base", stop)
        assert f"train: Stopped. There is no run in {tmp_path / 'out'} yet." in stopped(capsys, *call)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["load_base", "write_adapter"])
def test_ctrl_c_before_and_after_training(make, tmp_path, monkeypatch, capsys, what):  # noqa: F811
    train(make("whole"))
    with monkeypatch.context() as patch:
        before_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(make("out"))
    with monkeypatch.context() as patch:
        patch.setattr(run, what, stop)
        said = stopped(capsys, "train", "--resume", tmp_path / "out")
        assert f"Stopped. Resume with: prefix-adapter train --resume {tmp_path / 'out'}" in said
    train(make("out"), resume=True)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")


def test_the_second_signal_in_a_save_leaves_the_checkpoint_before(make, tmp_path, monkeypatch):  # noqa: F811
    train(make("whole"))

    def fsync_path(path):
        if "step-000003" in str(sys._getframe(1).f_locals.get("target")):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("prefix_adapter.training.checkpoint.fsync_path", fsync_path)
            with pytest.raises(KeyboardInterrupt, match="Resume with"):
                train(make("out"))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["step-000002"]
    train(make("out"), resume=True)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")


# ---- Windows


def test_saving_needs_nothing_that_windows_lacks(make, tmp_path, monkeypatch):  # noqa: F811
    """Windows cannot open folders, and cannot flush files that are open for reading."""
    fcntl = pytest.importorskip("fcntl")
    original_open, original_fsync, flushed = os.open, os.fsync, []

    def windows_open(path, flags, *args, **kwargs):
        if kwargs.get("dir_fd") is None and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return original_open(path, flags, *args, **kwargs)

    def windows_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed.append(os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else handle)
        original_fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_WINDOWS", True)
        patch.setattr(shutil, "_use_fd_functions", False)  # as on Windows
        patch.setattr(os, "open", windows_open)
        patch.setattr(os, "fsync", windows_fsync)
        train(make("out"))
    train(make("whole"))
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json", "recipe.yaml", "metrics.jsonl"):
        assert any(str(path).endswith(name) for path in flushed)


def test_a_checkpoint_that_cannot_be_removed_stays_for_now(make, tmp_path, monkeypatch):  # noqa: F811
    """On Windows a file that another process reads cannot be renamed."""
    train(make("whole"))
    original = Path.rename

    def rename(path, target):
        if path == tmp_path / "out" / "checkpoints" / "step-000001":
            raise PermissionError(13, "The process cannot access the file", str(path))
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        train(make("out"))
    assert (tmp_path / "out" / "checkpoints" / "step-000001").is_dir()
    assert train(make("out"), resume=True)["steps"] == 4
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "said"), [("nt", '--resume "C:\\my runs\\x"'), ("posix", "--resume 'C:\\my runs\\x'")]
)
def test_the_command_to_resume_can_be_copied(monkeypatch, name, said):
    from prefix_adapter.training import outputs

    monkeypatch.setattr(os, "name", name)
    assert outputs.how_to_resume("C:\\my runs\\x", "train").endswith(said)


def test_an_interrupted_run_says_how_to_resume(make, tmp_path, monkeypatch):  # noqa: F811
    before_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match=rf"Resume with: prefix-adapter train --resume {tmp_path / 'out'}"):
        train(make("out"))
