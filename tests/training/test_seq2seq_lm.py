"""Text to text: labels, the loss, what is generated, and the metrics of generated texts."""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from conftest import save_base, write_rows
from datasets import Dataset
from programs import example
from rouge_score.rouge_scorer import RougeScorer
from tiny import randomize
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model
from prefix_adapter.training import Data, DataError, Recipe, RecipeError, answer_rows, train
from prefix_adapter.training.evaluation import evaluate
from prefix_adapter.training.tasks import TASK_CLASSES

CPU = torch.device("cpu")
KINDS = ("t5", "bart")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    changes: dict[str, dict] = {"t5": {"initializer_factor": 2.0}, "bart": {}}
    return {kind: save_base(folder / kind, kind, "AutoModelForSeq2SeqLM", **changes[kind]) for kind in KINDS}


def make_recipe(base, output="unused", data=None, **changes) -> Recipe:
    settings = {"adapter": {"num_virtual_tokens": 8}, "max_length": 24, "batch_size": 4, **changes}
    return Recipe(task="seq2seq-lm", model=str(base), output_dir=output, data=data or Data(), **settings)


def make_task(base, **changes):
    return TASK_CLASSES["seq2seq-lm"](make_recipe(base, **changes), AutoTokenizer.from_pretrained(base))


def with_prefix(base):
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base),
        PrefixTuningV2Config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    )
    randomize(model)
    return model.double().eval()


def words(*numbers) -> str:
    return " ".join(f"w{number}" for number in numbers)


ROWS = {
    "text": [words(1), words(*range(10, 17)), words(30, 31)],
    "target": [words(*range(40, 49)), words(5), words(6, 7)],
}
"""A text shorter than its target, one longer, and one as long."""


def rows_of(columns: dict) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_labels_are_padded_separately(bases):
    task = make_task(bases["t5"])
    features = rows_of(task.features(ROWS, [0, 1, 2], True))
    assert [task.tokenizer.decode(each["labels"]) for each in features] == [f"{text} </s>" for text in ROWS["target"]]
    for chosen in (features, features[:1], features[1:2]):
        batch = task.collate(chosen)
        assert batch["labels"].shape == (len(chosen), max(len(each["labels"]) for each in chosen))
        assert batch["input_ids"].shape == (len(chosen), max(len(each["input_ids"]) for each in chosen))
        for row, each in zip(batch["labels"].tolist(), chosen, strict=True):
            assert row == each["labels"] + [-100] * (len(row) - len(each["labels"]))


def test_long_texts_are_cut(bases):
    task = make_task(bases["t5"], max_length=4, task_kwargs={"max_target_length": 3})
    features = task.features({"text": [words(*range(9))], "target": [words(*range(20, 29))]}, [0], True)
    assert task.tokenizer.decode(features["input_ids"][0]) == "w0 w1 w2 </s>"
    assert task.tokenizer.decode(features["labels"][0]) == "w20 w21 </s>"
    assert task.generate_kwargs()["max_new_tokens"] == 3


@torch.no_grad()
def losses(model, tokenizer, rows) -> torch.Tensor:
    """The losses of the targets' tokens, computed one row after the other without any padding."""
    found = []
    for row in rows:
        target = tokenizer(row["target"]).input_ids
        decoder = [model.config.decoder_start_token_id, *target[:-1]]
        inputs = tokenizer(row["text"], return_tensors="pt")
        logits = model(**inputs, decoder_input_ids=torch.tensor([decoder])).logits[0].log_softmax(-1)
        found += [-logits[i, id_] for i, id_ in enumerate(target)]
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_that_of_the_targets_tokens(bases, kind):
    task, model = make_task(bases[kind]), with_prefix(bases[kind])
    expected = losses(model, task.tokenizer, rows_of(ROWS))
    features = rows_of(task.features(ROWS, [0, 1, 2], True))
    torch.testing.assert_close(task.loss(model, task.collate(features))[0], expected.mean())
    counts = [task.num_items(each["labels"]) for each in features]
    assert counts == [10, 2, 3]
    parts = [(features[:1], counts[0]), (features[1:], sum(counts[1:]))]
    mean = sum(task.loss(model, task.collate(part))[0] * count for part, count in parts) / sum(counts)
    torch.testing.assert_close(mean, expected.mean())


