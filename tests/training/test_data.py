"""Rows from files and folders, and the errors for bad ones."""

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


CELLS = [
    "01",
    "1",
    "1.0",
    "0x1",
    "1e5",
    "1_000",
    "NA",
    "N/A",
    "null",
    "None",
    "nan",
    "NaN",
    "True",
    "-",
    " 1 ",
    "2020-01-01",
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_cells_of_a_table_are_texts_as_they_are_written(kind, where, write):
    """Also texts that look like numbers, dates, truth values or missing values."""
    comma = "\t" if kind == "tsv" else ","
    text = "".join(f"{text}{comma}{label}\n" for text, label in [("text", "label"), *((cell, cell) for cell in CELLS)])
    content = gzip.compress(text.encode()) if kind.endswith("gz") else text
    path = write(f"folder/train.{kind}", content)
    rows = read(path) if where == "file" else list(load_rows(Data(path=os.path.dirname(path)), "train"))
    assert rows == [{"text": cell, "label": cell} for cell in CELLS]


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize(
    "cells",
    [("01", "1"), ("0.0", "1.0"), ("NA", "null"), ("nan", "NaN"), ("True", "false"), ("2020-01-01", "2021-02-03")],
)
def test_a_column_of_one_kind_stays_texts(cells, where, write):
    """Readers that guess types look at whole columns."""
    path = write("folder/train.csv", "text,label\n" + "".join(f"{cell},{cell}\n" for cell in cells))
    rows = read(path) if where == "file" else list(load_rows(Data(path=os.path.dirname(path)), "train"))
    assert rows == [{"text": cell, "label": cell} for cell in cells]


@pytest.mark.parametrize("where", ["file", "folder"])
def test_an_empty_cell_is_missing(where, write):
    path = write("folder/train.csv", 'text,label\na,1\nb,\n"",2\n')
    rows = (
        read(path)
        if where == "file"
        else list(load_rows(Data(path=os.path.dirname(path), train="train[:3]"), "train"))
    )
    assert rows == [{"text": "a", "label": "1"}, {"text": "b", "label": None}, {"text": None, "label": "2"}]


def test_quotes_line_breaks_and_a_mark_at_the_beginning(write):
    path = write("a.csv", b'\xef\xbb\xbftext,label\r\n"a, ""b""\r\nc",x\r\n5" disk, y \r\n')
    assert read(path) == [{"text": 'a, "b"\r\nc', "label": "x"}, {"text": '5" disk', "label": " y "}]
    long = "x" * 3_000_000
    assert read(write("b.csv", f"text,label\n{long},1\n")) == [{"text": long, "label": "1"}]


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_types_are_kept_where_a_file_has_them(kind, tmp_path, write):
    rows = [
        {"text": cell, "whole": number, "broken": float(number), "tags": ["01", cell]}
        for number, cell in enumerate(CELLS)
    ]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path := tmp_path / "a.parquet")
    else:
        text = json.dumps(rows) if kind == "json" else as_lines(rows)
        path = write(f"a.{kind}", gzip.compress(text.encode()) if kind.endswith("gz") else text)
    found = read(str(path))
    assert found == rows
    assert all((type(row["whole"]), type(row["broken"])) == (int, float) for row in found)


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz"])
def test_texts_that_look_like_times(kind, write):
    """`datasets` reads a column of such texts as times."""
    rows = [{"text": "2020-01-01", "label": "2020-01-01 10:00:00"}, {"text": "2021-02-03", "label": "x\u2028y"}]
    for part in (rows, rows[:1]):
        text = json.dumps(part) if kind == "json" else as_lines(part)
        assert read(write(f"a.{kind}", gzip.compress(text.encode()) if kind.endswith("gz") else text)) == part


def test_a_data_set_may_not_bring_code(write, tmp_path):
    mark = tmp_path / "the-code-ran"
    write("folder/folder.py", f"open({str(mark)!r}, 'w').close()\n")
    write("folder/train.csv", "text,label\na,1\n")
    for path in ("folder", "folder/folder.py"):
        with pytest.raises(DataError, match="scripts are no longer supported"):
            load_rows(Data(path=str(tmp_path / path)), "train")
    assert not mark.exists()


def test_changed_file_is_read_again(write):
    path = write("rows.jsonl", as_lines([{"text": "old", "label": 1}]))
    time = os.stat(path).st_mtime
    assert read(path)[0]["text"] == "old"
    write("rows.jsonl", as_lines([{"text": "new", "label": 1}]))
    os.utime(path, (time, time))  # as after unpacking an archive
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
        ("a.jsonl", as_lines(ROWS) + '"a"\n', "line 4: expected a JSON object, got 'a'"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS).encode() + b"{]\n", mtime=0), "line 4: Expecting property name"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS).encode(), mtime=0)[:-12], "cannot be read as jsonl"),
        ("a.jsonl.gz", as_lines(ROWS), "Not a gzipped file"),
        ("a.json", '[{"text": "a", "label": 1},\n{"text": "b" "label": 2}]', "cannot be read as json"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "\n\n", "cannot be read as csv"),
        ("a.csv", "text,label\na,1\nb,c,d,1\n", r"cannot be read as csv: row 3 \(with the header\): Expected 2"),
        ("a.csv", "text,label\na,1,\nb,0,\n", r"cannot be read as csv: row 2 \(with the header\): Expected 2 columns"),
        (
            "a.csv",
            "text,label\na,1\nb\n",
            r"cannot be read as csv: row 3 \(with the header\): Expected 2 columns, got 1",
        ),
        ("a.csv", "text,text\na,1\n", "cannot be read as csv: there are two columns 'text'"),
        (
            "a.csv",
            "text,label\n\xe9,1\n".encode("latin-1"),
            "cannot be read as csv: row 2 .*invalid UTF8.*not in UTF-8: save",
        ),
        ("a.csv", "text,label\n\xe9,1\n".encode("utf-16"), "cannot be read as csv: .*not in UTF-8: save"),
        ("a.jsonl", '{"text": "\xe9"}\n'.encode("latin-1"), "cannot be read as jsonl: .*not in UTF-8: save"),
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


def test_another_delimiter_is_named(write):
    """A spreadsheet writes semicolons where the comma is the decimal mark."""
    with pytest.raises(
        DataError, match=r"it has \['text;label'\]\. Its cells are separated by ';': save it with commas"
    ):
        read(write("a.csv", "text;label\na;1\n"), columns={"text": "review"})


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


def test_row_limits_and_held_out_rows():
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
