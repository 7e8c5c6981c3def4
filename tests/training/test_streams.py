"""Training rows from a stream and from several sources."""

import json

import pytest
from conftest import save_base, topic_rows, write_rows
from datasets import Dataset
from test_loop import assert_resumes

from prefix_adapter.training import Data, DataError, Recipe, RecipeError, evaluate_adapter, train
from prefix_adapter.training.data import load_rows
from prefix_adapter.training.model import load_tokenizer
from prefix_adapter.training.streams import RowStream, StreamBatches
from prefix_adapter.training.tasks import TASK_CLASSES


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama", "AutoModelForCausalLM")


def rows_of(first: int, count: int) -> list[dict]:
    return [{"text": f"w{first + i} w1", "id": i} for i in range(count)]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """30 rows `w0 w1` ..., and 10 rows `w50 w1` ... under another name."""
    second = [{"body": row["text"], "id": str(row["id"])} for row in rows_of(50, 10)]
    return {
        "first": write_rows(tmp_path / "first.jsonl", rows_of(0, 30)),
        "second": write_rows(tmp_path / "second.jsonl", second),
        "validation": write_rows(tmp_path / "validation.jsonl", rows_of(40, 6)),
    }


def mixture(files, *weights) -> list[dict]:
    sources = [{"train": files["first"]}, {"train": files["second"], "columns": {"text": "body"}}]
    return [{**each, **({"weight": weight} if weight else {})} for each, weight in zip(sources, weights, strict=True)]


def make_recipe(base, output, data, **changes) -> Recipe:
    settings = {"adapter": {"num_virtual_tokens": 2}, "max_length": 16, "batch_size": 4, **changes}
    return Recipe(task="causal-lm", model=base, output_dir=str(output), data=data, **settings)


def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


# ---- Mixtures


def test_a_mixture_without_weights_has_every_row_once(files):
    rows = load_rows(Data(mixture=mixture(files, None, None)), "train")
    assert texts(rows) == texts(rows_of(0, 30)) + texts(rows_of(50, 10))


def test_a_mixture_with_weights(files):
    data = Data(mixture=mixture(files, 3, 1), validation=files["validation"], stopping_strategy="all_exhausted")
    found = texts(load_rows(data, "train", seed=1))
    assert set(found) == set(texts(rows_of(0, 30)) + texts(rows_of(50, 10)))
    share = sum(int(text[1:].split()[0]) < 50 for text in found) / len(found)
    assert 0.55 < share < 0.95
    assert found == texts(load_rows(data, "train", seed=1)) != texts(load_rows(data, "train", seed=2))


def test_types_of_columns(tmp_path):
    """1 in JSON and 1 in CSV are the same label; a text is no list."""
    first = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": "0"}])
    second = write_rows(tmp_path / "b.jsonl", [{"text": "b", "label": 1}])
    third = write_rows(tmp_path / "c.jsonl", [{"text": ["b"], "label": 1}])
    assert list(load_rows(Data(mixture=[{"train": first}, {"train": second}]), "train")["label"]) == ["0", "1"]
    with pytest.raises(DataError, match=r"c\.jsonl: its columns have other types than those of .*a\.jsonl"):
        load_rows(Data(mixture=[{"train": first}, {"train": third}]), "train")


def test_errors_name_the_source_and_its_row(base, files, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [*rows_of(0, 2), {"text": " "}])
    with pytest.raises(DataError, match=r"bad\.jsonl, row 3: 'text' is empty"):
        train(make_recipe(base, tmp_path / "out", Data(mixture=[{"train": files["first"]}, {"train": bad}])))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w1", "text": "w2"}])
    with pytest.raises(DataError, match=r"first\.jsonl has no column 'prompt', but other sources have"):
        train(make_recipe(base, tmp_path / "out", Data(mixture=[{"train": files["first"]}, {"train": prompts}])))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": [{"train": "a"}]}, "at least two sources"),
        ({"mixture": [{"train": "a"}, {"weight": 1}]}, r"`data.mixture\[1\].train`: there must be a file"),
        ({"mixture": [{"train": "a"}, {"train": "b", "split": "c"}]}, r"`data.mixture\[1\].split`: there is no such"),
        ({"mixture": [{"train": "a"}, {"train": "b", "weight": 0}]}, r"`data.mixture\[1\].weight` must be a number"),
        ({"mixture": [{"train": "a"}, {"train": "b", "weight": 1}]}, "either all sources have a `weight`, or none"),
        ({"mixture": [{"train": "a", "weight": 1}, {"train": "b", "weight": 1}]}, "`data.validation` must be set"),
        ({"mixture": [{"train": "a"}, {"train": 5}]}, "`data.mixture`: in a source, `data.train` must be str"),
        ({"mixture": [{"train": "a"}, {"train": "b"}], "train": "c"}, "are both set"),
        ({"streaming": True}, "set `data.validation`, or `data.max_validation_rows`"),
        ({"streaming": True, "validation": "a", "max_train_rows": 5}, "`data.max_train_rows` cannot be drawn"),
        ({"streaming": True, "validation": "v", "mixture": [{"train": "a"}, {"train": "b"}]}, "need weights"),
    ],
)
def test_bad_data(values, message):
    with pytest.raises(RecipeError, match=message):
        Data(**values)


# ---- Streams


