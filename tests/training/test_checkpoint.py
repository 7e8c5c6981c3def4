"""Checkpoints and the output folder: after a crash at any time the files are complete, and the run can be resumed."""

import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from conftest import save_base, topic_rows, write_rows
from peft import PeftConfig
from safetensors.torch import load_file
from test_loop import what_counts
from test_run import recipe
from tqdm import tqdm

from prefix_adapter.training import RecipeError, checkpoint, load_recipe, reports, run, train
from prefix_adapter.training.loop import Loop

PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def make(tmp_path):
    """A function that makes a recipe for a short run with this output folder."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    base = save_base(tmp_path / "bert", "bert", **dropout)
    rows = {
        "train": write_rows(tmp_path / "train.jsonl", topic_rows(16)),
        "validation": write_rows(tmp_path / "validation.jsonl", topic_rows(5, 100)),
        "test": write_rows(tmp_path / "test.jsonl", topic_rows(5, 200)),
    }

    def make(name, **changes):
        settings = {"num_train_epochs": 2, "save_steps": 1, "eval_steps": 2, "logging_steps": 1, **changes}
        return recipe(base, rows, tmp_path / name, **settings)

    return make


def in_child(work, report: Path) -> int:
    """Fork a process that runs `work`, and return its id. The traceback of an error is written to `report`."""
    child = os.fork()
    if child:
        return child
    code = 1
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared, and would stay locked after a kill
    try:
        sys.stdout = sys.stderr = io.StringIO()
        work()
        code = 0
    except BaseException:
        report.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def was_killed(child: int, report: Path) -> bool:
    """Wait for a process, and return whether it was killed. Otherwise it must have ended without an error."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, report.read_text()
    return False