@torch.no_grad()
def one_by_one(model, tokenizer, texts, **options) -> list[str]:
    found = []
    for text in texts:
        sequence = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, **options)[0]
        found.append(tokenizer.decode(sequence, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_predictions_are_those_of_each_row_alone(bases, kind, num_beams):
    settings = {"max_new_tokens": 6, "num_beams": num_beams, "generation_kwargs": {"no_repeat_ngram_size": 2}}
    task, model = make_task(bases[kind], task_kwargs=settings), with_prefix(bases[kind])
    texts = [words(*((7 * i + 3 * j) % 80 for j in range(1 + 2 * i))) for i in range(6)]
    answers = answer_rows(task, model, {"text": texts}, 4, CPU)
    options = {"max_new_tokens": 6, "num_beams": num_beams, "no_repeat_ngram_size": 2}
    assert [answer["prediction"] for answer in answers] == one_by_one(model, task.tokenizer, texts, **options)
    assert len({answer["prediction"] for answer in answers}) > 1


def test_evaluation(bases):
    task, model = make_task(bases["t5"], task_kwargs={"max_new_tokens": 5}), with_prefix(bases["t5"])
    right = one_by_one(model, task.tokenizer, ROWS["text"], max_new_tokens=5)
    rows = Dataset.from_dict({"text": ROWS["text"], "target": [right[0], words(70), words(71)]})
    metrics, answers = evaluate(task, model, rows, 2, Accelerator(cpu=True))
    assert [answer["prediction"] for answer in answers] == right
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert metrics["loss"] == pytest.approx(float(losses(model, task.tokenizer, rows).mean()), rel=1e-5)
    assert set(metrics) == {"loss", "exact_match", "rouge1", "rouge2", "rougeL"}
    assert task.default_metric == "rougeL"


def test_metrics_are_those_of_rouge_score(bases):
    solutions = ["The cat sat on the mat.", "A dog_barks at 2 cats", "Yes", "one, two; three"]
    guesses = ["the cat lay on a mat", "a dog barks", "no", " one, two; three\n"]
    metrics = make_task(bases["t5"]).metrics([{"prediction": guess} for guess in guesses], solutions)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(*pair) for pair in zip(solutions, guesses, strict=True)]
    expected = {kind: sum(each[kind].fmeasure for each in scores) / 4 for kind in ("rouge1", "rouge2", "rougeL")}
    assert 0 < expected["rouge2"] < expected["rougeL"] < 1
    assert metrics == pytest.approx({"exact_match": 0.25, **expected})


def test_rouge_of_other_alphabets(bases):
    task = make_task(bases["t5"])
    metrics = task.metrics([{"prediction": "나는 집에 간다"}], ["나는 학교에 간다."])
    assert metrics == pytest.approx({"exact_match": 0, "rouge1": 2 / 3, "rouge2": 0, "rougeL": 2 / 3})
    assert task.metrics([{"prediction": "grün"}], ["gr n"])["rouge1"] == 0


@pytest.mark.parametrize(
    ("row", "with_targets", "message"),
    [
        ({"text": " ", "target": "w1"}, True, "row 2: 'text' is empty"),
        ({"text": "w1", "target": ""}, True, "row 2: 'target' is empty"),
        ({"text": "w1", "target": None}, True, "row 2: 'target' must be a text, got None"),
        ({"text": None}, False, "row 2: 'text' must be a text, got None"),
        ({"text": "w1"}, True, r"has no column 'target' .*data.columns: \{target: ...\}"),
        ({"target": "w1"}, False, "has no column 'text'"),
    ],
)
def test_bad_rows(bases, row, with_targets, message):
    rows = Dataset.from_list([dict.fromkeys(row, "w1"), row])
    with pytest.raises(DataError, match=message):
        make_task(bases["t5"]).check(rows, "rows.jsonl", with_targets)


@pytest.mark.parametrize(
    ("task_kwargs", "message"),
    [
        ({"max_target_length": 0}, "`task_kwargs.max_target_length` must be an integer of at least 1, got 0"),
        ({"num_beams": 1.5}, "`task_kwargs.num_beams` must be an integer of at least 1, got 1.5"),
        ({"generation_kwargs": {"num_beams": 2}}, "set `task_kwargs.num_beams` instead"),
        ({"generation_kwargs": {"lenght_penalty": 2}}, "`task_kwargs.generation_kwargs.lenght_penalty`: .*no such"),
        ({"generation_kwargs": {"early_stopping": "soon"}}, "`task_kwargs.generation_kwargs`: .*early_stopping"),
        ({"beams": 2}, "`task_kwargs.beams`: seq2seq-lm has no such setting"),
    ],
)
def test_bad_recipes(bases, task_kwargs, message):
    with pytest.raises(RecipeError, match=message):
        make_task(bases["t5"], task_kwargs=task_kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_training(bases, kind, tmp_path):
    rows = [{"text": words(i % 7, 10 + i % 3), "target": words(60, 61, 62)} for i in range(24)]
    data = Data(
        train=write_rows(tmp_path / "train.jsonl", rows),
        validation=write_rows(tmp_path / "validation.jsonl", rows[:5]),
    )
    recipe = make_recipe(
        bases[kind], tmp_path / "out", data, learning_rate=0.3, num_train_epochs=20, eval_steps=60,
        task_kwargs={"max_target_length": 5},
    )  # fmt: skip
    results = train(recipe)
    assert results["metric"] == "rougeL"
    assert results["validation"]["exact_match"] == 1.0
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(bases[kind]), tmp_path / "out").eval()
    answers = answer_rows(make_task(bases[kind]), model, {"text": [words(3, 10), words(4, 11)]}, 2, CPU)
    assert answers == [{"prediction": words(60, 61, 62)}] * 2


def test_the_example(tmp_path):
    shown = example("seq2seq.py", "--output", tmp_path, "--max-steps", 3)
    results = json.loads((tmp_path / "backwards" / "results.json").read_text())
    assert f"exact_match {results['validation']['exact_match']:.3f}" in shown
    assert results["steps"] == 3
    assert results["trained_parameters"] == 3 * 8 * 2 * 2 * 64  # parts, tokens, layers, keys and values
    assert len(re.findall(r"^ +[a-z ]+ with the prefix .*without it", shown, re.MULTILINE)) == 3
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for name, backwards in (("forwards", False), ("backwards", True)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}-train.jsonl").read_text().splitlines()]
        for row in rows:
            expected = [str(numbers.index(word)) for word in row["text"].split()]
            assert row["target"].split() == (expected[::-1] if backwards else expected)
