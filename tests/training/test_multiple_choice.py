"""Multiple choice: features, batches of rows with different numbers of choices, metrics, and a run."""

import gzip
import json
import random

import pytest
import torch
from conftest import save_base, write_rows
from datasets import Dataset
from programs import example
from sklearn.metrics import accuracy_score
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, DataError, Recipe, load_recipe, train
from prefix_adapter.training.evaluation import answer_rows, make_features
from prefix_adapter.training.model import load_base, load_tokenizer, wrap
from prefix_adapter.training.tasks.multiple_choice import MultipleChoice

CPU = torch.device("cpu")


def new_task(model, **changes) -> MultipleChoice:
    recipe = Recipe(**{"task": "multiple-choice", "model": model, "output_dir": "unused", **changes})
    return MultipleChoice(recipe, load_tokenizer(recipe))


def copa(shared, split="val") -> list[dict]:
    with gzip.open(shared / "data" / "copa" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def odd_rows(count: int, seed: int) -> list[dict]:
    """Two to five choices for a text. The right one has the words `w0` to `w4`."""
    rng, rows = random.Random(seed), []

    def words(first, last):
        return " ".join(f"w{rng.randrange(first, last)}" for _ in range(rng.randrange(1, 5)))

    for i in range(count):
        choices = [words(20, 80) for _ in range(2 + i % 4)]
        label = rng.randrange(len(choices))
        choices[label] = words(0, 5)
        rows.append({"text": words(20, 80), "choices": choices, "label": label})
    return rows


# Features


def test_copa_as_the_model_reads_it(shared, minilm):
    rows = copa(shared)[:30]
    task = new_task(minilm)
    table = Dataset.from_list(rows).rename_column("premise", "text")
    task.check(table, "rows")
    features = make_features(task, table, with_targets=True)
    plain = AutoTokenizer.from_pretrained(minilm)
    for row, feature in zip(rows, features, strict=True):
        assert feature["labels"] == row["label"]
        read = plain.batch_decode(feature["input_ids"])
        for text, choice in zip(read, (row["choice1"], row["choice2"]), strict=True):
            expected = f"[CLS] {row['premise']} [SEP] {row['question']} {choice} [SEP]"
            assert text == plain.decode(plain(expected, add_special_tokens=False)["input_ids"])
        for ids, types in zip(feature["input_ids"], feature["token_type_ids"], strict=True):
            middle = ids.index(plain.sep_token_id) + 1
            assert types == [0] * middle + [1] * (len(ids) - middle)
    assert list(features["row"]) == list(range(30))


def test_choices_in_a_list_or_in_columns(tiny_bert):
    task = new_task(tiny_bert, max_length=6)
    listed = {"text": "w1 w2 w3 w4 w5", "choices": ["w10", "w11", "w12"], "label": "w11"}
    apart = {"text": "w1 w2 w3 w4 w5", "choice9": "w12", "choice2": "w11", "choice0": "w10", "label": "1"}
    assert set(apart) <= {*task.columns, *task.optional_columns, task.target}
    results = [task.features(columns([row]), [0], True) for row in (listed, apart)]
    assert results[0] == results[1]
    assert results[0]["labels"] == [1]
    first, second = ["w1", "w2"], ["w10"]  # the room beside three special tokens and the choice
    ids = task.tokenizer.convert_tokens_to_ids(["[CLS]", *first, "[SEP]", *second, "[SEP]"])
    assert results[0]["input_ids"][0][0] == ids
    assert "labels" not in task.features(columns([{"text": "w1", "choices": ["w2", "w3"]}]), [0], False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' must be a text"),
        ({"question": None}, "'question' must be a text"),
        ({"choice2": None, "choice3": None}, "at least two choices"),
        ({"choice2": None}, "a choice must be a text that is not empty, got None"),
        ({"choice3": "  "}, "a choice must be a text"),
        ({"label": "3"}, "from 0 to 2, or its text, got '3'"),
        ({"label": "-1"}, "from 0 to 2"),
        ({"label": "nothing"}, "got 'nothing'"),
        ({"label": None}, "got None"),
        ({"choice1": "same", "choice3": "same", "label": "same"}, r"can mean each of the choices \[0, 2\]"),
        ({"choice1": "1", "label": "1"}, r"can mean each of the choices \[0, 1\]"),
    ],
)
def test_bad_rows(tiny_bert, changes, message):
    good = {
        "text": "one",
        "question": "who",
        "choice1": "two",
        "choice2": "three",
        "choice3": "four",
        "label": "three",
    }
    shorter = {**good, "choice3": None}
    task = new_task(tiny_bert)
    task.check(Dataset.from_list([good, shorter]), "rows")
    with pytest.raises(DataError, match=f"rows, row 3: .*{message}"):
        task.check(Dataset.from_list([good, shorter, {**good, **changes}]), "rows")


@pytest.mark.parametrize("label", [-1, 2, 1.5, None])
def test_a_number_that_is_no_choice(tiny_bert, label):
    row = {"text": "one", "choices": ["two", "three"], "label": label}
    assert "from 0 to 1" in new_task(tiny_bert).problem(row, with_targets=True)
    assert new_task(tiny_bert).problem(row, with_targets=False) is None


def test_more_choices_than_columns(tiny_bert):
    task, many = new_task(tiny_bert), {f"choice{number}": f"w{number}" for number in range(12)}
    assert "more than ten" in task.problem({"text": "one", **many, "label": 0}, with_targets=True)
    assert task.problem({"text": "one", "choices": list(many.values()), "label": 11}, with_targets=True) is None