@pytest.mark.parametrize("streaming", [True, False])
def test_sources_whose_splits_have_the_same_name(base, files, tmp_path, streaming):
    rows = {"prompts": [{"prompt": "w1", "text": "w2"}] * 3, "texts": [{"text": "w2"}] * 3}
    for name, own in rows.items():
        Dataset.from_list(own).save_to_disk(tmp_path / name / "train")
        (tmp_path / name / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    mixed = [{"path": str(tmp_path / name), "train": "train", "weight": 1} for name in ("texts", "prompts")]
    data = Data(mixture=mixed, validation=files["validation"], streaming=streaming)
    with pytest.raises(DataError, match=r"texts, split train has no column 'prompt', but other sources have"):
        train(make_recipe(base, tmp_path / "out", data, max_steps=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sequence-classification"}, "needs all training rows for its labels"),
        ({"max_steps": None}, "`max_steps` must be set"),
        ({"group_by_length": True}, "`group_by_length` needs the lengths"),
        ({"lr_scheduler_type": "exponential", "lr_scheduler_kwargs": {"gamma": 0.9}}, "`lr_scheduler_type`"),
    ],
)
def test_what_a_stream_cannot_do(changes, message):
    values = {"task": "causal-lm", "model": "none", "output_dir": "none", "max_steps": 5, **changes}
    with pytest.raises(RecipeError, match=message):
        train(Recipe(data=Data(streaming=True, validation="none.jsonl"), **values))


def new_batches(base, data) -> tuple[StreamBatches, list[Dataset]]:
    """Batches of rows, and the block that is current."""
    recipe = make_recipe(base, "unused", data)
    task = TASK_CLASSES["causal-lm"](recipe, load_tokenizer(recipe))
    current = []

    def use(rows) -> int:
        current[:] = [rows]
        return len(rows)

    return StreamBatches(RowStream(data, task, seed=3), use, batch_size=4, seed=5), current


def draw(batches, current, steps) -> list[list[str]]:
    return [[current[0][i]["text"] for i in batches[step]] for step in steps]


@pytest.mark.parametrize("kind", ["file", "csv", "mixture"])
def test_a_stream_continues_anywhere(base, files, tmp_path, kind):
    """Over two passes, in which the order differs."""
    settings = {"streaming": True, "validation": files["validation"], "shuffle_buffer": 7}
    sources = {
        "file": {"train": files["first"]},
        "csv": {"train": str(tmp_path / "rows.csv")},
        "mixture": {"mixture": mixture(files, 3, 1), "stopping_strategy": "all_exhausted"},
    }
    Dataset.from_list(rows_of(0, 30)).to_csv(tmp_path / "rows.csv")
    data = Data(**settings, **sources[kind])
    batches, current = new_batches(base, data)
    whole, states = [], []
    for step in range(40):
        states.append(json.loads(json.dumps(batches.state())))
        whole += draw(batches, current, [step])
    assert batches.epochs(40) >= 2
    if kind != "mixture":
        # Blocks of 8 rows: 8, 8, 8, 6 and two that fill the last batch.
        passes = [[text for batch in whole[start : start + 8] for text in batch] for start in (0, 8)]
        assert all(sorted(set(each)) == sorted(texts(rows_of(0, 30))) and len(each) == 32 for each in passes)
        assert passes[0] != passes[1]
        assert set(passes[0][:8]) == set(texts(rows_of(0, 8)))
        assert passes[0][:8] != texts(rows_of(0, 8))
    for step in range(0, 40, 3):
        again, own = new_batches(base, data)
        again.load_state(states[step])
        assert draw(again, own, range(step, 40)) == whole[step:]


def test_held_out_rows_are_not_trained_on(base, files, tmp_path):
    data = Data(train=files["first"], streaming=True, max_validation_rows=6)
    batches, current = new_batches(base, data)
    trained = {text for batch in draw(batches, current, range(12)) for text in batch}
    assert trained == set(texts(rows_of(6, 24)))
    results = train(make_recipe(base, tmp_path / "out", data, max_steps=2))
    assert results["rows"] == {"train": None, "validation": 6}
    assert evaluate_adapter(tmp_path / "out", "validation") == pytest.approx(results["validation"])
    with pytest.raises(RecipeError, match="the run had a stream of training rows"):
        evaluate_adapter(tmp_path / "out", "train")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on streamed rows of files (`first.jsonl`)" in card


def test_a_run_that_crashes_and_resumes_is_the_same_bit_for_bit(base, files, tmp_path, monkeypatch):
    data = Data(mixture=mixture(files, 3, 1), streaming=True, validation=files["validation"], shuffle_buffer=8)
    settings = {"max_steps": 7, "save_steps": 2, "adapter": {"num_virtual_tokens": 2, "prefix_dropout": 0.1}}

    def make(name) -> Recipe:
        return make_recipe(base, tmp_path / name, data, **settings)

    train(make("whole"))
    assert_resumes(tmp_path / "whole", monkeypatch, make, step=5)


@pytest.mark.parametrize(("value", "message"), [(" ", "is empty"), (5, "must be a text, got 5")])
def test_a_bad_row_of_a_stream_is_named(base, tmp_path, value, message):
    train_file = write_rows(tmp_path / "train.jsonl", [*rows_of(0, 9), {"text": value}, *rows_of(10, 3)])
    data = Data(train=train_file, streaming=True, max_validation_rows=1, shuffle_buffer=4)
    with pytest.raises(DataError, match=rf"train\.jsonl, row 10: 'text' {message}"):
        train(make_recipe(base, tmp_path / "out", data, max_steps=9))


def test_missing_columns_of_a_stream(base, tmp_path):
    path = write_rows(tmp_path / "train.jsonl", topic_rows(3))
    data = Data(train=path, streaming=True, max_validation_rows=1, columns={"text": "body"})
    with pytest.raises(DataError, match=r"has no column 'body' \(data.columns.text\)"):
        train(make_recipe(base, tmp_path / "out", data, max_steps=9))
