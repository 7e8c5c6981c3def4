"""Evaluation and prediction with a trained adapter."""

import datetime
import gzip
import io
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import pandas
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
        (b'{"sentence": "w1", "text_pair": "w2"}', r"line 3: it has the columns \['text', 'text_pair'\] of the task"),
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


# ---- CSV and Parquet, read by `datasets`

READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json"}
NOTES = ['a "quoted", note', "two\nlines", "NA", "007", "\U0001f600\ttab", None]


def read_answers(path, cache):
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    if path.suffix in (".csv", ".tsv"):
        options |= {"keep_default_na": False, "na_values": [""]}
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, **options)


def write_source(path, rows):
    """Write rows with libraries other than those of the package."""
    table = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    else:
        write_rows(path, rows)
    return path


@pytest.mark.parametrize("target", READERS)
@pytest.mark.parametrize("source", READERS)
def test_files_of_all_types(trained, tmp_path, source, target):
    rows = [{"sentence": row["text"], "note": note} for row, note in zip(topic_rows(6, 300), NOTES, strict=True)]
    given = write_source(tmp_path / f"rows{source}", rows)
    assert predict(trained, write_rows(tmp_path / "r.jsonl", rows), tmp_path / "expected.jsonl", batch_size=6) == 6
    expected = [json.loads(line) for line in (tmp_path / "expected.jsonl").read_text().splitlines()]
    assert predict(trained, given, tmp_path / f"answers{target}", chunk_size=4, batch_size=6) == 6
    found = read_answers(tmp_path / f"answers{target}", tmp_path / "cache")
    assert found.column_names == list(expected[0])
    for column in ("sentence", "note", "prediction"):
        assert found[column] == [row[column] for row in expected]
    assert found["probability"] == pytest.approx([row["probability"] for row in expected], abs=1e-5)
    assert not list(tmp_path.glob("*.partial"))


def test_parquet_keeps_the_types_of_its_columns(trained, tmp_path):
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "day": datasets.Value("date32"),
            "kind": datasets.ClassLabel(names=["x", "y"]),
            "small": datasets.Value("int8"),
            "words": datasets.List(datasets.Value("string")),
            "prediction": datasets.Value("int32"),  # of an earlier run
        }
    )
    day = datetime.date(2024, 2, 29)
    rows = [{"sentence": "w1", "day": day, "kind": 1, "small": 7, "words": ["a"], "prediction": 3}] * 3
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    predict(trained, tmp_path / "rows.parquet", tmp_path / "answers.parquet", chunk_size=2)
    found = read_answers(tmp_path / "answers.parquet", tmp_path / "cache")
    for name in ("sentence", "day", "kind", "small", "words"):
        assert found.features[name] == features[name]
    assert found[0]["day"] == day and found[0]["prediction"] in ("a", "b") and len(found) == 3
    predict(trained, tmp_path / "rows.parquet", tmp_path / "answers.jsonl")
    assert json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])["day"] == "2024-02-29"


def test_a_compressed_source(trained, tmp_path):
    for name, content in (("rows.csv.gz", "sentence\nw1\nw42\n"), ("rows.jsonl.gz", '{"sentence": "w1"}\n' * 2)):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert predict(trained, tmp_path / name, tmp_path / f"{name}.jsonl") == 2
    with pytest.raises(DataError, match="answers are not compressed"):
        predict(trained, tmp_path / "rows.csv.gz", tmp_path / "answers.csv.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"sentence": "w1"}\n' * 99)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be read as jsonl"):
        predict(trained, tmp_path / "cut.jsonl.gz", tmp_path / "answers.jsonl")


BAD = b'sentence,id\nw1,1\nw42,2\nw1,3,4\n"",5\n"w1 \xff",6\nw41,7\nw1\n'


