"""The training loop: exact resumption, early stopping, signals, divergence and recorded metrics."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from conftest import save_base, topic_rows, write_rows
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from test_run import recipe
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import RecipeError, TrainingDiverged, TrainingInterrupted, checkpoint, objective, train
from prefix_adapter.training.loop import Loop
from prefix_adapter.training.tasks.sequence_classification import SequenceClassification

PREFIX = {"num_virtual_tokens": 4, "prefix_dropout": 0.1}
NINE_STEPS = {"num_train_epochs": 3, "batch_size": 8, "logging_steps": 2, "adapter": PREFIX}


class Crash(BaseException):
    """Stands for the end of the process: no code catches it."""


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> str:
    """The folder of a tiny BERT with dropout."""
    folder = tmp_path_factory.mktemp("base") / "bert"
    return save_base(folder, "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture
def few(tmp_path) -> dict[str, str]:
    """24 training rows, and a few validation and test rows."""
    return {
        "train": write_rows(tmp_path / "train.jsonl", topic_rows(24)),
        "validation": write_rows(tmp_path / "validation.jsonl", topic_rows(9, 100)),
        "test": write_rows(tmp_path / "test.jsonl", topic_rows(7, 200)),
    }


def before_step(monkeypatch, step: int, action) -> None:
    """Call `action` after this number of steps."""
    original = Loop._train_step

    def train_step(self, batch):
        if self.step == step:
            action()
        return original(self, batch)

    monkeypatch.setattr(Loop, "_train_step", train_step)


def crash() -> None:
    raise Crash


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def what_counts(folder) -> dict[str, bytes]:
    """The results, metrics, weights and states of a run, as bytes."""
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    found = {"results": json.dumps(results).encode(), "metrics": (folder / "metrics.jsonl").read_bytes()}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" or path.name == "state.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    assert len(found) >= 5
    return found


def assert_resumes(reference, monkeypatch, make, step: int) -> None:
    """Assert that a run that crashes after this number of steps and is resumed ends like the reference."""
    with monkeypatch.context() as patch:
        before_step(patch, step, crash)
        with pytest.raises(Crash):
            train(make("stopped"))
    assert not (Path(make("stopped").output_dir) / "results.json").exists()
    train(make("stopped"), resume=True)
    assert what_counts(make("stopped").output_dir) == what_counts(reference)


CASES = {
    "between epochs": (6, {}),
    "before the first checkpoint": (2, {}),
    "within an epoch": (5, {"save_steps": 2}),
    "between evaluations": (8, {"save_steps": 1, "eval_steps": 4, "logging_steps": 3}),
    "accumulation": (5, {"save_steps": 2, "gradient_accumulation_steps": 4}),
    "by length": (7, {"save_steps": 1, "group_by_length": True}),
    "mlp": (5, {"save_steps": 2, "adapter": {**PREFIX, "prefix_projection": True}, "learning_rate": 1e-3}),
    "cosine": (5, {"save_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}),
    "exponential": (7, {"save_steps": 1, "lr_scheduler_type": "exponential", "lr_scheduler_kwargs": {"gamma": 0.5}}),
    "lora": (5, {"save_steps": 2, "adapter": {"peft_type": "LORA", "lora_dropout": 0.1, "r": 2}}),
    "prompt": (5, {"save_steps": 2, "adapter": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}),
    "full": (5, {"save_steps": 2, "adapter": {"peft_type": "FULL"}, "learning_rate": 1e-3}),
    "head": (5, {"save_steps": 2, "adapter": {"peft_type": "HEAD"}}),
    "checkpointing": (5, {"save_steps": 2, "gradient_checkpointing": True}),
    "patience": (5, {"save_steps": 1, "early_stopping_patience": 2, "eval_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(dropping, few, tmp_path, monkeypatch, case):
    step, changes = CASES[case]

    def make(name):
        return recipe(dropping, few, tmp_path / name, **{**NINE_STEPS, **changes})

    train(make("whole"))
    assert_resumes(tmp_path / "whole", monkeypatch, make, step)


def test_a_data_loader_left_at_its_end_changes_no_step(dropping, few, tmp_path):
    """As that of a `Trainer` that has trained before, in a notebook."""
    settings = {**NINE_STEPS, "gradient_accumulation_steps": 4}
    train(recipe(dropping, few, tmp_path / "before", **settings))
    rows = iter(Accelerator().prepare(DataLoader(range(2))))
    next(rows), next(rows)
    train(recipe(dropping, few, tmp_path / "behind", **settings))
    assert GradientState().end_of_dataloader
    assert what_counts(tmp_path / "before") == what_counts(tmp_path / "behind")


def test_metrics_after_the_checkpoint_are_removed(dropping, few, tmp_path, monkeypatch):
    def make(name):
        return recipe(dropping, few, tmp_path / name, **NINE_STEPS)

    train(make("whole"))
    original = checkpoint.save

    def save(checkpoints, step, *args):
        if step == 6:
            raise Crash
        original(checkpoints, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(Crash):
            train(make("stopped"))
    recorded = tmp_path / "stopped" / "metrics.jsonl"
    assert {line["step"] for line in lines(tmp_path / "stopped")} == {2, 3, 4, 6}
    assert checkpoint.saved_steps(tmp_path / "stopped" / "checkpoints") == [3]
    recorded.write_text(recorded.read_text()[:-20])  # the last line was cut off, too
    train(make("stopped"), resume=True)
    assert what_counts(tmp_path / "stopped") == what_counts(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(dropping, few, tmp_path, monkeypatch, number):
    train(recipe(dropping, few, tmp_path / "whole", **NINE_STEPS))
    stopped = recipe(dropping, few, tmp_path / "stopped", **NINE_STEPS)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for step in (1, 4):  # stopped twice, the second time after resuming
        with monkeypatch.context() as patch:
            before_step(patch, step, lambda: os.kill(os.getpid(), number))
            with pytest.raises(TrainingInterrupted, match=r"after step [0-9] of 9") as error:
                train(stopped, resume=step > 1)
        assert f"prefix-adapter train --resume {tmp_path / 'stopped'}" in str(error.value)
        assert error.value.signal_number == number
        assert {each: signal.getsignal(each) for each in handlers} == handlers
        # At most one more step is trained after the signal.
        assert step < checkpoint.saved_steps(tmp_path / "stopped" / "checkpoints")[-1] <= step + 2
    train(stopped, resume=True)
    assert what_counts(tmp_path / "stopped") == what_counts(tmp_path / "whole")


def test_a_second_signal_ends_the_run_at_once(dropping, few, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before_step(monkeypatch, 4, twice)
    # A shell may start a background process with this signal ignored. Then the second one is ignored too.
    handler = signal.default_int_handler
    inherited = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe(dropping, few, tmp_path / "out", **NINE_STEPS))
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-000003"]


def test_a_finished_run_is_not_trained_again(dropping, few, tmp_path, monkeypatch):
    results = train(recipe(dropping, few, tmp_path / "out", **NINE_STEPS))
    before = what_counts(tmp_path / "out")
    monkeypatch.setattr(Loop, "_train_step", crash)
    again = train(recipe(dropping, few, tmp_path / "out", **NINE_STEPS), resume=True)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
    assert what_counts(tmp_path / "out") == before


def test_other_logging_steps_in_a_resumed_run(dropping, few, tmp_path, monkeypatch):
    settings = {**NINE_STEPS, "save_steps": 1, "logging_steps": 100}
    with monkeypatch.context() as patch:
        before_step(patch, 5, crash)
        with pytest.raises(Crash):
            train(recipe(dropping, few, tmp_path / "out", **settings))
    train(recipe(dropping, few, tmp_path / "out", **{**settings, "logging_steps": 2}), resume=True)
    assert [line["step"] for line in lines(tmp_path / "out") if line["split"] == "train"] == [6, 8]


def test_a_run_is_a_function_of_its_seed(dropping, few, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(recipe(dropping, few, tmp_path / name, **NINE_STEPS, seed=seed))
        torch.rand(3)  # other code draws random numbers
    assert what_counts(tmp_path / "a") == what_counts(tmp_path / "b")
    a, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ac")
    assert all(not torch.equal(a[name], c[name]) for name in a)


def train_scripted(monkeypatch, accuracies: list[float], run) -> dict:
    """Train, and replace the accuracies of the first evaluations by these."""
    coming, original = iter(accuracies), objective.evaluate

    def evaluate(*args):
        metrics, answers = original(*args)
        return {**metrics, "accuracy": next(coming, metrics["accuracy"])}, answers

    with monkeypatch.context() as patch:
        patch.setattr(objective, "evaluate", evaluate)
        return train(run)


def test_the_best_adapter_is_left_not_the_last(dropping, few, tmp_path, monkeypatch):
    settings = {**NINE_STEPS, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    whole = recipe(dropping, few, tmp_path / "whole", **settings)
    results = train_scripted(monkeypatch, [0.1, 0.9, 0.9], whole)
    assert results["best_step"] == 6 and results["validation"]["accuracy"] == 0.9
    # The same run, but it ends at step 6.
    train_scripted(monkeypatch, [0.1, 0.9], recipe(dropping, few, tmp_path / "short", **settings, max_steps=6))
    best, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "short"))
    last = load_file(tmp_path / "whole" / "checkpoints" / "step-000009" / "adapter_model.safetensors")
    assert best.keys() == expected.keys() == last.keys()
    assert all(torch.equal(best[name], expected[name]) for name in best)
    assert not any(torch.equal(best[name], last[name]) for name in best)
    assert sorted(os.listdir(tmp_path / "whole" / "checkpoints")) == ["step-000006", "step-000009"]


def test_the_lowest_loss_can_be_the_best(dropping, few, tmp_path):
    results = train(recipe(dropping, few, tmp_path / "out", **NINE_STEPS, metric_for_best_model="loss", eval_steps=1))
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "out") if line["split"] == "validation"}
    assert len(losses) == 9
    assert results["best_step"] == min(losses, key=losses.get)
    assert results["validation"]["loss"] == min(losses.values())


def test_early_stopping(dropping, few, tmp_path, monkeypatch):
    settings = {**NINE_STEPS, "eval_steps": 1, "early_stopping_patience": 3}
    stopping = recipe(dropping, few, tmp_path / "out", **settings)
    results = train_scripted(monkeypatch, [0.5, 0.6, 0.6, 0.1, 0.6], stopping)
    assert results["best_step"] == 2 and results["steps"] == 5 and "test" in results
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    before = what_counts(tmp_path / "out")
    monkeypatch.setattr(Loop, "_train_step", crash)
    again = train(recipe(dropping, few, tmp_path / "out", **settings), resume=True)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
    assert what_counts(tmp_path / "out") == before


def test_metrics_are_those_of_plain_forwards(tiny_bert, few, tmp_path):
    # Rows of different lengths are in one batch, and the last batch is not full.
    results = train(recipe(tiny_bert, few, tmp_path / "out", **NINE_STEPS, eval_batch_size=4))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for split, rows in (("validation", topic_rows(9, 100)), ("test", topic_rows(7, 200))):
        with torch.no_grad():
            logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
        true = ["ab".index(row["label"]) for row in rows]
        guess = logits.argmax(-1).tolist()
        expected = {
            "loss": cross_entropy(logits, torch.tensor(true)).item(),
            "accuracy": accuracy_score(true, guess),
            "f1_macro": f1_score(true, guess, average="macro"),
            "matthews_correlation": matthews_corrcoef(true, guess),
        }
        assert results[split] == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_recorded(dropping, few, tmp_path, monkeypatch):
    losses, original = [], Loop._train_step

    def train_step(self, batch):
        losses.append(original(self, batch))
        return losses[-1]

    monkeypatch.setattr(Loop, "_train_step", train_step)
    train(recipe(dropping, few, tmp_path / "out", **{**NINE_STEPS, "logging_steps": 4, "warmup_ratio": 0.5}))
    recorded = [line for line in lines(tmp_path / "out") if line["split"] == "train"]
    assert [line["step"] for line in recorded] == [4, 8]
    for line, own in zip(recorded, (losses[:4], losses[4:8]), strict=True):
        assert line["loss"] == pytest.approx(sum(own).item() / 4)
        assert line["epoch"] == pytest.approx(line["step"] / 3, abs=1e-3)
    # The rates of the step: they rise for 4 of 9 steps, then fall to 0.
    assert recorded[0]["learning_rate/adapter"] == pytest.approx(0.03 * 3 / 4)
    assert recorded[1]["learning_rate/head"] == pytest.approx(0.02 * 2 / 5)


def test_trackers(dropping, few, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(recipe(dropping, few, tmp_path / "out", **NINE_STEPS, report_to=["tensorboard"]))
    events = {}
    for path in (tmp_path / "out" / "logs").rglob("events.*"):
        reader = accumulator.EventAccumulator(str(path)).Reload()
        for tag in reader.Tags()["scalars"]:
            events |= {(tag, event.step): event.value for event in reader.Scalars(tag)}
    expected = {
        (f"{line['split']}/{name}", line["step"]): value
        for line in lines(tmp_path / "out")
        for name, value in line.items()
        if name not in ("step", "epoch", "split")
    }
    assert len(expected) > 20
    assert events == pytest.approx(expected, rel=1e-6)  # tensorboard has single precision


def test_files_of_weights_and_biases(tiny_bert, few, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(recipe(tiny_bert, few, tmp_path / "out", max_steps=1, report_to=["wandb"]))
    assert list((tmp_path / "out" / "logs").rglob("*.wandb"))
    assert not (tmp_path / "wandb").exists()


def finite(folder: Path) -> bool:
    return all(tensor.isfinite().all() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def test_a_rate_that_is_far_too_high(tiny_bert, few, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TrainingDiverged, match=r"loss of the validation rows became nan.*`learning_rate`.*e\+29"):
        train(recipe(tiny_bert, few, out, **NINE_STEPS, learning_rate=1e30, warmup_ratio=0, eval_steps=1))
    assert not (out / "checkpoints").exists() and not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_not_saved(tiny_bert, few, tmp_path, monkeypatch, what):
    out = tmp_path / "out"
    original, calls = SequenceClassification.loss, []

    def loss(self, model, batch):
        value, output = original(self, model, batch)
        if model.training:
            calls.append(value)
            if len(calls) == 5:
                value = value * torch.nan if what == "loss" else value + (value - value.detach()).sqrt()
        return value, output

    monkeypatch.setattr(SequenceClassification, "loss", loss)
    with pytest.raises(TrainingDiverged, match=r"checkpoint of step 4 .*`learning_rate`.*`warmup_ratio`"):
        train(recipe(tiny_bert, few, out, **NINE_STEPS, save_steps=1))
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000003", "step-000004"]  # the best, and the last
    assert all(finite(folder) for folder in (out / "checkpoints").iterdir())
    assert {line["step"] for line in lines(out)} == {2, 3, 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric_for_best_model": "bleu"}, r"`metric_for_best_model`.*'bleu'.*'accuracy'"),
        ({"report_to": ["tensorbored"]}, r"`report_to`.*'tensorbored'.*tensorboard"),
        ({"lr_scheduler_type": "nonlinear"}, r"`lr_scheduler_type` 'nonlinear'"),
        ({"max_length": 80}, r"longest training row, 72 tokens \(`max_length` is 80\).*64"),
        (
            {"max_length": 80, "adapter": {"peft_type": "FULL"}},
            r"longest training row, 72 tokens \(`max_length` is 80\).*64",
        ),
    ],
)
def test_bad_settings_are_an_error_before_anything_changes(tiny_bert, few, tmp_path, changes, said):
    train(recipe(tiny_bert, few, tmp_path / "out", **{**NINE_STEPS, "max_steps": 1}))
    before = what_counts(tmp_path / "out")
    rows = [*topic_rows(23), {"text": "w1 " * 70, "label": "a"}]
    few["train"] = write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(RecipeError, match=said):
        train(recipe(tiny_bert, few, tmp_path / "out", **{**NINE_STEPS, **changes}), overwrite=True)
    assert what_counts(tmp_path / "out") == before
