"""Hyperparameter search: trials, outputs and interruptions."""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from conftest import topic_rows, write_rows
from filelock import FileLock
from PIL import Image
from test_checkpoint import in_child, was_killed

from prefix_adapter import PrefixTuningV2Config
from prefix_adapter.cli import main
from prefix_adapter.training import (
    Data,
    DataError,
    Recipe,
    RecipeError,
    TrainingDiverged,
    TrainingInterrupted,
    load_recipe,
    train,
)
from prefix_adapter.training.search_space import DEFAULT_SPACE

module = importlib.import_module("prefix_adapter.training.search")
Search, search = module.Search, module.search
RATES = {"learning_rate": {"low": 1e-3, "high": 0.1, "log": True}}


@pytest.fixture
def recipe(tiny_bert, topics, tmp_path) -> Recipe:
    topics["test"] = write_rows(tmp_path / "test.jsonl", topic_rows(12, 300))
    return Recipe(
        task="sequence-classification",
        model=tiny_bert,
        output_dir=str(tmp_path / "out"),
        data=Data(**topics),
        adapter={"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 24},
        batch_size=8,
        num_train_epochs=3,
        max_length=16,
        head_learning_rate=0.02,
    )


@pytest.fixture
def fake(monkeypatch):
    """Replace `train` by a function that evaluates three times, with metrics from a function of the recipe."""

    def install(score) -> list[Recipe]:
        seen = []

        def train(recipe, *, quiet, on_evaluation):
            Path(recipe.output_dir).mkdir(parents=True)
            seen.append(recipe)
            base = score(recipe)
            for step in (10, 20, 30):
                metrics = {"accuracy": base * step, "loss": base * step}
                on_evaluation(step, metrics)
            return {"validation": metrics}

        monkeypatch.setattr(module, "train", train)
        monkeypatch.setattr(module, "_draw_plots", lambda *arguments: None)
        monkeypatch.setattr(module, "clear_device_cache", lambda **settings: None)
        return seen

    return install


def table(recipe: Recipe) -> list[dict[str, str]]:
    with open(Path(recipe.output_dir) / "trials.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def trials(recipe: Recipe):
    return optuna.load_study(study_name=None, storage=f"sqlite:///{recipe.output_dir}/study.db").trials


def test_outputs_of_a_search(recipe):
    space = {
        "adapter.prefix_projection": [False, True],
        "learning_rate": {"low": 0.01, "high": 0.05},
        "adapter.encoder_hidden_size": {"when": {"adapter.prefix_projection": True}, "choices": [8, 16]},
        "adapter.layers_to_transform": [[0, 2], None],
        "num_train_epochs": {"low": 1, "high": 2, "type": "float"},
    }
    report = search(recipe, Search(space, n_trials=4, seed=5))
    out = Path(recipe.output_dir)
    values = {}
    for number, row in enumerate(table(recipe)):
        folder = out / "trials" / str(number)
        used, results = load_recipe(folder / "recipe.yaml"), json.loads((folder / "results.json").read_text())
        values[number] = results["validation"]["accuracy"]
        assert float(row["accuracy"]) == values[number] and row["state"] == "complete"
        assert float(row["learning_rate"]) == used.learning_rate and 0.01 <= used.learning_rate <= 0.05
        assert used.adapter["layers_to_transform"] in ([0, 2], None)
        assert used.adapter.get("encoder_hidden_size") in ((8, 16) if used.adapter["prefix_projection"] else (None,))
        assert 1 < used.num_train_epochs < 2
        assert "test" not in results and used.data.test is None  # no trial may see the test rows
        assert used.batch_size == recipe.batch_size and used.adapter["num_virtual_tokens"] == 4
    assert {row["adapter.prefix_projection"] for row in table(recipe)} == {"False", "True"}
    assert len(values) == 4 == report["complete"] and not report["failed"] + report["pruned"] + report["interrupted"]
    assert report["best_value"] == max(values.values()) == values[report["best_trial"]]

    best = load_recipe(out / "best.yaml")
    assert best.data == recipe.data and best.output_dir == str(out / "best")
    assert best.learning_rate == report["best_params"]["learning_rate"]
    results = train(best)
    assert results["validation"]["accuracy"] == report["best_value"] and results["rows"]["test"] == 12

    for name in ("history", "importances", "slice", "parallel"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(2**20)) > 50


def test_the_hook_sees_every_evaluation(recipe):
    seen = []
    train(recipe, on_evaluation=lambda step, metrics: seen.append({"step": step, **metrics}))
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in lines if line.pop("split") == "validation" and line.pop("epoch")]
    assert len(seen) == 3 and seen == expected


def test_killed_and_resumed(recipe, tmp_path, monkeypatch):
    def killing(recipe, quiet, on_evaluation):
        def hook(step, metrics):
            on_evaluation(step, metrics)
            if recipe.output_dir.endswith("2") and step > 6:
                os.kill(os.getpid(), signal.SIGKILL)

        return train(recipe, on_evaluation=hook)

    def work():
        monkeypatch.setattr(module, "train", killing)
        search(recipe, Search(RATES, n_trials=4))

    assert was_killed(in_child(work, tmp_path / "report"), tmp_path / "report")
    before = trials(recipe)
    assert [trial.state.name for trial in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    report = search(recipe, Search(RATES, n_trials=4), resume=True)
    after = trials(recipe)
    assert [trial.state.name for trial in after] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert after[:2] == before[:2] and after[3].params == before[2].params
    assert len({trial.params["learning_rate"] for trial in after}) == 4
    assert (report["complete"], report["interrupted"]) == (4, 1)
    assert not (Path(recipe.output_dir) / "trials" / "2").exists()


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_poor_trials_are_pruned(recipe, fake, metric):
    recipe.metric_for_best_model = metric
    fake(lambda own: own.learning_rate)
    report = search(recipe, Search(RATES, n_trials=12, sampler="random"))
    sign = 1 if metric == "accuracy" else -1
    complete = []
    for row, trial in zip(table(recipe), trials(recipe), strict=True):
        rate = float(row["learning_rate"])
        # Optuna's median pruner prunes nothing in five trials, then compares with the median of the complete ones.
        poor = len(complete) >= 5 and sign * rate < sign * statistics.median(complete)
        assert row["state"] == ("pruned" if poor else "complete")
        assert len(trial.intermediate_values) == (1 if poor else 3)
        assert float(row[metric]) == pytest.approx(rate * (10 if poor else 30))
        complete += [] if poor else [rate]
    assert 0 < report["pruned"] == 12 - len(complete)
    assert report["best_params"]["learning_rate"] == sign * max(sign * rate for rate in complete)


@pytest.mark.parametrize("pruner", ["hyperband", "none"])
def test_other_pruners(recipe, fake, pruner):
    fake(lambda own: own.learning_rate)
    report = search(recipe, Search(RATES, n_trials=12, sampler="random", pruner=pruner))
    assert (report["pruned"] > 0) == (pruner == "hyperband") and report["complete"] + report["pruned"] == 12


def test_trials_that_fail_do_not_end_the_search(recipe, fake):
    def score(own):
        if own.batch_size == 2:
            raise TrainingDiverged("too steep")
        if own.batch_size == 4:
            raise torch.OutOfMemoryError("too big")
        return math.nan if own.batch_size == 6 else 0.01

    fake(score)
    report = search(recipe, Search({"batch_size": [2, 4, 6, 8]}, sampler="grid", pruner="none", keep_trials=False))
    assert (report["complete"], report["failed"]) == (1, 3) and report["best_params"] == {"batch_size": 8}
    errors = {row["batch_size"]: row["error"] for row in table(recipe)}
    assert errors.pop("6") and errors == {"2": "too steep", "4": "too big", "8": ""}
    assert not list((Path(recipe.output_dir) / "trials").iterdir())  # `keep_trials`


def test_search_without_a_complete_trial(recipe, fake):
    def score(own):
        raise TrainingDiverged("too steep")

    fake(score)
    with pytest.raises(RecipeError, match="no trial could be completed"):
        search(recipe, Search(RATES, n_trials=2))
    assert [row["error"] for row in table(recipe)] == ["too steep"] * 2


@pytest.mark.parametrize("error", [RecipeError("`lr_scheduler_type`: none of that name"), DataError("row 3")])
def test_an_error_in_a_trial_ends_the_search(recipe, fake, error):
    def score(own):
        raise error

    seen = fake(score)
    with pytest.raises(type(error), match=str(error)):
        search(recipe, Search(RATES))
    assert len(seen) == 1


def test_default_space(recipe, fake):
    seen = fake(lambda own: 0.01)
    search(recipe, Search(n_trials=12, sampler="random", pruner="none"))
    for own in seen:
        PrefixTuningV2Config(**{key: value for key, value in own.adapter.items() if key != "peft_type"})
        mlp = own.adapter["prefix_projection"]
        assert own.adapter.get("encoder_hidden_size") == (24 if mlp else None)
        assert (1e-4 <= own.learning_rate <= 3e-3) if mlp else (3e-3 <= own.learning_rate <= 2e-1)
    assert {own.adapter["prefix_projection"] for own in seen} == {False, True}
    assert len({own.adapter["num_virtual_tokens"] for own in seen}) > 5


@pytest.mark.parametrize("mlp", [False, True])
def test_default_space_of_a_prefix_that_starts_from_something(recipe, fake, mlp):
    """The start fixes its length and whether it is a table."""
    seen = fake(lambda own: 0.01)
    adapter = {"num_virtual_tokens": 3, **({"prefix_projection": True, "encoder_hidden_size": 24} if mlp else {})}
    start = dataclasses.replace(recipe, init_from="somewhere", adapter=adapter)
    search(start, Search(n_trials=6, sampler="random", pruner="none"))
    assert all(own.init_from == "somewhere" and own.adapter.items() >= adapter.items() for own in seen)
    low, high = (1e-4, 3e-3) if mlp else (3e-3, 2e-1)
    assert all(low <= own.learning_rate <= high for own in seen)
    assert len({own.learning_rate for own in seen}) == 6


@pytest.mark.parametrize(
    ("fixed", "varied"),
    [
        (["adapter.num_virtual_tokens"], {"adapter.prefix_projection", "learning_rate"}),
        (["learning_rate", "adapter.prefix_dropout"], {"adapter.prefix_projection", "adapter.num_virtual_tokens"}),
        (["adapter.prefix_projection"], {"learning_rate", "adapter.num_virtual_tokens"}),
        (["adapter.encoder_hidden_size", "seed"], {*DEFAULT_SPACE}),
    ],
)
def test_the_default_space_leaves_what_is_fixed(recipe, fake, fixed, varied):
    seen = fake(lambda own: 0.01)
    start = recipe.with_values(
        {"learning_rate": 5e-4, "adapter.prefix_dropout": 0.25, "adapter.num_virtual_tokens": 300}
    )
    search(start, Search(n_trials=8, sampler="random", pruner="none", fixed=fixed))
    for key in (*DEFAULT_SPACE, "adapter.prefix_dropout", "seed"):
        found = {_value(own, key) for own in seen}
        assert (found != {_value(start, key)}) == (key in varied), key
    if "adapter.prefix_projection" in fixed:
        assert all(1e-4 <= own.learning_rate <= 3e-3 for own in seen)
    assert {own.adapter.get("encoder_hidden_size") for own in seen if own.adapter["prefix_projection"]} == {24}


def _value(recipe, key):
    value = recipe.to_dict()
    for part in key.split("."):
        value = value.get(part)
    return value


def test_keys_that_are_fixed_and_varied_are_refused(recipe):
    with pytest.raises(RecipeError, match=r"`learning_rate` is set, and `space` varies `learning_rate`"):
        search(recipe, Search(RATES, fixed=["learning_rate"]))
    with pytest.raises(RecipeError, match=r"`adapter` is set, and `space` varies `adapter.num_virtual_tokens`"):
        search(recipe, Search({"adapter.num_virtual_tokens": [1, 2]}, fixed=["adapter"]))
    with pytest.raises(RecipeError, match=r"you set all keys that the default space varies"):
        search(recipe, Search(fixed=[*DEFAULT_SPACE]))


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        (["--adapter.num_virtual_tokens", "7"], ["adapter.num_virtual_tokens"]),
        (
            ["--adapter.num_virtual_tokens=7", "--learning_rate", "0.1"],
            ["adapter.num_virtual_tokens", "learning_rate"],
        ),
        (["--adapter", "{num_virtual_tokens: 7}"], ["adapter.num_virtual_tokens"]),
        (["--search.fixed", "[seed]", "--learning_rate", "0.1"], ["seed", "learning_rate"]),
        ([], []),
    ],
)
def test_options_of_the_command_line_are_fixed(recipe, tmp_path, monkeypatch, capsys, options, fixed):
    recipe.save(tmp_path / "mine.yaml")
    called = []
    monkeypatch.setattr(module, "search", lambda *arguments, **more: called.append(arguments) or {})
    main(["search", "--config", str(tmp_path / "mine.yaml"), "--search.n_trials", "3", *options])
    ((made, settings),) = called
    assert settings.fixed == fixed and settings.n_trials == 3
    assert made.adapter["num_virtual_tokens"] == (7 if "adapter.num_virtual_tokens" in fixed else 4)


