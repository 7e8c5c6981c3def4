"""Rows from files and folders, and what is said about bad ones."""

import gzip
import json
import os

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from prefix_adapter.training import Data, DataError
from prefix_adapter.training.data import hold_out, load_rows, take

ROWS = [{"text": 'say "hi", now', "label": "b"}, {"text": "None", "label": "NA"}, {"text": "x\ty é", "label": "a"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(path, **settings) -> list[dict]:
    return list(load_rows(Data(train=path, **settings), "train"))


def as_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "tsv.gz", "parquet"])
def test_file_types(kind, tmp_path, write):
    frame = Dataset.from_list(ROWS).to_pandas()
    path = tmp_path / f"rows.{kind}"
    match kind.removesuffix(".gz"):
        case "jsonl":
            text = as_lines(ROWS)
        case "json":
            text = json.dumps(ROWS, indent=1)
        case "csv":
            text = frame.to_csv(index=False)
        case "tsv":
            text = frame.to_csv(index=False, sep="\t")
        case "parquet":
            frame.to_parquet(path)
            text = path.read_bytes()
    content = text.encode() if isinstance(text, str) else text
    write(path.name, gzip.compress(content) if kind.endswith(".gz") else content)
    assert read(str(path)) == ROWS


def test_a_json_file_may_hold_lines(write):
    assert read(write("rows.json", as_lines(ROWS))) == ROWS


def test_numbers_in_csv(write):
    assert read(write("a.csv", "text,label\na,1\nb,0\n")) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert read(write("b.csv", "text,label\na,1.5\nb,\n")) == [
        {"text": "a", "label": 1.5},
        {"text": "b", "label": None},
    ]
    assert read(write("c.csv", "text,label\na,1.5\nb,nan\n"))[1] == {"text": "b", "label": None}


def test_a_file_that_has_changed_is_read_anew(write):
    path = write("rows.jsonl", as_lines([{"text": "old", "label": 1}]))
    time = os.stat(path).st_mtime
    assert read(path)[0]["text"] == "old"
    write("rows.jsonl", as_lines([{"text": "new", "label": 1}]))
    os.utime(path, (time, time))  # as when it is unpacked from an archive
    assert read(path)[0]["text"] == "new"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.jsonl", as_lines(ROWS) + '{"text": "a" "label": "x"}\n' + as_lines(ROWS), "line 4: Expecting ','"),
        ("a.jsonl", "\n" + as_lines(ROWS) + '{"text": "a", "la', "line 5: Unterminated string"),
        ("a.jsonl", as_lines(ROWS * 3000) + "{]\n", "line 9001: Expecting property name"),
        ("a.jsonl", as_lines(ROWS).encode() + b'{"text": "\xe9", "label": "x"}\n', "line 4: 'utf-8' codec"),
        ("a.jsonl", as_lines(ROWS) + '"a"\n', "line 4: it must be an object, it is 'a'"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS).encode() + b"{]\n", mtime=0), "line 4: Expecting property name"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS).encode(), mtime=0)[:-12], "cannot be read as jsonl"),
        ("a.jsonl.gz", as_lines(ROWS), "Not a gzipped file"),
        ("a.json", '[{"text": "a", "label": 1},\n{"text": "b" "label": 2}]', "cannot be read as json"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "\n\n", "cannot be read as csv"),
        ("a.csv", "text,label\na,1\nb,c,d,1\n", "cannot be read as csv.*line 3"),
        ("a.csv", "text,label\n\xe9,1\n".encode("latin-1"), "cannot be read as csv.*'utf-8' codec"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.txt", "a\n", r"files must be \.jsonl"),
    ],
)
def test_damaged_files(write, name, content, said):
    path = write(name, content)
    with pytest.raises(DataError, match=rf"(?s)a\.\w+.*{said}") as error:
        read(path)
    assert str(error.value).startswith(path)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"no file '.*a\.jsonl'\.$"):
        read(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"no file 'train' \(for a split of a data set of the Hub, give `data.path`"):
        read("train")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, {"a": "1", "b": "2", "text": "3"}),
        ({"text": "a"}, {"text": "1", "b": "2"}),
        ({"text": "text"}, {"a": "1", "b": "2", "text": "3"}),
        ({"text": "a", "a": "text"}, {"text": "1", "b": "2", "a": "3"}),
        ({"text": "a", "a": "b", "b": "text"}, {"text": "1", "a": "2", "b": "3"}),
        ({"text": "a", "text_pair": "text"}, {"text": "1", "text_pair": "3", "b": "2"}),
        ({"text": "a", "text_pair": "a"}, {"text": "1", "text_pair": "1", "b": "2"}),
        ({"text": "text", "text_pair": "text"}, {"a": "1", "b": "2", "text": "3", "text_pair": "3"}),
    ],
)
def test_columns(write, columns, expected):
    path = write("rows.jsonl", as_lines([{"a": "1", "b": "2", "text": "3"}]))
    assert read(path, columns=columns) == [expected]