@pytest.mark.parametrize("target", ["answers.csv", "answers.jsonl", "answers.parquet"])
def test_bad_rows_of_a_csv_file(trained, tmp_path, capsys, target):
    (tmp_path / "rows.csv").write_bytes(BAD)
    with pytest.raises(DataError, match=r"rows\.csv, row 3: expected 2 cells, got 3\. 2 rows were answered") as error:
        predict(trained, tmp_path / "rows.csv", tmp_path / target, chunk_size=1)
    partial = tmp_path / f"{target}.partial"
    assert str(partial) in str(error.value)
    partial.rename(tmp_path / f"partial-{target}")  # the answers so far are a whole file
    assert read_answers(tmp_path / f"partial-{target}", tmp_path / "cache")["sentence"] == ["w1", "w42"]
    assert predict(trained, tmp_path / "rows.csv", tmp_path / target, bad_rows="skip", chunk_size=2) == 3
    assert read_answers(tmp_path / target, tmp_path / "cache")["sentence"] == ["w1", "w42", "w41"]
    said = [line for line in capsys.readouterr().err.splitlines() if "rows.csv" in line]
    assert [line.split(": ")[1].split(", ")[1] for line in said[:-1]] == ["row 3", "row 4", "row 5", "row 7"]
    assert "cells" in said[0] and "missing" in said[1] + "missing" and "UTF-8" in said[2] and "cells" in said[3]
    assert said[-1] == f"4 bad rows of {tmp_path / 'rows.csv'} were left out."


def test_bad_lines_are_left_out(trained, tmp_path):
    lines = [b'{"sentence": "w1"}', b"{", b"5", b'{"id": 1}', b'{"sentence": " "}', b'{"sentence": "w42"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    assert predict(trained, tmp_path / "rows.jsonl", tmp_path / "answers.jsonl", bad_rows="skip") == 2
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["sentence"] for row in answers] == ["w1", "w42"]


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"text_,id\nw1,1\n", r"rows\.csv has no column 'sentence' \(.*it has \['id', 'text_'\]"),
        ("rows.csv", b"a,a\nw1,1\n", "there are two columns 'a'"),
        ("rows.csv", b"", "cannot be read as csv"),
        ("rows.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_a_damaged_file_is_an_error_whatever_the_flag(trained, tmp_path, name, content, message, bad_rows):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        predict(trained, tmp_path / name, tmp_path / "answers.csv", bad_rows=bad_rows)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rows_that_do_not_fit_a_table(trained, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1", "n": 1}, {"sentence": "w2", "n": 2.5, "more": 1}])
    for target in ("answers.csv", "answers.parquet"):
        with pytest.raises(DataError, match=r"more.*Write JSON lines") as error:
            predict(trained, source, tmp_path / target, chunk_size=1)
        assert "1 rows were answered before" in str(error.value)
    source = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1", "n": 1}, {"sentence": "w2", "n": "x"}])
    for chunk_size in (1, 2):
        with pytest.raises(DataError, match="Write JSON lines"):
            predict(trained, source, tmp_path / "answers.parquet", chunk_size=chunk_size, overwrite=True)


def test_no_rows(trained, tmp_path):
    (tmp_path / "rows.csv").write_text("sentence,id\n")
    for target in ("answers.csv", "answers.jsonl", "answers.parquet"):
        assert predict(trained, tmp_path / "rows.csv", tmp_path / target) == 0
    assert pandas.read_parquet(tmp_path / "answers.parquet").columns.tolist() == ["sentence", "id"]


def test_a_progress_bar_on_terminals_only(trained, tmp_path, capsys, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", [{"sentence": "w1"}] * 3)
    predict(trained, source, tmp_path / "first.jsonl", progress=True)
    assert "Predicting" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    predict(trained, source, tmp_path / "second.jsonl")
    assert "Predicting" not in capsys.readouterr().err
    ends = []

    class Bar(inference.tqdm):
        def close(self):
            ends.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(inference, "tqdm", Bar)
    for kind in READERS:
        given = write_source(tmp_path / f"rows{kind}", [{"sentence": "w1"}] * 3)
        predict(trained, given, tmp_path / f"third{kind}", progress=True, chunk_size=1)
        assert "Predicting" in capsys.readouterr().err
        size = 3 if kind == ".parquet" else given.stat().st_size
        assert set(ends) == {(size, size)}
        ends.clear()


def test_evaluate_writes_tables_too(trained, tmp_path):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in topic_rows(5)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    for name in ("a.csv", "a.parquet"):
        metrics = evaluate_adapter(trained, source, predictions=tmp_path / name)
        found = read_answers(tmp_path / name, tmp_path / "cache")
        right = [row["label"] == row["prediction"] for row in found]
        assert sum(right) / 5 == pytest.approx(metrics["accuracy"])


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