def test_default_space_is_for_a_prefix(recipe):
    recipe.adapter = {"peft_type": "LORA"}
    with pytest.raises(RecipeError, match=r"`space`.*LORA"):
        search(recipe, Search())


GRID = {
    "adapter.prefix_projection": [False, True],
    "adapter.prefix_dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
    "adapter.encoder_hidden_size": {"when": {"adapter.prefix_projection": True}, "low": 8, "high": 10},
}


def test_interrupted_grid_is_completed(recipe, fake):
    count = itertools.count(1)

    def score(own):
        if next(count) == 5:
            raise TrainingInterrupted("stop", signal.SIGTERM)
        return 0.01

    seen = fake(score)
    settings = Search(GRID, n_trials=100, sampler="grid", pruner="none", seed=1)
    with pytest.raises(TrainingInterrupted, match=r"4 of 16 trials are finished.*--resume") as caught:
        search(recipe, settings)
    assert caught.value.signal_number == signal.SIGTERM
    report = search(recipe, settings, resume=True)
    tables = [(False, dropout, None) for dropout in (0.0, 0.1, 0.2, 0.3)]
    mlps = list(itertools.product([True], (0.0, 0.1, 0.2, 0.3), (8, 9, 10)))
    names = ("prefix_projection", "prefix_dropout", "encoder_hidden_size")
    finished = seen[:4] + seen[5:]
    tried = [tuple(own.adapter.get(name) for name in names) for own in finished]
    assert sorted(tried, key=str) == sorted(tables + mlps, key=str)
    assert (report["complete"], report["interrupted"]) == (16, 1)