def test_a_column_that_is_not_there(write):
    path = write("rows.jsonl", as_lines(ROWS))
    with pytest.raises(
        DataError, match=r"rows.jsonl has no column 'sentence' \(data.columns.text\); .*'text', 'label'"
    ):
        read(path, columns={"text": "sentence"})


CLASSES = Dataset.from_dict(
    {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 2], [], [1, None]], "numbers": [[1], [2], [-1]]},
    features=Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["no", "yes"]),
            "tags": List(ClassLabel(names=["O", "B-X", "I-X"])),
            "numbers": List(Value("int64")),
        }
    ),
)
NAMED = [
    {"text": "a", "label": "yes", "tags": ["O", "I-X"], "numbers": [1]},
    {"text": "b", "label": "no", "tags": [], "numbers": [2]},
    {"text": "c", "label": None, "tags": ["B-X", None], "numbers": [-1]},
]


def test_classes_have_names(tmp_path):
    CLASSES.to_parquet(tmp_path / "one.parquet")
    assert read(str(tmp_path / "one.parquet")) == NAMED
    renamed = read(str(tmp_path / "one.parquet"), columns={"sentiment": "label"})
    assert [row["sentiment"] for row in renamed] == ["yes", "no", None]


@pytest.mark.parametrize("kind", ["save_to_disk", "dictionary", "parquet", "jsonl"])
def test_folders(kind, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    match kind:
        case "save_to_disk":
            CLASSES.select([2, 0, 1]).select([1, 2, 0]).save_to_disk(folder)
        case "dictionary":
            DatasetDict(train=CLASSES, fold2=CLASSES.select([0])).save_to_disk(folder)
        case "parquet":
            CLASSES.to_parquet(folder / "train.parquet")
        case "jsonl":
            (folder / "train.jsonl").write_text(as_lines(NAMED))
    path = str(folder)
    assert list(load_rows(Data(path=path), "train")) == NAMED
    assert list(load_rows(Data(path=path, train="train[1:]"), "train")) == NAMED[1:]
    if kind == "dictionary":
        assert list(load_rows(Data(path=path, test="fold2"), "test")) == NAMED[:1]
    with pytest.raises(DataError, match=r"split 'dev'.*[Uu]nknown split"):
        load_rows(Data(path=path, validation="dev"), "validation")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data.path '.*nothing', split 'train'"):
        load_rows(Data(path=str(tmp_path / "nothing")), "train")


def test_take_and_hold_out():
    rows = Dataset.from_dict({"text": [str(i) for i in range(40)]})
    everything = set(rows["text"])
    assert list(take(rows, None, 0)["text"]) == list(take(rows, 40, 0)["text"]) == list(rows["text"])
    some = list(take(rows, 10, 0)["text"])
    assert len(set(some)) == 10 and some != list(rows["text"])[:10]
    assert some == list(take(rows, 10, 0)["text"]) != list(take(rows, 10, 1)["text"])
    for fraction, count in ((0.1, 4), (0.001, 1), (0.999, 39)):
        kept, held = hold_out(rows, fraction, 0)
        assert len(held) == count
        assert set(kept["text"]) | set(held["text"]) == everything and len(kept) + count == 40
    assert list(hold_out(rows, 0.1, 0)[1]["text"]) == list(hold_out(rows, 0.1, 0)[1]["text"])
    assert list(hold_out(rows, 0.1, 0)[1]["text"]) != list(hold_out(rows, 0.1, 1)[1]["text"])
    with pytest.raises(DataError, match="one training row"):
        hold_out(rows.select([0]), 0.1, 0)
