"""What a user sees of a run: the summary, the bar, a line for each evaluation; and the dry run."""

import dataclasses
import io
import json
import re

import pytest
import yaml
from conftest import topic_rows, write_rows
from test_run import recipe

from prefix_adapter.training import Data, DataError, Recipe, RecipeError, load_recipe, train
from prefix_adapter.training.progress import Progress


@pytest.fixture
def run(tiny_bert, topics, tmp_path):
    return recipe(
        tiny_bert,
        topics,
        tmp_path / "out",
        num_train_epochs=2,
        logging_steps=1,
        adapter={"num_virtual_tokens": 4, "lora_r": 2},
    )


def test_redirected_output_has_a_summary_and_a_line_for_each_evaluation(run, tmp_path, capsys):
    results = train(run)
    shown = capsys.readouterr().err
    assert "Training:" not in shown and "Evaluating:" not in shown and "\r" not in shown.partition("rows: ")[2]
    counts = results["rows"]
    assert f"rows: {counts['train']} train, {counts['validation']} validation" in shown
    assert "labels: a, b" in shown
    assert f"trained: {results['trained_parameters']:,} of " in shown
    assert "learning rate: 0.03, of the head 0.02" in shown
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line for line in lines if line["split"] == "validation"}
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
    found = re.findall(
        r"step (\d+) of (\d+): training loss (\S+); validation accuracy (\S+), loss (\S+), .*?( \(best so far\))?\n",
        shown,
    )
    assert [int(step) for step, *_ in found] == list(evaluations)
    for step, steps, training, accuracy, loss, best in found:
        expected = evaluations[int(step)]
        assert int(steps) == results["steps"]
        assert (accuracy, loss) == (f"{expected['accuracy']:.4f}", f"{expected['loss']:.4f}")
        assert training == f"{losses[int(step)]:.4f}"
        assert not best or int(step) <= results["best_step"]
    assert any(best and int(step) == results["best_step"] for step, *_, best in found)


def test_a_task_that_was_not_learned_is_seen(run, tmp_path, capsys):
    """The labels do not depend on the texts, and two of three are the same."""
    files = {}
    for split, count in (("train", 48), ("validation", 60)):
        rows = topic_rows(count, len(split))
        files[split] = write_rows(
            tmp_path / f"{split}-chance.jsonl", [{**row, "label": "ab"[i % 3 == 0]} for i, row in enumerate(rows)]
        )
    results = train(dataclasses.replace(run, data=Data(**files)))
    shown = capsys.readouterr().err
    assert "Warning: sequence-classification with" in shown and "was hardly learned: the validation accuracy" in shown
    assert "and 0.6667 with the same answer for every row" in shown and "as low or as high as 0.03" in shown
    assert results["constant_answer"] == {"accuracy": 40 / 60, "f1_macro": 0.4, "matthews_correlation": 0.0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation, the same answer for every row | 60 |  | 0.6667 | 0.4000 | 0.0000 |" in card
    train(dataclasses.replace(run, data=Data(**files)), quiet=True, overwrite=True)
    assert "hardly learned" not in capsys.readouterr().err


def test_a_task_that_was_learned_has_no_such_warning(run, capsys):
    results = train(dataclasses.replace(run, num_train_epochs=15))
    assert results["validation"]["accuracy"] > 0.9 > results["constant_answer"]["accuracy"]
    assert "hardly learned" not in capsys.readouterr().err


def test_quiet_shows_neither(run, capsys):
    train(run, quiet=True)
    shown = capsys.readouterr().err
    assert "validation" not in shown and "trained:" not in shown


@pytest.mark.parametrize(
    ("adapter", "rate", "unusual"),
    [
        ({"peft_type": "LORA"}, 3e-2, True),
        ({"peft_type": "FULL"}, 3e-2, True),
        ({"num_virtual_tokens": 4}, 3e-5, True),
        ({"num_virtual_tokens": 4}, 5e-3, False),
        ({"num_virtual_tokens": 4, "prefix_projection": True}, 1e-4, False),
        ({"peft_type": "LORA"}, None, False),
    ],
)
def test_a_rate_of_another_method_and_cut_rows_are_seen(run, capsys, adapter, rate, unusual):
    """The rate of a recipe stays when an option replaces its adapter."""
    train(dataclasses.replace(run, adapter=adapter, learning_rate=rate, max_length=4), dry_run=True)
    shown = capsys.readouterr().err
    assert ("Warning: `learning_rate`" in shown) == unusual
    assert re.search(r"longest input: 4 of at most 4 tokens; (\d+) of \1 reach max_length", shown)


def test_a_terminal_has_a_bar_with_loss_and_rates(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(10, 4, shown=True)
    progress.show_loss(0.51234, {"learning_rate/adapter": 0.03})
    for _ in range(6):
        progress.show_step()
    progress.show_evaluation(10, {"loss": 0.5, "f1": 0.25}, "f1", is_best=False)
    progress.close()
    shown = terminal.getvalue()
    assert "Training" in shown and "loss=0.5123" in shown and "learning_rate/adapter=3.00e-02" in shown
    assert "step 10 of 10: training loss 0.5123; validation f1 0.2500, loss 0.5000\n" in shown


def test_a_dry_run_prints_the_recipe_and_encoded_rows_and_writes_nothing(run, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert train(run, dry_run=True) == {}
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().err
    summary, _, text = shown.partition("The complete recipe:\n")
    assert len(re.findall(r"  text: \[CLS\] .* \[SEP\]\n  labels: [01]\n", summary)) == 2
    printed = Recipe.from_dict(yaml.safe_load(text))
    train(run, quiet=True)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").to_dict() == printed.to_dict()


def test_a_dry_run_finds_what_the_run_would_find(run, tmp_path):
    run.adapter["lora_r"] = -1
    with pytest.raises(RecipeError, match="`lora_r`"):
        train(run, dry_run=True)
    run.adapter["lora_r"] = 0
    run.data.columns = {"text": "no such column"}
    with pytest.raises(DataError, match="no such column"):
        train(run, dry_run=True)
    assert not (tmp_path / "out").exists()