def test_grid_interrupted_while_it_is_made(recipe, fake, monkeypatch):
    seen = fake(lambda own: 0.01)
    count, enqueue = itertools.count(1), optuna.Study.enqueue_trial

    def interrupted(*arguments, **settings):
        if next(count) == 3:
            raise KeyboardInterrupt
        enqueue(*arguments, **settings)

    settings = Search({"batch_size": [2, 4, 6, 8]}, sampler="grid")
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted, match="0 of 4 trials"):
        patch.setattr(optuna.Study, "enqueue_trial", interrupted)
        search(recipe, settings)
    search(recipe, settings, resume=True)
    assert sorted(own.batch_size for own in seen) == [2, 4, 6, 8]


def test_grid_takes_n_trials_at_most(recipe, fake):
    seen = fake(lambda own: 0.01)
    search(recipe, Search(GRID, n_trials=3, sampler="grid"))
    assert len(seen) == 3


def test_seed(recipe, fake, tmp_path):
    seen = fake(lambda own: own.learning_rate)
    search(recipe, Search(RATES, n_trials=3))
    search(recipe, Search(RATES, n_trials=6), resume=True)
    recipe.output_dir = str(tmp_path / "again")
    search(recipe, Search(RATES, n_trials=3))
    recipe.output_dir = str(tmp_path / "other")
    search(recipe, Search(RATES, n_trials=3, seed=1))
    assert all(trial.distributions["learning_rate"].log for trial in trials(recipe))
    rates = [own.learning_rate for own in seen]
    assert len(set(rates[:6])) == 6  # a resumed search draws new values
    assert rates[6:9] == rates[:3] and not set(rates[9:]) & set(rates[:3])


