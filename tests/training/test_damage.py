"""Resuming from damaged or edited files: a clear error, or the same result."""

import base64
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_checkpoint import durable, make  # noqa: F401 (a fixture)
from test_loop import what_counts
from torch import nn

from prefix_adapter.training import RecipeError, checkpoint, train
from prefix_adapter.training.distributed import initialize_optimizer_state
from prefix_adapter.training.loop import Loop
from prefix_adapter.training.model import load_base, load_tokenizer, wrap
from prefix_adapter.training.tasks import TASK_CLASSES

STEPS = {"max_steps": 4, "early_stopping_patience": 9}
FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "SHA256SUMS")


def scripted(monkeypatch):
    """Make step 2 the best, so that the run leaves the checkpoints of steps 2 and 4."""
    monkeypatch.setattr(Loop, "_is_better", lambda self, metrics, best: best is None)


@pytest.fixture
def run(make, monkeypatch):  # noqa: F811
    """A finished run in the folder `whole`. The fixture is a function that copies it."""
    scripted(monkeypatch)
    train(make("whole", **STEPS))
    folder = Path(make("whole").output_dir)
    assert checkpoint.saved_steps(folder / "checkpoints") == [2, 4]

    def copy(name="copy"):
        target = folder.with_name(name)
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(folder, target)

    return copy