def test_missing_columns(tiny_bert):
    task = new_task(tiny_bert)
    with pytest.raises(DataError, match="no column 'choices'"):
        task.check(Dataset.from_list([{"text": "one", "endings": ["two", "three"], "label": 0}]), "rows")
    with pytest.raises(DataError, match="no column 'label'"):
        task.check(Dataset.from_list([{"text": "one", "choices": ["two", "three"]}]), "rows")


# The model


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_rows_of_different_sizes_against_the_model_row_by_row(kind, tmp_path):
    base = save_base(tmp_path / "base", kind, "AutoModelForMultipleChoice")
    task, rows = new_task(base), odd_rows(9, seed=3)
    columned = task.features(columns(rows), list(range(9)), True)
    features = [dict(zip(columned, values, strict=True)) for values in zip(*columned.values(), strict=True)]
    batch = task.collate(features)
    model = AutoModelForMultipleChoice.from_pretrained(base).eval()
    loss, output = task.loss(model, batch)
    records, losses = task.outputs(model, batch, output), []
    assert task.outputs(model, {key: batch[key] for key in batch if key != "labels"}, None) == records
    for row, feature, record in zip(rows, features, records, strict=True):
        pad = task.tokenizer.pad({key: feature[key] for key in task.padded if key in feature}, return_tensors="pt")
        alone = model(**{key: value[None] for key, value in pad.items()}, labels=torch.tensor([row["label"]]))
        losses.append(alone.loss)
        probabilities = alone.logits[0].softmax(-1).tolist()
        answer = task.answer(row, [feature], [record])
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
        assert answer["choice"] == row["choices"][answer["prediction"]]
        assert max(probabilities) == probabilities[answer["prediction"]]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_head_is_trained(tiny_bert):
    task = new_task(tiny_bert)
    model = wrap(task.recipe, task, *load_base(task.recipe, task))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in names if "classifier" in name]
    assert all("classifier.modules_to_save" in name or "prefix_tuning_v2" in name for name in names)


def test_accuracy(tiny_bert):
    task, rng = new_task(tiny_bert), random.Random(0)
    numbers, guesses = [rng.randrange(3) for _ in range(20)], [rng.randrange(3) for _ in range(20)]
    answers = [{"prediction": guess, "choice": "xyz"[guess]} for guess in guesses]
    expected = accuracy_score(numbers, guesses)
    assert 0 < expected < 1
    for solutions in (numbers, [str(number) for number in numbers], ["xyz"[number] for number in numbers]):
        assert task.metrics(answers, solutions) == {"accuracy": expected}


@pytest.mark.parametrize("form", [int, str])
def test_the_same_answer_for_every_row(tiny_bert, form):
    """Of rows with two to five choices; a row with fewer choices has the last one."""
    task, rows = new_task(tiny_bert), [{**row, "label": form(row["label"])} for row in odd_rows(40, seed=2)]
    scores = []
    for option in range(5):
        answers = [min(option, len(row["choices"]) - 1) for row in rows]
        scores.append(sum(answer == int(row["label"]) for answer, row in zip(answers, rows, strict=True)) / 40)
    assert len(set(scores)) > 1
    found = task.constant_answers(rows)
    assert all(
        answer["choice"] == row["choices"][answer["prediction"]] for answer, row in zip(found, rows, strict=True)
    )
    assert task.metrics(found, [row["label"] for row in rows]) == {"accuracy": max(scores)}


def test_a_run(tiny_bert, tmp_path):
    rows = odd_rows(30, seed=1)
    results = train(
        Recipe(
            task="multiple-choice",
            model=tiny_bert,
            output_dir=tmp_path / "out",
            data=Data(
                train=write_rows(tmp_path / "train.jsonl", odd_rows(160, seed=0)),
                validation=write_rows(tmp_path / "validation.jsonl", rows),
            ),
            adapter={"num_virtual_tokens": 4},
            batch_size=8,
            num_train_epochs=8,
            max_length=16,
            learning_rate=0.03,
            head_learning_rate=0.02,
        )
    )
    assert results["metric"] == "accuracy"
    assert results["validation"]["accuracy"] > 0.8  # by chance 0.32
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    task = MultipleChoice(recipe, load_tokenizer(recipe))
    model = PeftModel.from_pretrained(load_base(recipe, task)[0], tmp_path / "out").eval()
    questions = columns([{key: row[key] for key in ("text", "choices")} for row in rows])
    answers = answer_rows(task, model, questions, 7, CPU)
    guesses = [answer["prediction"] for answer in answers]
    assert accuracy_score([row["label"] for row in rows], guesses) == results["validation"]["accuracy"]


# The example


def test_example(shared, minilm, tmp_path, with_curve):
    output = tmp_path / "out"
    data = shared / "data" / "copa"
    shown = example(
        *("multiple_choice.py", "--train", data / "train.jsonl.gz", "--validation", data / "val.jsonl.gz"),
        *("--model", minilm, "--output", output, "--max-rows", 8, "--epochs", 2),
    )
    assert "accuracy" in shown
    found = {path.name for path in output.iterdir()}
    assert found >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json", "curve.png"}
    assert json.loads((output / "results.json").read_text())["rows"] == {"train": 8, "validation": 8}