def test_interrupted_by_a_signal(recipe, monkeypatch):
    """The signal comes during a real training, which stops after the step."""

    def interrupting(recipe, quiet, on_evaluation):
        return train(recipe, on_evaluation=lambda step, metrics: os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(module, "train", interrupting)
    with pytest.raises(TrainingInterrupted, match=r"0 of 2 trials are finished.*--resume") as caught:
        search(recipe, Search(RATES, n_trials=2))
    assert caught.value.signal_number == signal.SIGINT


def test_interrupted_outside_training(recipe, fake):
    def score(own):
        raise KeyboardInterrupt

    fake(score)
    with pytest.raises(TrainingInterrupted, match="--resume") as caught:
        search(recipe, Search(RATES, n_trials=2))
    assert caught.value.signal_number == signal.SIGINT


def test_timeout(recipe, fake, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now[0]))

    def score(own):
        now[0] += 10
        return 0.01

    assert len(fake(score)) == 0
    assert search(recipe, Search(RATES, n_trials=9, timeout=25))["complete"] == 3


BAD = [
    ({}, "space` is empty"),
    ({"learning_rat": [1e-3]}, "space.learning_rat`"),
    ({"adapter.num_tokens": [8]}, "space.adapter.num_tokens`.*no such setting"),
    ({"learning_rate.x": [1]}, "space.learning_rate.x`.*must be a mapping"),
    ({"data.train": ["a", "b"]}, "space.data.train`.*same in all"),
    ({"output_dir": ["a", "b"]}, "space.output_dir`.*same in all"),
    ({"batch_size": 8}, "space.batch_size`.*list of choices"),
    ({"batch_size": []}, "space.batch_size`.*one or more"),
    ({"batch_size": [8, 8]}, "space.batch_size`.*differ"),
    ({"batch_size": [8, -1]}, "space.batch_size`: -1"),
    ({"batch_size": {"low": 0.5, "high": 8}}, "(?s)space.batch_size`: 0.5.*int"),
    ({"batch_size": {"low": 1}}, "space.batch_size`.*`high` must be a number"),
    ({"batch_size": {"low": 8, "high": 1}}, r"space.batch_size`.*low=8.*high=1"),
    ({"batch_size": {"low": 1, "high": 8, "lgo": True}}, "space.batch_size`.*'lgo'"),
    ({"batch_size": {"low": 1, "high": 8, "type": "integer"}}, "space.batch_size`.*`type`"),
    ({"learning_rate": {"low": 0, "high": 0.1, "log": True}}, "space.learning_rate`.*log"),
    ({"learning_rate": {"low": "a", "high": 0.1}}, "space.learning_rate`.*'a'"),
    ({"adapter.prefix_dropout": {"low": 0.0, "high": 1.0}}, r"space.adapter.prefix_dropout`: 1.0.*\[0, 1\)"),
    ({"adapter.prefix_projection": [True, False]}, "space.adapter.prefix_projection`: False.*encoder_hidden_size"),
    ({"batch_size": {"choices": 8}}, "space.batch_size`: `choices` must be a list"),
    ({"batch_size": {"when": 8, "choices": [8]}}, "space.batch_size`: `when` must be a mapping"),
    ({"task_kwargs.nope": [1]}, "space.task_kwargs.nope`.*no such setting"),
    ({"seed": {"when": {"batch_size": 8}, "choices": [1]}, "batch_size": [8]}, "space.seed`.*'batch_size' must"),
    ({"batch_size": [8], "seed": {"when": {"batch_size": 4}, "choices": [1]}}, "space.seed`.*4 is none of"),
    (
        {
            "batch_size": [8, 4],
            "warmup_ratio": [0.0, 0.1],
            "seed": [
                {"when": {"batch_size": 4}, "choices": [1]},
                {"when": {"warmup_ratio": 0.1}, "choices": [2]},
            ],
        },
        "space.seed`.*at once",
    ),
]


