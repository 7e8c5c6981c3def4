"""Classifying texts and pairs of texts, and predicting numbers."""

import dataclasses
import json
import math
import random
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from conftest import WORDS, topic_rows, write_rows
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import AutoPeftModelForSequenceClassification
from scipy import stats
from sklearn import metrics
from test_run import recipe
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, mse_loss
from transformers import AutoTokenizer

from prefix_adapter import UnsupportedBackboneError
from prefix_adapter.training import Data, DataError, Recipe, RecipeError, evaluate_adapter, load_recipe, train
from prefix_adapter.training.model import load_base
from prefix_adapter.training.tasks import TASK_CLASSES
from prefix_adapter.training.tasks.labels import classification_metrics
from prefix_adapter.training.tasks.sequence_classification import number_of


def words(chance: random.Random, offset: int, count: int) -> str:
    return " ".join(f"w{offset + chance.randrange(5)}" for _ in range(count))


def pair_rows(count: int, seed: int) -> list[dict]:
    """Pairs of texts. The label says whether both have the same topic."""
    chance = random.Random(seed)
    topics = [(chance.randrange(2), chance.randrange(2)) for _ in range(count)]
    return [
        {"text": words(chance, 40 * a, 3), "text_pair": words(chance, 40 * b, 2), "label": int(a == b)}
        for a, b in topics
    ]


def many_rows(count: int, seed: int) -> list[dict]:
    """Texts with any of the topics `low`, `mid` and `top`, or none."""
    chance, names = random.Random(seed), {"top": 60, "low": 0, "mid": 30}
    rows = []
    for _ in range(count):
        label = [name for name in names if chance.random() < 0.5]
        text = " ".join(words(chance, names[name], 2) for name in label) or "w20"
        rows.append({"text": text, "label": label})
    return rows


def number_rows(count: int, seed: int) -> list[dict]:
    """Texts with a number: the share of words of the first topic."""
    chance = random.Random(seed)
    shares = [chance.randrange(5) for _ in range(count)]
    return [{"text": f"{words(chance, 0, n)} {words(chance, 40, 4 - n)}".strip(), "label": n / 4} for n in shares]