@pytest.fixture
def model(make):  # noqa: F811
    """The model of the run."""
    recipe = make("none")
    recipe.labels = ["a", "b"]
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    return wrap(recipe, task, *load_base(recipe, task))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x01
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_text(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


DAMAGES = (truncate, empty, delete, flip, replace_by_folder, other_text)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_seen(run, model, damage):
    """The damage is found, and the earlier checkpoint is used. Only the checksums may be missing."""
    for name in FILES:
        places = run() / "checkpoints"
        damage(places / "step-000004" / name)
        harmless = name == "SHA256SUMS" and damage in (delete, empty)
        if harmless:
            assert checkpoint.find_intact(places, Accelerator(), model, "accuracy") == 4
            continue
        with pytest.warns(UserWarning, match=r"step-000004/.*resumes from the intact checkpoint of step 2"):
            assert checkpoint.find_intact(places, Accelerator(), model, "accuracy") == 2
        # Also in the best checkpoint, whose weights become the adapter.
        places = run() / "checkpoints"
        damage(places / "step-000002" / name)
        with pytest.raises(checkpoint.CheckpointError, match=r"step-000002/.*(damaged|missing).*--overwrite"):
            checkpoint.find_intact(places, Accelerator(), model, "accuracy")


def change_state(key, value):
    def change(folder: Path) -> None:
        path = folder / "state.json"
        state = json.loads(path.read_text())
        state[key] = value(state[key]) if callable(value) else value
        if state[key] is ...:
            del state[key]
        path.write_text(json.dumps(state))

    return change


def change_tensors(name, change):
    def changed(folder: Path) -> None:
        path = folder / f"{name}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def set_first(ending, change):
    def changed(tensors):
        name = first(tensors, ending)
        tensors[name] = change(tensors[name])

    return changed


def drop(ending):
    return lambda tensors: tensors.pop(first(tensors, ending))


NO_STATE = base64.b64encode(b"1234").decode()
CHANGES = {
    "another step": ("state.json", change_state("step", 3)),
    "no step": ("state.json", change_state("step", ...)),
    "step as text": ("state.json", change_state("step", "4")),
    "best step to come": ("state.json", change_state("best_step", 8)),
    "best without metrics": ("state.json", change_state("best_metrics", None)),
    "other metrics": ("state.json", change_state("best_metrics", {"f1": 0.5})),
    "metrics as texts": ("state.json", change_state("best_metrics", {"accuracy": "good"})),
    "negative count": ("state.json", change_state("evaluations_since_best", -1)),
    "no sum": ("state.json", change_state("loss_sum", None)),
    "sum not finite": ("state.json", change_state("loss_sum", float("nan"))),
    "no schedule": ("state.json", change_state("scheduler", {})),
    "schedule elsewhere": ("state.json", change_state("scheduler", lambda own: {**own, "last_epoch": 1})),
    "no random states": ("state.json", change_state("generators", ...)),
    "empty random states": ("state.json", change_state("generators", [])),
    "random states of nothing": ("state.json", change_state("generators", [{}])),
    "short random states": ("state.json", change_state("generators", [{"cpu": NO_STATE}])),
    "random states no text": ("state.json", change_state("generators", [{"cpu": 5}])),
    "scaler as text": ("state.json", change_state("scaler", "fp16")),
    "a list": ("state.json", lambda folder: (folder / "state.json").write_text("[1]")),
    "a weight less": ("adapter_model.safetensors", change_tensors("adapter_model", drop("weight"))),
    "a weight of another shape": (
        "adapter_model.safetensors",
        change_tensors("adapter_model", set_first("weight", lambda own: own[:1].clone())),
    ),
    "a weight not finite": (
        "adapter_model.safetensors",
        change_tensors("adapter_model", set_first("weight", lambda own: own * torch.nan)),
    ),
    "a moment less": ("optimizer.safetensors", change_tensors("optimizer", drop("exp_avg"))),
    "a parameter more": (
        "optimizer.safetensors",
        change_tensors("optimizer", lambda own: own.update({"other/exp_avg": torch.zeros(1)})),
    ),
    "moments of another shape": (
        "optimizer.safetensors",
        change_tensors("optimizer", set_first("exp_avg_sq", lambda own: own[:1].clone())),
    ),
    "moments not finite": (
        "optimizer.safetensors",
        change_tensors("optimizer", set_first("exp_avg", lambda own: own * torch.inf)),
    ),
    "negative squares": (
        "optimizer.safetensors",
        change_tensors("optimizer", set_first("exp_avg_sq", lambda own: own - 1)),
    ),
    "more steps than there were": (
        "optimizer.safetensors",
        change_tensors("optimizer", set_first("step", lambda own: own + 1)),
    ),
    "half a step": ("optimizer.safetensors", change_tensors("optimizer", set_first("step", lambda own: own / 8))),
    "moments as integers": (
        "optimizer.safetensors",
        change_tensors("optimizer", set_first("exp_avg", lambda own: own.long())),
    ),
}


def test_checkpoint_without_checksums_is_compared_with_the_run(run, model):
    """Earlier versions wrote no checksums, and a person may have removed them."""
    places = run() / "checkpoints"
    shutil.rmtree(places / "step-000002")
    folder = places / "step-000004"
    change_state("best_step", 4)(folder)
    (folder / "SHA256SUMS").unlink()
    kept = shutil.copytree(folder, places.parent / "kept")
    assert checkpoint.find_intact(places, Accelerator(), model, "accuracy") == 4
    for what, (name, change) in CHANGES.items():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        change(folder)
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.find_intact(places, Accelerator(), model, "accuracy")
        assert str(folder / name) in str(error.value), (what, error.value)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_trained_again(run, make, name):  # noqa: F811
    flip(run() / "checkpoints" / "step-000004" / name)
    with pytest.warns(UserWarning, match=f"{name} is damaged"):
        train(make("copy", **STEPS), resume=True)
    assert what_counts(make("copy").output_dir) == what_counts(make("whole").output_dir)


def test_nothing_is_touched_if_no_checkpoint_is_whole(run, make):  # noqa: F811
    folder = run()
    for step in (2, 4):
        truncate(folder / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors")
    before = durable(folder)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-000004/adapter_model.safetensors.*--overwrite"):
        train(make("copy", **STEPS), resume=True)
    assert durable(folder) == before


def test_moments_that_are_not_finite_are_not_kept(tmp_path):
    model, optimizer = nn.Linear(2, 2), None
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    initialize_optimizer_state(optimizer.optimizer)
    optimizer.state[model.weight]["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"moments of weight"):
        checkpoint.save(tmp_path / "checkpoints", 1, accelerator, model, optimizer, {})
    assert not list(tmp_path.rglob("*"))


def test_a_part_that_has_no_gradient_yet_can_be_resumed(tmp_path):
    def new():
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return (*accelerator.prepare(model, optimizer), optimizer)

    def step(model, optimizer, name):
        model[name](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator()
    state = {"best_step": None, "best_metrics": None, "evaluations_since_best": 0, "loss_sum": 0.0, "loss_count": 0}
    model, optimizer, plain = new()
    initialize_optimizer_state(plain)
    step(model, optimizer, "used")
    places = tmp_path / "checkpoints"
    checkpoint.save(places, 1, accelerator, model, optimizer, {**state, "scheduler": {"last_epoch": 1}})
    again, other, plain = new()
    initialize_optimizer_state(plain)
    assert checkpoint.find_intact(places, accelerator, again, "accuracy") == 1
    checkpoint.restore(checkpoint.step_folder(places, 1), accelerator, again, other)
    reference, third, _ = new()  # plain AdamW creates the state of a parameter with its first gradient
    step(reference, third, "used")
    for own, its in ((model, optimizer), (again, other), (reference, third)):
        step(own, its, "unused")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, model.state_dict()[name])


# ---- Edited files


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"epoch": 1, "split": "train", "loss": 1}', "`step` is None"),
        (b'{"step": 1, "epoch": 1, "split": 5, "loss": 1}', "`split` is 5"),
        (b'{"step": 1, "epoch": 1, "split": "train", "loss": "low"}', "`loss` is not a number"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(run, make, line, said):  # noqa: F811
    folder = run()
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    before = durable(folder)
    with pytest.raises(RecipeError, match=rf"metrics.jsonl, line 2: .*{said}"):
        train(make("copy", **STEPS), resume=True)
    assert durable(folder) == before


def test_unfinished_last_line_is_removed(run, make):  # noqa: F811
    folder = run()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 50)
    train(make("copy", **STEPS), resume=True)
    assert what_counts(folder) == what_counts(make("whole").output_dir)


@pytest.mark.parametrize("name", ["results.json", "recipe.yaml"])
@pytest.mark.parametrize("damage", [truncate, other_text, lambda path: path.write_bytes(b"\xff\xfe[1]")])
def test_other_files_that_are_damaged(run, make, name, damage):  # noqa: F811
    folder = run()
    damage(folder / name)
    before = durable(folder)
    with pytest.raises(ValueError, match=str(folder / name)):
        train(make("copy", **STEPS), resume=True)
    assert durable(folder) == before


def test_no_warning_where_nothing_is_damaged(run, make):  # noqa: F811
    run()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*checkpoint")
        train(make("copy", **STEPS), resume=True)
    assert what_counts(make("copy").output_dir) == what_counts(make("whole").output_dir)