def on_the_way_to_the_disk(step: Callable[[Callable[[Path], None]], None], folder: Path) -> None:
    """Call `step` whenever this process is about to change a file or folder in `folder`, until the process ends.

    Python reports what it is about to do (PEP 578). A file that is opened is two steps: before that, and when it is
    empty. So is a file of safetensors, which is no Python: before it is written, and when half of it is.

    Args:
        step: What to do. It gets a function that makes the change, as far as it had come, in a copy of the folder.
        folder: The folder.
    """
    inside = False

    def call(change: Callable[[Path], None] = lambda root: None) -> None:
        nonlocal inside
        inside = True  # the changes that `step` makes are not counted
        try:
            step(change)
        finally:
            inside = False

    def hook(event: str, args: tuple) -> None:
        if inside or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            return
        path = args[0]
        # `rmtree` names files relative to their folder.
        if isinstance(path, int) or not (str(path).startswith(str(folder)) or event in ("os.remove", "os.rmdir")):
            return
        if event != "open":
            call()
        elif (flags := args[2]) & (os.O_WRONLY | os.O_RDWR):
            call()
            call(lambda root: os.close(os.open(root / Path(path).relative_to(folder), flags, 0o644)))

    original = safetensors.torch.serialize_file

    def serialize_file(tensors, path, *args, **kwargs):
        call()
        original(tensors, path, *args, **kwargs)
        part = Path(path).relative_to(folder)
        call(lambda root: os.truncate(root / part, os.path.getsize(root / part) // 2))

    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(hook)


def die_at(number: int, folder: Path) -> None:
    """Kill this process at this write."""
    count = 0

    def step(change: Callable[[Path], None]) -> None:
        nonlocal count
        count += 1
        if count == number:
            change(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    on_the_way_to_the_disk(step, folder)


def copy_at_every_step(folder: Path, copies: Path) -> None:
    """Copy a folder at every write, as a process that is killed at this moment would leave it."""
    numbers = itertools.count()

    def step(change: Callable[[Path], None]) -> None:
        if folder.exists():
            copy = shutil.copytree(folder, copies / f"{next(numbers):04d}")
            change(copy)

    copies.mkdir()
    on_the_way_to_the_disk(step, folder)


def assert_whole(folder: Path) -> None:
    """Assert that every checkpoint can be read completely."""
    for step in checkpoint.saved_steps(folder / "checkpoints"):
        own = checkpoint.step_folder(folder / "checkpoints", step)
        assert json.loads((own / "state.json").read_text())["step"] == step
        names = set(load_file(own / "adapter_model.safetensors"))
        assert len(load_file(own / "optimizer.safetensors")) == 3 * len(names)
        assert PeftConfig.from_pretrained(own).num_virtual_tokens == 4
        assert (own / "README.md").exists()
    if (folder / "recipe.yaml").exists():
        load_recipe(folder / "recipe.yaml")


def durable(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder, without unfinished ones."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".unfinished-" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def go_on(run) -> None:
    """Start a killed run again, or resume it if it has a recipe."""
    train(run, resume=(Path(run.output_dir) / "recipe.yaml").exists())


def test_killed_at_every_step_on_the_way_to_the_disk(make, tmp_path):
    """One run, whose folder is copied at every write. The tests below kill real processes."""
    train(make("whole", max_steps=2))
    expected = what_counts(tmp_path / "whole")
    folder, copies, report, states = tmp_path / "killed", tmp_path / "copies", tmp_path / "report", []

    def work():
        copy_at_every_step(folder, copies)
        train(make("killed", max_steps=2))

    assert not was_killed(in_child(work, report), report)
    assert what_counts(folder) == expected
    found = sorted(copies.iterdir())
    for copy in found:
        shutil.rmtree(folder)
        copy.rename(folder)
        assert_whole(folder)
        state = durable(folder)
        if state not in states:  # equal states lead to equal ends
            states.append(state)
            go_on(make("killed", max_steps=2))
            assert what_counts(folder) == expected
            assert not list(folder.rglob(".unfinished-*"))
    assert len(found) > 90 and len(states) > 10


def killed_at(number: int, run, report: Path) -> bool:
    """Kill a new or resumed run at this write, and return whether it got there."""

    def work():
        die_at(number, Path(run.output_dir))
        go_on(run)

    return was_killed(in_child(work, report), report)


@pytest.mark.slow
def test_killed_again_and_again(make, tmp_path):
    train(make("whole"))
    report = tmp_path / "report"
    for number in range(3, 1000, 11):
        if not killed_at(number, make("killed"), report):
            break
        assert_whole(tmp_path / "killed")
    assert number > 50
    assert what_counts(tmp_path / "killed") == what_counts(tmp_path / "whole")
    assert durable(tmp_path / "killed").keys() == durable(tmp_path / "whole").keys()


@pytest.mark.slow
def test_killed_at_any_moment(make, tmp_path):
    long = {"num_train_epochs": 8}
    train(make("whole", **long))
    folder, report, killed, moments = tmp_path / "killed", tmp_path / "report", 0, random.Random(0)
    while True:
        before = checkpoint.saved_steps(folder / "checkpoints")
        child = in_child(lambda: go_on(make("killed", **long)), report)
        while checkpoint.saved_steps(folder / "checkpoints") == before and not os.waitid(os.P_PID, child, PEEK):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        if not was_killed(child, report):
            break
        killed += 1
        assert_whole(folder)
    assert killed > 5
    assert what_counts(folder) == what_counts(tmp_path / "whole")


def limit_files(size: int) -> None:
    """Limit the size of the files that this process writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "README.md"])
def test_a_full_disk(make, tmp_path, size):
    """From the checkpoint of step 4 on, files can only grow to one byte below the size of one of its files."""
    train(make("whole"))
    expected = what_counts(tmp_path / "whole")
    first = tmp_path / "whole" / "checkpoints" / "step-000004"
    limit, report, folder = (first / size).stat().st_size - 1, tmp_path / "report", tmp_path / "full"

    def fill(step, metrics):
        if step == 4:
            assert checkpoint.saved_steps(folder / "checkpoints") == [2, 3]
            limit_files(limit)

    def work():
        with pytest.raises(OSError) as error:
            train(make("full"), on_evaluation=fill)
        limit_files(resource.RLIM_INFINITY)
        said = str(error.value)
        assert said.startswith(str(folder / "checkpoints" / "step-000004")) and "File too large" in said
        assert "The checkpoint of step 4 was not written; earlier files are unchanged." in said

    assert not was_killed(in_child(work, report), report)
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000002", "step-000003"]
    assert_whole(folder)
    assert not (folder / "adapter_model.safetensors").exists()
    go_on(make("full"))
    assert what_counts(folder) == expected


def test_a_disk_that_is_full_between_checkpoints(make, tmp_path):
    train(make("whole"))
    report, folder = tmp_path / "report", tmp_path / "full"
    recorded = folder / "metrics.jsonl"

    def train_step(self, batch):
        if self.step == 3:
            limit_files(recorded.stat().st_size + 9)
        return original(self, batch)

    def work():
        Loop._train_step = train_step
        with pytest.raises(OSError) as error:
            train(make("full"))
        limit_files(resource.RLIM_INFINITY)
        assert str(error.value) == f"{recorded}: [Errno 27] File too large"

    original = Loop._train_step
    assert not was_killed(in_child(work, report), report)
    go_on(make("full"))
    assert what_counts(folder) == what_counts(tmp_path / "whole")


def fill_at(number: int, folder: Path) -> None:
    """Make the disk full for this process, from this write on."""
    count = 0

    def step(path) -> bool:
        nonlocal count
        count += str(path).startswith(str(folder))
        return count >= number and str(path).startswith(str(folder))

    def hook(event: str, args: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.rename") or (
            event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        if step(args[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])

    original = safetensors.torch.serialize_file

    def serialize_file(tensors, path, *args, **kwargs):
        if step(path):
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
        original(tensors, path, *args, **kwargs)

    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(hook)


STRIDE = int(os.environ.get("PREFIX_ADAPTER_TEST_STRIDE", 7))  # 1 tries every write


def test_a_disk_that_is_full_at_every_write_in_turn(make, tmp_path):
    train(make("whole", max_steps=2))
    expected = what_counts(tmp_path / "whole")
    folder, report, states = tmp_path / "full", tmp_path / "report", []
    for number in range(1, 1000, STRIDE):
        shutil.rmtree(folder, ignore_errors=True)

        def work(number=number):
            fill_at(number, folder)
            try:
                go_on(make("full", max_steps=2))
            except OSError as error:
                assert "No space left on device" in str(error) and str(folder) in str(error), str(error)
                report.write_text("full")

        report.unlink(missing_ok=True)
        assert not was_killed(in_child(work, report), report)
        if not report.exists():
            break
        assert not list(folder.rglob(".unfinished-*")) and not list(folder.rglob(".run*"))
        state = durable(folder)
        if state not in states:
            states.append(state)
            assert_whole(folder)
            # The weights are moved last, when all other files are there.
            assert not (folder / "adapter_model.safetensors").exists()
            go_on(make("full", max_steps=2))
            assert what_counts(folder) == expected
    assert len(states) > 2 and number > 40
    assert what_counts(folder) == expected


@pytest.mark.parametrize(("module", "name"), [(reports, "write_card"), (run, "fsync_path"), (run.shutil, "copyfile")])
def test_a_disk_that_is_full_at_the_end(make, tmp_path, monkeypatch, module, name):
    """The files of a finished run are all moved into the folder, or none is."""
    train(make("whole"))

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(OSError, match=rf"{tmp_path / 'full'}: .*No space left on device"):
            train(make("full"))
    folder = tmp_path / "full"
    assert sorted(os.listdir(folder)) == ["checkpoints", "metrics.jsonl", "recipe.yaml"]
    go_on(make("full"))
    assert what_counts(folder) == what_counts(tmp_path / "whole")


def test_a_folder_in_use_is_left_alone(make, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("Years of work")
    for overwrite, said in ((False, "is not empty.*--resume.*--overwrite"), (True, "no earlier run")):
        with pytest.raises(RecipeError, match=rf"`output_dir`: .*thesis .*{said}"):
            train(make("thesis"), overwrite=overwrite)
    with pytest.raises(RecipeError, match=r"`output_dir`: there is no run to resume in .*thesis"):
        train(make("thesis"), resume=True)
    (folder / "recipe.yaml").write_text("task: sequence-classification\n")  # the user's own recipe
    with pytest.raises(RecipeError, match=r"also contains 'chapter.tex'"):
        train(make("thesis"), overwrite=True)
    assert durable(folder).keys() == {"chapter.tex", "recipe.yaml"}
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"`output_dir`: .*file is a file"):
        train(make("file"))


def test_a_run_is_replaced_when_asked(make, tmp_path):
    train(make("out", seed=1))
    train(make("fresh", seed=2))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "events").write_text("")
    (tmp_path / "out" / "logs").symlink_to(tmp_path / "elsewhere")
    before = durable(tmp_path / "out")
    with pytest.raises(RecipeError, match="is not empty"):
        train(make("out", seed=2))
    assert durable(tmp_path / "out") == before
    train(make("out", seed=2), overwrite=True)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "fresh"))
    assert (tmp_path / "elsewhere" / "events").exists()  # the link was removed, its target was not


def test_nothing_is_removed_before_the_new_run_can_start(make, tmp_path):
    train(make("out"))
    before = durable(tmp_path / "out")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    bad = make("out")
    bad.data.train = str(empty)
    with pytest.raises(ValueError, match="is empty"):
        train(bad, overwrite=True)
    with pytest.raises(RecipeError, match="cannot be loaded"):
        train(make("out", model_kwargs={"attn_implementation": "none"}), overwrite=True)
    assert durable(tmp_path / "out") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.5},
        {"seed": 7},
        {"adapter": {"num_virtual_tokens": 5}},
        {"task_kwargs": {"threshold": 0.7}},
        {"labels": ["b", "a"]},
    ],
)
def test_another_recipe_is_not_resumed(make, tmp_path, changes):
    train(make("out", max_steps=1))
    before = durable(tmp_path / "out")
    (key,) = changes
    with pytest.raises(RecipeError, match=rf"`{key}`: the run in .*out was started with"):
        train(make("out", max_steps=1, **changes), resume=True)
    assert durable(tmp_path / "out") == before


def test_run_is_not_resumed_with_other_labels(make, tmp_path):
    train(make("out", max_steps=1))
    write_rows(tmp_path / "train.jsonl", [*topic_rows(16), {"text": "w7", "label": "c"}])
    with pytest.raises(
        RecipeError, match=r"`labels`: the run .* was started with \['a', 'b'\], not \['a', 'b', 'c'\]"
    ):
        train(make("out", max_steps=1), resume=True)


def test_changeable_settings_of_a_resumed_run(make, tmp_path):
    results = train(make("out"))
    (tmp_path / "out").rename(tmp_path / "moved")
    again = train(make("moved", eval_batch_size=3), resume=True)
    assert again["best_step"] == results["best_step"]
    assert yaml.safe_load((tmp_path / "moved" / "recipe.yaml").read_text())["output_dir"] == str(tmp_path / "moved")
    # The run can be resumed with the recipe in its folder.
    assert train(load_recipe(tmp_path / "moved" / "recipe.yaml"), resume=True)["steps"] == results["steps"]


@pytest.mark.parametrize("labels", [[3, 10, 2], ["yes", "no", "3"]])
def test_resuming_with_labels_of_all_kinds(make, tmp_path, monkeypatch, labels):
    rows = [{**row, "label": labels[i % 3]} for i, row in enumerate(topic_rows(16))]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows[:5])
    write_rows(tmp_path / "test.jsonl", rows[5:9])
    results = train(make("out"))
    assert load_recipe(tmp_path / "out" / "recipe.yaml").labels == sorted(labels)
    monkeypatch.setattr(Loop, "_train_step", None)
    assert train(make("out"), resume=True)["validation"] == results["validation"]


def test_files_can_be_read_by_others(make, tmp_path):
    train(make("out"))
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, path