@pytest.mark.parametrize(("space", "message"), BAD)
def test_bad_spaces(recipe, space, message):
    with pytest.raises(RecipeError, match=message):
        search(recipe, Search(space))
    assert not Path(recipe.output_dir).exists()


def test_grid_needs_steps(recipe):
    with pytest.raises(RecipeError, match=r"space.learning_rate`.*`step`"):
        search(recipe, Search(RATES, sampler="grid"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("n_trials", 0), ("n_jobs", 0), ("timeout", 0), ("sampler", "best"), ("pruner", "worst")],
)
def test_bad_settings(setting, value):
    with pytest.raises(RecipeError, match=f"`{setting}`"):
        Search(**{setting: value})


def test_bad_rows_and_storage(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"`storage`: 'nonsense'"):
        search(recipe, Search(RATES, storage="nonsense"))
    recipe.data.train = write_rows(tmp_path / "bad.jsonl", [{"text": 3, "label": "a"}])
    with pytest.raises(DataError, match="row 1"):
        search(recipe, Search(RATES))


def test_output_folder_of_a_search(recipe, fake, tmp_path):
    fake(lambda own: own.learning_rate)
    out = Path(recipe.output_dir)
    with pytest.raises(RecipeError, match="`output_dir`: there is no search to resume"):
        search(recipe, Search(RATES), resume=True)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"`output_dir`.*not empty"):
        search(recipe, Search(RATES))
    (out / "thesis.txt").unlink()
    search(recipe, Search(RATES, n_trials=1))
    with pytest.raises(RecipeError, match=r"`output_dir`.*holds a search.*--resume"):
        search(recipe, Search(RATES, n_trials=1))
    with pytest.raises(RecipeError, match=r"`space`: .* was started with"):
        search(recipe, Search({"learning_rate": [1e-3]}, n_trials=2), resume=True)
    recipe.batch_size = 4
    with pytest.raises(RecipeError, match=r"`batch_size`: .* was started with 8, not 4"):
        search(recipe, Search(RATES, n_trials=2), resume=True)
    recipe.batch_size = 8
    with pytest.raises(RecipeError, match=r"`study_name`: .* no search 'other' to resume"):
        search(recipe, Search(RATES, study_name="other"), resume=True)
    with FileLock(out / ".search.lock"), pytest.raises(RecipeError, match="another search is running"):
        search(recipe, Search(RATES, n_trials=2), resume=True)
    assert search(recipe, Search(RATES, n_trials=2), resume=True)["complete"] == 2
    storage = f"sqlite:///{out}/study.db"
    recipe.output_dir = str(tmp_path / "other")
    with pytest.raises(RecipeError, match=r"`study_name`: the storage has a study"):
        search(recipe, Search(RATES, storage=storage))


