"""What is done with a trained adapter: measuring it, and answering rows that stream past."""

import io
import json
import sys

import pytest
import torch
from conftest import topic_rows, write_rows
from safetensors.torch import load_file, save_file
from test_run import recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import DataError, RecipeError, evaluate_adapter, load_trained, predict, train


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """A trained adapter, whose data call the text `sentence`."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"sentence": row["text"], "label": row["label"]} for row in topic_rows(48)]
    data = {
        "train": write_rows(folder / "train.jsonl", rows),
        "validation": write_rows(folder / "validation.jsonl", rows[:19]),
        "columns": {"text": "sentence"},
    }
    train(recipe(tiny_bert, data, folder / "out", num_train_epochs=4))
    return folder / "out"


def by_hand(base, adapter, texts):
    """Probabilities of a plain PEFT model, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model, tokenizer = PeftModel.from_pretrained(model, adapter).eval(), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in texts]


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_predict_is_the_model(tiny_bert, trained, tmp_path, chunk_size):
    texts = [row["text"] for row in topic_rows(11, 300)]
    source = write_rows(tmp_path / "rows.jsonl", [{"id": i, "sentence": text} for i, text in enumerate(texts)])
    target = tmp_path / "new" / "answers.jsonl"
    assert predict(trained, source, target, chunk_size=chunk_size, batch_size=3) == 11
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["id"], row["sentence"]) for row in answers] == list(enumerate(texts))
    expected = by_hand(tiny_bert, trained, texts)
    for answer, probabilities in zip(answers, expected, strict=True):
        assert answer["prediction"] == "ab"[probabilities.argmax()]
        assert answer["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_predict_streams_from_and_to_the_terminal(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"sentence": "w0 w1"}\n\n{"sentence": "w41"}\n'))
    assert predict(trained, "-", "-") == 2
    assert [json.loads(line)["sentence"] for line in capsys.readouterr().out.splitlines()] == ["w0 w1", "w41"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: a JSON object was expected"),
        ('{"id": 1}', "line 3: 'sentence' is missing"),
        ('{"sentence": " "}', "line 3: 'text' is empty"),
        ('{"sentence": 5}', "line 3: 'text' must be a text"),
        ('{"sentence": "w1", "text_pair": "w2"}', "line 3: it has"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(trained, tmp_path, line, message):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"sentence": "w1"}\n{"sentence": "w2"}\n' + line + "\n")
    (tmp_path / "answers.jsonl").write_text("earlier answers")
    with pytest.raises(DataError, match=message):
        predict(trained, source, tmp_path / "answers.jsonl", chunk_size=1)
    assert (tmp_path / "answers.jsonl").read_text() == "earlier answers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]


def test_evaluate_is_the_share_of_right_answers(tiny_bert, trained, tmp_path):
    rows = topic_rows(23, 500)
    labels = [row["label"] for row in rows]
    labels[3], labels[7] = "ab"[labels[3] == "a"], "ab"[labels[7] == "a"]
    rows = [{"sentence": row["text"], "label": label} for row, label in zip(rows, labels, strict=True)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    metrics = evaluate_adapter(trained, source, predictions=tmp_path / "answers.jsonl")
    probabilities = by_hand(tiny_bert, trained, [row["sentence"] for row in rows])
    right = ["ab"[each.argmax()] == label for each, label in zip(probabilities, labels, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / 23)
    loss = -sum(float(each["ab".index(label)].log()) for each, label in zip(probabilities, labels, strict=True)) / 23
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prediction"] == answer["label"] for answer in answers] == right


def test_evaluate_takes_the_recipes_own_rows(trained):
    recorded = json.loads((trained / "results.json").read_text())["validation"]
    assert evaluate_adapter(trained) == pytest.approx(recorded, abs=1e-6)
    with pytest.raises(RecipeError, match="test"):
        evaluate_adapter(trained, "test")


def test_what_is_no_trained_adapter(trained, tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_trained(tmp_path)
    with pytest.raises(RecipeError, match="no folder"):
        load_trained("nobody/nothing")
    (tmp_path / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match="no finished adapter"):
        load_trained(tmp_path)


@pytest.mark.parametrize("kind", ["HEAD", "FULL"])
def test_comparisons_without_an_adapter_can_be_used_too(tiny_bert, topics, tmp_path, kind):
    train(recipe(tiny_bert, topics, tmp_path / "out", adapter={"peft_type": kind}, num_train_epochs=1))
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)
    weights = tmp_path / "out" / "trained.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    assert evaluate_adapter(tmp_path / "out")["loss"] == pytest.approx(0.6931, abs=1e-3)  # an even guess of two