def run(base, rows, tmp_path, **changes) -> dict:
    """Train on rows of `rows`, and return the answers of the saved adapter in plain forwards."""
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows(count, seed))
        for name, count, seed in (("train", 48, 0), ("validation", 17, 1))
    }
    made = recipe(base, files, tmp_path / "out", **{"num_train_epochs": 12, "eval_batch_size": 5, **changes})
    results = train(made)
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    names = {"problem_type": saved.task_kwargs["problem_type"]}
    head = {"num_labels": len(saved.labels) if saved.labels else 1, **names}
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **head).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    validation = rows(17, 1)
    with torch.no_grad():
        logits = [
            model(**tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")).logits[0] for row in validation
        ]
    return {
        "found": results["validation"],
        "logits": torch.stack(logits),
        "true": [row["label"] for row in validation],
        "labels": saved.labels,
        "metric": results["metric"],
    }


def test_pairs_and_integer_labels(tiny_bert, tmp_path):
    got = run(tiny_bert, pair_rows, tmp_path)
    assert got["labels"] == [0, 1] and got["metric"] == "accuracy"
    guess = got["logits"].argmax(-1).tolist()
    assert got["found"]["accuracy"] == metrics.accuracy_score(got["true"], guess)
    assert got["found"]["f1_macro"] == metrics.f1_score(got["true"], guess, average="macro")
    assert got["found"]["matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(got["true"], guess))


def test_rows_with_one_of_the_labels():
    """A few rows to validate on may have only one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification_metrics(["a", "a"], ["a", "a"])
    assert found == {"accuracy": 1, "f1_macro": 1, "matthews_correlation": 0}


def test_several_labels(tiny_bert, tmp_path):
    got = run(tiny_bert, many_rows, tmp_path)
    assert got["labels"] == ["low", "mid", "top"] and got["metric"] == "f1_micro"
    true = [[label in each for label in got["labels"]] for each in got["true"]]
    guess = (got["logits"].sigmoid() >= 0.5).tolist()
    expected = {
        "loss": binary_cross_entropy_with_logits(got["logits"], torch.tensor(true).float()).item(),
        "accuracy": metrics.accuracy_score(true, guess),
        "f1_macro": metrics.f1_score(true, guess, average="macro", zero_division=0),
        "f1_micro": metrics.f1_score(true, guess, average="micro"),
    }
    assert got["found"] == pytest.approx(expected, abs=1e-5)
    shares = torch.tensor(true).float().mean(0).expand(len(true), 3)
    assert got["found"]["loss"] < 0.9 * binary_cross_entropy(shares, torch.tensor(true).float())  # without the text


def test_the_threshold_of_several_labels(tiny_bert, tmp_path):
    got = run(tiny_bert, many_rows, tmp_path, num_train_epochs=2, task_kwargs={"threshold": 0.3})
    true = [[label in each for label in got["labels"]] for each in got["true"]]
    guess = (got["logits"].sigmoid() >= 0.3).tolist()
    assert guess != (got["logits"].sigmoid() >= 0.5).tolist()
    assert got["found"]["f1_micro"] == pytest.approx(metrics.f1_score(true, guess, average="micro"))


def test_regression(tiny_bert, tmp_path):
    got = run(tiny_bert, number_rows, tmp_path)
    assert got["labels"] is None and got["metric"] == "pearson"
    guess = got["logits"][:, 0]
    expected = {
        "loss": mse_loss(guess, torch.tensor(got["true"])).item(),
        "mean_squared_error": metrics.mean_squared_error(got["true"], guess),
        "pearson": stats.pearsonr(got["true"], guess).statistic,
        "spearman": stats.spearmanr(got["true"], guess).statistic,
    }
    assert got["found"] == pytest.approx(expected, abs=1e-5)
    assert got["found"]["mean_squared_error"] < 0.5 * torch.tensor(got["true"]).var(correction=0)


def test_regression_on_whole_numbers_when_asked(tiny_bert, tmp_path):
    def rows(count, seed):
        return [{**row, "label": int(4 * row["label"])} for row in number_rows(count, seed)]

    kind = {"task_kwargs": {"problem_type": "regression"}, "metric_for_best_model": "mean_squared_error"}
    got = run(tiny_bert, rows, tmp_path, **kind, eval_steps=6)
    squares = [
        line["mean_squared_error"]
        for line in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "validation"
    ]
    assert got["found"]["mean_squared_error"] == min(squares) < max(squares)


def test_equal_answers_have_no_correlation(tiny_bert, topics, tmp_path):
    made = recipe(tiny_bert, topics, tmp_path, task_kwargs={"problem_type": "regression"})
    task = TASK_CLASSES["sequence-classification"](made, AutoTokenizer.from_pretrained(tiny_bert))
    found = task.metrics([{"prediction": 0.5}] * 3, [0.1, 0.2, 0.6])
    assert found["pearson"] == found["spearman"] == 0.0


@pytest.mark.parametrize(("kind", "labels"), [("regression", [0.5, 1.5]), ("multi_label_classification", [["a"], []])])
def test_numbers_and_several_labels_have_no_best_same_answer(tiny_bert, kind, labels):
    recipe = Recipe("sequence-classification", tiny_bert, "unused", labels=["a"], task_kwargs={"problem_type": kind})
    task = TASK_CLASSES["sequence-classification"](recipe, AutoTokenizer.from_pretrained(tiny_bert))
    assert task.constant_answers([{"text": "w1", "label": label} for label in labels]) == []


def test_names_of_classes(tiny_bert, tmp_path):
    features = Features({"sentence": Value("string"), "topic": ClassLabel(names=["second", "first"])})
    parts = {
        name: Dataset.from_dict(
            {"sentence": [row["text"] for row in rows], "topic": ["ba".index(row["label"]) for row in rows]},
            features=features,
        )
        for name, rows in (("train", topic_rows(48)), ("dev", topic_rows(19, 100)))
    }
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    data = {
        "path": str(tmp_path / "data"),
        "validation": "dev",
        "columns": {"text": "sentence", "label": "topic"},
        "max_train_rows": 40,
        "max_validation_rows": 11,
    }
    results = train(recipe(tiny_bert, data, tmp_path / "out"))
    assert results["rows"] == {"train": 40, "validation": 11}
    assert load_recipe(tmp_path / "out" / "recipe.yaml").labels == ["first", "second"]
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    logits = model(**tokenizer(["w0 w1 w2", "w40 w41 w42"], return_tensors="pt")).logits
    assert logits.argmax(-1).tolist() == [
        0,
        1,
    ]  # w0 to w4 are of label `a`, which is 1 in the data and `first` by name


def test_held_out_rows(tiny_bert, topics, tmp_path):
    made = recipe(tiny_bert, {"train": topics["train"]}, tmp_path / "out", num_train_epochs=1)
    made.data.validation_fraction = 0.25
    assert train(made)["rows"] == {"train": 36, "validation": 12}


def test_given_labels_keep_their_order(tiny_bert, topics, tmp_path):
    made = recipe(tiny_bert, topics, tmp_path / "out", labels=["z", "b", "a"], num_train_epochs=5)
    train(made)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    logits = model(**tokenizer(["w0 w1 w2", "w40 w41 w42"], return_tensors="pt")).logits
    assert logits.argmax(-1).tolist() == [2, 1]


def task_for(base, rows, labels=None, **settings):
    """A task that has collected its labels from rows."""
    made = recipe(base, {"train": "rows"}, "unused", labels=labels, task_kwargs=settings)
    task = TASK_CLASSES["sequence-classification"](made, AutoTokenizer.from_pretrained(base))
    data = Dataset.from_list([{"text": "w1", "label": label} for label in rows])
    task.check(data, "rows")
    task.learn_labels(data, "rows")
    task.check(data, "rows")
    return task


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (["01", "1", "01"], ["01", "1"]),
        (["0.0", "1.0", "1"], ["0.0", "1", "1.0"]),
        (["NA", "null", "None", "nan"], ["NA", "None", "nan", "null"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        ([10, 9, -1], [-1, 9, 10]),
        (["10", "9", "09"], ["09", "10", "9"]),
        (["True", "False"], ["False", "True"]),
        (["a", " a"], [" a", "a"]),
        (["yes", "no", "1e3"], ["1e3", "no", "yes"]),
    ],
)
def test_labels_keep_their_text(tiny_bert, tmp_path, rows, labels):
    """In the task, in the model's configuration, and in the recipe that is saved."""
    task = task_for(tiny_bert, rows)
    assert task.labels == labels and task.problem_type == "single_label_classification"
    made = dataclasses.replace(task.recipe, labels=task.labels)
    model, _ = load_base(made, task)
    assert list(model.config.id2label.values()) == [str(label) for label in labels]
    made.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").labels == labels
    found = task.features({"text": ["w1"] * len(rows), "label": rows}, list(range(len(rows))), True)["labels"]
    assert [task.labels[number] for number in found] == rows


@pytest.mark.parametrize("rows", [["0.5", "2.0"], ["1.5", "3", "2"], [0.0, 1.0], [2.0, 3.0, 2.0]])
def test_labels_or_regression_must_be_clear(tiny_bert, rows):
    with pytest.raises(DataError, match=r"could be labels or numbers.*single_label_classification` or `regression`"):
        task_for(tiny_bert, rows)
    assert task_for(tiny_bert, rows, problem_type="regression").labels is None
    if isinstance(rows[0], str):
        assert set(task_for(tiny_bert, rows, problem_type="single_label_classification").labels) == set(rows)


def test_floats_are_numbers(tiny_bert):
    assert task_for(tiny_bert, [0.0, 0.25]).problem_type == "regression"


@pytest.mark.parametrize("bad", ["", "high", "nan", "inf", "1,5"])
def test_targets_that_are_no_numbers(tiny_bert, bad):
    with pytest.raises(DataError, match=r"row 3: 'label' must be a finite number, got"):
        task_for(tiny_bert, ["1.5", "2", bad], problem_type="regression")
    assert math.isnan(number_of(True)) and math.isnan(number_of(None)) and number_of("-1e-3") == -0.001


def test_a_table_and_json_have_the_same_labels(tiny_bert, tmp_path):
    """1 in JSON is '1' in a table. Both can be mixed, and a regression reads numbers from either."""
    rows = [{"text": row["text"], "label": int(row["label"] == "a")} for row in topic_rows(48)]
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    found = []
    for number, (train_file, validation) in enumerate([(str(table), lines), (lines, str(table))]):
        out = tmp_path / str(number)
        train(recipe(tiny_bert, {"train": train_file, "validation": validation}, out, num_train_epochs=4))
        saved = load_recipe(out / "recipe.yaml")
        assert saved.labels == (["0", "1"] if number == 0 else [0, 1])
        found.append(evaluate_adapter(out, validation))
        assert found[-1] == pytest.approx(evaluate_adapter(out, train_file), abs=1e-6)
        assert found[-1]["accuracy"] > 0.9
    assert found[0] == pytest.approx(found[1], abs=1e-6)


GOOD = [{"text": "w1 w2", "label": "a"}, {"text": "w3", "label": "b"}] * 4


def with_row(**changes) -> list[dict]:
    """Good rows, with another sixth row."""
    row = {key: value for key, value in {**GOOD[5], **changes}.items() if value is not ...}
    return [*GOOD[:5], row, *GOOD[6:]]


@pytest.mark.parametrize(
    ("rows", "said", "changes"),
    [
        (
            [{"sentence": "w1", "label": "a"}],
            r"has no column 'text' .*'sentence'.*`data.columns: \{text: \.\.\.\}`",
            {},
        ),
        ([{"text": "w1", "labels": "a"}], r"has no column 'label' \(the target\)", {}),
        (with_row(text=None), r"row 6: 'text' must be a text, got None", {}),
        (with_row(text=...), r"row 6: 'text' must be a text, got None", {}),
        (with_row(text=7), r"row 6: 'text' must be a text, got 7", {}),
        (with_row(text=["w1"]), r"row 6: 'text' must be a text, got \['w1'\]", {}),
        (with_row(text=" \n"), r"row 6: 'text' is empty", {}),
        (with_row(text_pair="w9"), r"row 1: 'text_pair' must be a text, got None", {}),
        (with_row(label=None), r"row 6: 'label' is missing", {}),
        (with_row(label=1), r"row 6: the label 1 is a int; labels must be strings in all rows, or integers", {}),
        (with_row(label=["a"]), r"row 6: 'label' must be one label, got \['a'\]", {}),
        (with_row(label={"a": 1}), r"row 6: the label \{'a': 1\} is a dict", {}),
        ([{**row, "label": row["label"] == "a"} for row in GOOD], r"row 1: the label True is a bool", {}),
        ([{**row, "label": "a"} for row in GOOD], r"all rows have the same label, \{'a'\}: there is nothing", {}),
        ([{**row, "label": []} for row in GOOD], r"all rows have the same label, none: there is nothing", {}),
        ([*({**row, "label": ["a"]} for row in GOOD), {"text": "w1", "label": [None]}], r"row 9: the label None", {}),
        (
            [*({**row, "label": ["a"]} for row in GOOD), {"text": "w1", "label": "a"}],
            "row 9: .*must be a list of lab",
            {},
        ),
        (with_row(label="c"), r"row 6: the label 'c' is not among the labels .*\['a', 'b'\]", {"labels": ["a", "b"]}),
        (GOOD, r"row 1: the label 'a' is not among the labels .*\[1, 2\]", {"labels": [1, 2]}),
        ([{**row, "label": 0.5} for row in GOOD], "row 1: the label 0.5 is a float", {"kind": "single_label"}),
        (
            [*({**row, "label": 0.5} for row in GOOD), {"text": "w1", "label": float("nan")}],
            r"row 9: .*finite.*nan",
            {},
        ),
        (
            [*({**row, "label": 0.5} for row in GOOD), {"text": "w1", "label": float("inf")}],
            r"row 9: .*finite.*inf",
            {},
        ),
        ([*({**row, "label": 0.5} for row in GOOD), {"text": "w1", "label": "high"}], r"row 9: .*finite.*'high'", {}),
        (GOOD, r"row 1: 'label' must be a finite number, got 'a'", {"kind": "regression"}),
        (GOOD[:1], r"all rows have the same label", {}),
    ],
)
def test_bad_rows_are_an_error_before_training(tiny_bert, tmp_path, rows, said, changes):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    kind = {"single_label": "single_label_classification"}.get(changes.get("kind"), changes.get("kind"))
    changes = {"task_kwargs": {"problem_type": kind}} if kind else changes
    with pytest.raises(DataError, match=said) as error:
        train(recipe(tiny_bert, {"train": path}, tmp_path / "out", **changes))
    assert str(error.value).startswith(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_labels_that_were_not_learnt(tiny_bert, topics, tmp_path, split):
    path = write_rows(tmp_path / "other.jsonl", [*GOOD[:3], {"text": "w1", "label": "c"}])
    with pytest.raises(
        DataError, match=r"other.jsonl, row 4: the label 'c' is not among the labels of the training rows"
    ):
        train(recipe(tiny_bert, {**topics, split: path}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_pairs_in_one_split_only(tiny_bert, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(8, 0))
    single = write_rows(tmp_path / "single.jsonl", [{"text": "w1", "label": 0}])
    for train_rows, rows in ((pairs, single), (single, pairs)):
        with pytest.raises(DataError, match=r"single.jsonl has no column 'text_pair'"):
            train(recipe(tiny_bert, {"train": train_rows, "validation": rows}, tmp_path / "out"))


def test_one_row(tiny_bert, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GOOD[:1])
    with pytest.raises(DataError, match="one training row"):
        train(recipe(tiny_bert, {"train": path}, tmp_path / "out", labels=["a", "b"]))


def save_refused(folder: Path, base: str) -> str:
    """The folder of a model that takes no prefix."""
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = transformers.AlbertConfig(
        vocab_size=tiny.VOCAB, embedding_size=16, hidden_size=tiny.HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=tiny.LENGTH,
    )  # fmt: skip
    transformers.AlbertModel(config).save_pretrained(folder)
    return str(folder)


def test_a_model_that_is_refused(tiny_bert, topics, tmp_path):
    with pytest.raises(UnsupportedBackboneError):
        train(recipe(save_refused(tmp_path / "albert", tiny_bert), topics, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_such_model(topics, tmp_path):
    with pytest.raises(RecipeError, match=r"`model`: .*nowhere"):
        train(recipe(str(tmp_path / "nowhere"), topics, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"problem_type": "clustering"}, r"`task_kwargs.problem_type` must be one of .*, got 'clustering'"),
        ({"stride": 3}, r"`task_kwargs.stride`: sequence-classification has no such setting; it has problem_type"),
    ],
)
def test_bad_settings(tiny_bert, topics, tmp_path, settings, said):
    with pytest.raises(RecipeError, match=said):
        train(recipe(tiny_bert, topics, tmp_path / "out", task_kwargs=settings))


def test_the_second_text_is_read(tiny_bert):
    """Truncation shortens the longer of two texts, as the tokenizer does."""
    made = recipe(tiny_bert, {"train": "unused"}, "unused", max_length=8, labels=[0, 1])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    task = TASK_CLASSES["sequence-classification"](made, tokenizer)
    columns = {"text": [" ".join(WORDS[:20])], "text_pair": ["w70 w71"], "label": [1]}
    features = task.features(columns, [4], True)
    assert tokenizer.convert_ids_to_tokens(features["input_ids"][0]) == [
        "[CLS]", "w0", "w1", "w2", "[SEP]", "w70", "w71", "[SEP]"
    ]  # fmt: skip
    assert features["token_type_ids"][0] == [0] * 5 + [1] * 3
    assert features["labels"] == [1] and features["row"] == [4]


def test_real_labels(minilm, shared, tmp_path):
    """77 intents as names, from compressed files."""
    folder = shared / "data" / "banking77"
    files = {path.name.split(".")[0]: str(path) for path in sorted(folder.glob("*.jsonl.gz"))}
    assert {"train", "test"} <= files.keys(), files
    made = recipe(minilm, {"train": files["train"], "test": files["test"]}, tmp_path / "out", max_steps=1)
    made.data = Data(train=files["train"], test=files["test"], max_train_rows=50, max_test_rows=20)
    results = train(made)
    assert results["rows"]["test"] == 20
    assert len(load_recipe(tmp_path / "out" / "recipe.yaml").labels) == 77
