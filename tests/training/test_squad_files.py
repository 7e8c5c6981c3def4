"""Files in SQuAD's own format: training rows, predictions, and damaged files."""

import copy
import gzip
import json

import pytest
from conftest import write_rows

from prefix_adapter.training import Data, DataError, Recipe, evaluate_adapter, predict, train
from prefix_adapter.training.answer_files import open_rows
from prefix_adapter.training.data import load_rows

CONTEXT = "w1 w2 w3 w4 w5"
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Words",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a",
                            "question": "w10",
                            "answers": [{"text": "w2", "answer_start": 3}, {"text": "w2 w3", "answer_start": 3}],
                            "is_impossible": False,
                        },
                        {
                            "id": "b",
                            "question": "w11",
                            "answers": [],
                            "plausible_answers": [{"text": "w5", "answer_start": 12}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}
"""A file of version 2.0. Version 1.1, and KorQuAD 1.0, have no `is_impossible`."""
ROWS = [
    {
        "id": "a",
        "title": "Words",
        "question": "w10",
        "context": CONTEXT,
        "answers": {"text": ["w2", "w2 w3"], "answer_start": [3, 3]},
    },
    {
        "id": "b",
        "title": "Words",
        "question": "w11",
        "context": CONTEXT,
        "answers": {"text": [], "answer_start": []},
    },
]


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_the_rows(tmp_path, name):
    content = json.dumps(SQUAD, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(load_rows(Data(train=str(tmp_path / name)), "train")) == ROWS
    with open_rows(tmp_path / name).opened() as rows:
        assert [(found.place, found.row) for found in rows] == [("question 1", ROWS[0]), ("question 2", ROWS[1])]


def test_a_test_set_without_answers(tmp_path):
    content = copy.deepcopy(SQUAD)
    for question in content["data"][0]["paragraphs"][0]["qas"]:
        del question["answers"], question["is_impossible"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    without = [{key: value for key, value in row.items() if key != "answers"} for row in ROWS]
    assert list(load_rows(Data(test=str(tmp_path / "test.json")), "test")) == without


@pytest.mark.parametrize("lines", [[{"paragraphs": "a"}, {"paragraphs": "b"}], [{"paragraphs": "a"}]])
def test_other_files_with_such_a_column(tmp_path, lines):
    path = write_rows(tmp_path / "rows.json", lines)
    assert list(load_rows(Data(train=path), "train")) == lines


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["data"], {}, "'data' of the file must be a list; it is {}"),
        (["data", 0, "paragraphs", 0], 5, r"data\[0\].paragraphs\[0\] must be a mapping, got 5"),
        (["data", 0, "paragraphs", 0, "context"], None, r"'context' of data\[0\].paragraphs\[0\] must be a text"),
        (
            ["data", 0, "paragraphs", 0, "qas", 1, "question"],
            7,
            r"'question' of data\[0\].paragraphs\[0\].qas\[1\] must be a text; it is 7",
        ),
        (
            ["data", 0, "paragraphs", 0, "qas", 0, "answers", 1],
            {"text": "w2"},
            r"'answer_start' of data\[0\].paragraphs\[0\].qas\[0\].answers\[1\] must be a whole number; it is missing",
        ),
        (["data"], [{"paragraphs": []}], "has no rows"),
    ],
)
def test_damaged_files(tmp_path, place, value, message):
    content = copy.deepcopy(SQUAD)
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({**content, "paragraphs": None}))
    with pytest.raises(DataError, match=f"squad.json.*{message}"):
        load_rows(Data(train=str(path)), "train")


def test_a_run(tiny_bert, tmp_path):
    content = copy.deepcopy(SQUAD)
    content["data"] *= 4
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content))
    results = train(
        Recipe(
            task="question-answering",
            model=tiny_bert,
            output_dir=tmp_path / "out",
            data=Data(train=str(path), validation=str(path)),
            adapter={"num_virtual_tokens": 2},
            batch_size=8,
            max_steps=1,
            max_length=24,
            task_kwargs={"stride": 4},
        )
    )
    assert results["rows"] == {"train": 8, "validation": 8}
    assert evaluate_adapter(tmp_path / "out", str(path)) == pytest.approx(results["validation"])
    assert predict(tmp_path / "out", path, tmp_path / "answers.jsonl") == 8
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b"] * 4
    assert all(answer["prediction"] in CONTEXT for answer in answers)
