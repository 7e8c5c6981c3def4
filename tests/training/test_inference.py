"""Evaluation and prediction with a trained adapter."""

import io
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import topic_rows, write_rows
from safetensors.torch import load_file, save_file
from test_run import recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import (
    DataError,
    RecipeError,
    evaluate_adapter,
    inference,
    load_trained,
    predict,
    train,
)


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """A trained adapter, in whose data the column `text` is called `sentence`."""
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
    """The probabilities of a plain PEFT model, for one text at a time."""
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


@pytest.mark.parametrize("chunk_size", [1, 100])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: invalid JSON"),
        (b"[1]", "line 3: expected a JSON object"),
        (b"[" * 100_000, "line 3: invalid JSON"),
        (b'{"sentence": "\xff"}', "line 3: invalid JSON"),
        (b'{"id": 1}', "line 3: 'sentence' is missing"),
        (b'{"sentence": null}', "line 3: 'text' must be a text"),
        (b'{"sentence": " "}', "line 3: 'text' is empty"),
        (b'{"sentence": 5}', "line 3: 'text' must be a text"),
        (b'{"sentence": "w1 \\ud800"}', r"line 3: 'text' has '.ud800', half of a surrogate pair"),
        (b'{"sentence": "w1", "text_pair": "w2"}', "line 3: it has the optional columns"),
    ],
)
def test_a_bad_line_is_named_and_the_answers_before_it_stay(trained, tmp_path, line, message, chunk_size):
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_bytes(b'{"sentence": "w1"}\n{"sentence": "w42"}\n' + line + b'\n{"sentence": "w3"}\n')
    target.write_text("earlier answers")
    with pytest.raises(DataError, match=message) as error:
        predict(trained, source, target, chunk_size=chunk_size, overwrite=True)
    partial = tmp_path / "answers.jsonl.partial"
    assert str(error.value).endswith(f". 2 rows were answered before: the answers are in {partial}.")
    assert target.read_text() == "earlier answers"
    answers = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [answer["sentence"] for answer in answers] == ["w1", "w42"]
    source.write_bytes(b"5\n")
    with pytest.raises(DataError, match=r"line 1: .* 0 rows were answered before\."):
        predict(trained, source, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]


def not_called(*args):
    raise AssertionError("It should have been refused before.")


def linked(source, name):
    path = source.with_name(name)
    path.symlink_to(source) if name == "symlink" else path.hardlink_to(source)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "../{}/rows.jsonl", "symlink", "hardlink", "partial"])
def test_the_rows_are_never_overwritten(trained, tmp_path, monkeypatch, name):
    source = target = tmp_path / ("rows.jsonl.partial" if name == "partial" else "rows.jsonl")
    write_rows(source, topic_rows(2))
    if name in ("symlink", "hardlink"):
        target = linked(source, name)
    else:
        target = tmp_path / ("rows.jsonl" if name == "partial" else name.format(tmp_path.name))
    before = source.read_bytes()
    monkeypatch.setattr(inference, "load_trained", not_called)
    with pytest.raises(DataError, match="is the file of the rows"):
        predict(trained, source, target, overwrite=True)
    if name != "partial":
        with pytest.raises(DataError, match="is the file of the rows"):
            evaluate_adapter(trained, source, predictions=target, overwrite=True)
    assert source.read_bytes() == before


def test_the_rows_of_the_recipe_are_never_overwritten(trained, monkeypatch):
    monkeypatch.setattr(inference, "load_rows", not_called)
    with pytest.raises(DataError, match="is the file of the rows"):
        evaluate_adapter(trained, predictions=trained.parent / "validation.jsonl", overwrite=True)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.partial"])
def test_existing_files_are_replaced_with_overwrite_only(trained, tmp_path, name):
    source, target = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1"}]), tmp_path / "answers.jsonl"
    (tmp_path / name).write_text("earlier answers")
    with pytest.raises(FileExistsError, match=rf"{name} exists.*--overwrite"):
        predict(trained, source, target)
    assert (tmp_path / name).read_text() == "earlier answers"
    assert predict(trained, source, target, overwrite=True) == 1
    assert json.loads(target.read_text())["sentence"] == "w1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]
    with pytest.raises(IsADirectoryError):
        predict(trained, source, tmp_path, overwrite=True)
    rows = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1", "label": "a"}])
    with pytest.raises(FileExistsError, match="--overwrite"):
        evaluate_adapter(trained, rows, predictions=target)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_links_and_pipes_stay_what_they_are(trained, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1"}])
    (tmp_path / "link").symlink_to(tmp_path / "answers.jsonl")
    assert predict(trained, source, tmp_path / "link") == 1
    assert (tmp_path / "link").is_symlink() and (tmp_path / "answers.jsonl").stat().st_size > 0
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        assert predict(trained, source, tmp_path / "pipe") == 1
        assert json.loads(read.result())["sentence"] == "w1"
    assert (tmp_path / "pipe").is_fifo() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, RuntimeError])
def test_answers_before_an_error_stay(trained, tmp_path, monkeypatch, kind):
    source, target = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1"}] * 5), tmp_path / "answers.jsonl"
    original, calls = inference.answer_rows, []

    def answer_rows(*args):
        calls.append(args)
        if len(calls) == 3:
            raise kind
        return original(*args)

    monkeypatch.setattr(inference, "answer_rows", answer_rows)
    with pytest.raises(kind) as error:
        predict(trained, source, target, chunk_size=2)
    said = [str(error.value), *getattr(error.value, "__notes__", [])]
    assert said[-1].endswith(f"4 rows were answered before: the answers are in {target}.partial.")
    assert len((tmp_path / "answers.jsonl.partial").read_text().splitlines()) == 4
    assert not target.exists()


def test_a_full_disk_leaves_whole_answers(trained, tmp_path):
    source, target = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1"}] * 9), tmp_path / "answers.jsonl"
    predict(trained, source, target, chunk_size=2)
    size = len(target.read_bytes().splitlines(keepends=True)[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(5.5 * size), limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large\. 4 rows were answered before: the answers are in"):
            predict(trained, source, tmp_path / "more.jsonl", chunk_size=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "more.jsonl.partial").read_bytes() == target.read_bytes()[: 4 * size]


def test_other_columns_may_have_any_text(trained, tmp_path):
    rows = [{"sentence": "w1", "note": "\ud83d"}, {"sentence": "w2", "note": "\U0001f600 \u2028"}]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in rows).encode())
    predict(trained, source, tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [answer["note"] for answer in answers] == [row["note"] for row in rows]


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


def test_folders_without_a_trained_adapter(trained, tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_trained(tmp_path)
    with pytest.raises(RecipeError, match="no folder"):
        load_trained("nobody/nothing")
    (tmp_path / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match="no finished adapter"):
        load_trained(tmp_path)


@pytest.mark.parametrize("kind", ["HEAD", "FULL"])
def test_full_and_head_runs_can_be_used(tiny_bert, topics, tmp_path, kind):
    train(recipe(tiny_bert, topics, tmp_path / "out", adapter={"peft_type": kind}, num_train_epochs=1))
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)
    weights = tmp_path / "out" / "trained.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    assert evaluate_adapter(tmp_path / "out")["loss"] == pytest.approx(0.6931, abs=1e-3)  # an even guess of two