@pytest.mark.parametrize("values", [{"learning_rate": 0.5, "adapter.init_std": 0.1, "data.test": None}, {"seed": 3}])
def test_with_values(recipe, tmp_path, values):
    recipe.save(tmp_path / "recipe.yaml")
    unchanged = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.with_values(values) == load_recipe(tmp_path / "recipe.yaml", **values)
    assert recipe == unchanged


def test_one_process_only(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="`n_jobs`"):
        search(recipe, Search(RATES))


def test_without_optuna(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "prefix-adapter\[search\]"'):
        search(recipe, Search(RATES))


def forks(monkeypatch) -> None:
    """Let a search fork its processes: a fork need not import everything again."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)


def test_several_processes(recipe, monkeypatch):
    forks(monkeypatch)
    recipe.max_steps = 1
    report = search(recipe, Search(RATES, n_trials=3, n_jobs=2, sampler="random", pruner="none"))
    done = trials(recipe)
    assert [trial.state.name for trial in done] == ["COMPLETE"] * 3 and report["complete"] == 3
    assert len({trial.params["learning_rate"] for trial in done}) == 3
    assert report["best_value"] == max(trial.value for trial in done)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_an_error_in_another_process(recipe, monkeypatch, start):
    """A batch of eight rows cannot be divided into three parts. Only a training finds this error."""
    if start == "fork":
        forks(monkeypatch)
    with pytest.raises(RecipeError, match="`batch_size`"):
        search(recipe, Search({"gradient_accumulation_steps": [3]}, n_trials=1, n_jobs=2))
