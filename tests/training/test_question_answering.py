"""Extractive question answering: windows, labels, answers, metrics, and a run."""

import gzip
import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import save_base, write_rows
from datasets import Dataset
from programs import example
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, DataError, Recipe, RecipeError, load_recipe, train
from prefix_adapter.training.evaluation import answer_rows, make_features
from prefix_adapter.training.model import load_base, load_tokenizer, wrap
from prefix_adapter.training.tasks.question_answering import QuestionAnswering

CPU = torch.device("cpu")


def new_task(model, **changes) -> QuestionAnswering:
    recipe = Recipe(**{"task": "question-answering", "model": model, "output_dir": "unused", **changes})
    return QuestionAnswering(recipe, load_tokenizer(recipe))


def xquad(shared, count=200) -> list[dict]:
    with gzip.open(shared / "data" / "xquad-en" / "all.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][::6][:count]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def row(context, *answers, question="w10"):
    """A row whose answers are words of the context."""
    starts = [f" {context} ".index(f" {answer} ") for answer in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
    }


def by_row(features):
    features = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    return [list(group) for _, group in itertools.groupby(features, key=lambda each: each["row"])]


# Windows and labels


@pytest.mark.parametrize("tokenizer", ["minilm", "stories260k"])
@pytest.mark.parametrize("max_length", [64, 384])
def test_windows_cover_the_context_and_hold_the_answers(tokenizer, max_length, shared, request):
    name = request.getfixturevalue("minilm") if tokenizer == "minilm" else str(shared / "models" / tokenizer)
    rows, task = xquad(shared), new_task(name, max_length=max_length)
    plain = AutoTokenizer.from_pretrained(name)
    features = make_features(task, Dataset.from_list(rows), with_targets=True)[:]
    assert len(features["row"]) > len(rows)  # some contexts are too long for one window
    for row, windows in zip(rows, by_row(features), strict=True):
        whole = plain(row["context"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
        shown = [
            [
                (token, tuple(place))
                for token, place in zip(each["input_ids"], each["offsets"], strict=True)
                if place[1] >= 0
            ]
            for each in windows
        ]
        joined = shown[0]
        for earlier, later in itertools.pairwise(shown):
            assert later[: task.stride] == earlier[-task.stride :]
            joined = joined + later[task.stride :]
        assert joined == tokens

        (text,), (begin,) = row["answers"]["text"], row["answers"]["answer_start"]
        end, found = begin + len(text), False
        for window, ((_, (since, _)), *_, (_, (_, until))) in zip(windows, shown, strict=True):
            assert len(window["input_ids"]) <= max_length
            first, last = window["labels"]
            if since <= begin and end <= until:
                found = True
                # The labels cover the answer, and no further token.
                assert window["offsets"][first][0] <= begin < window["offsets"][first][1]
                assert window["offsets"][last][0] < end <= window["offsets"][last][1]
            else:
                assert [first, last] == [0, 0]
        length = sum(left < end and right > begin for _, (left, right) in tokens)
        assert found or length > task.stride


def test_the_first_answer_that_a_window_holds(tiny_bert):
    task = new_task(tiny_bert, max_length=8, task_kwargs={"stride": 1, "max_question_length": 1})
    features = task.features(columns([row("w20 w21 w22 w23 w24 w25 w26", "w25 w26", "w21")]), [7], True)
    # [CLS] w10 [SEP], four words, [SEP]
    assert features["row"] == [7, 7]
    assert features["labels"] == [[4, 4], [5, 6]]
    assert "labels" not in task.features(columns([row("w20 w21", "w21")]), [7], False)


def test_characters_that_the_tokenizer_drops_lose_no_answer(minilm):
    task = new_task(minilm)
    context = "\u200d\u200d308 points\u200d\u200d"
    solution = {"text": [context], "answer_start": [0]}
    features = task.features({"question": ["How many?"], "context": [context], "answers": [solution]}, [0], True)
    first, last = features["labels"][0]
    assert features["offsets"][0][first] == [2, 5]
    assert features["offsets"][0][last] == [6, 12]


def test_a_long_question_leaves_room_for_the_context(tiny_bert):
    task = new_task(tiny_bert, max_length=16, task_kwargs={"max_question_length": 5})
    question, context = " ".join(f"w{i}" for i in range(70)), " ".join(f"w{i}" for i in range(40))
    features = task.features(columns([row(context, "w39", question=f"  {question}  ")]), [0], True)
    assert max(map(len, features["input_ids"])) == 16
    assert {tuple(ids[:7]) for ids in features["input_ids"]} == {(2, 6, 7, 8, 9, 10, 3)}
    shown = {tuple(place) for offsets in features["offsets"] for place in offsets} - {(-1, -1)}
    assert len(shown) == 40


def test_padding_on_the_left_moves_the_labels_and_not_the_answers(tiny_bert):
    task = new_task(tiny_bert)
    rows = columns([row("w20 w21 w22 w23 w24 w25", "w22 w23"), row("w30 w31", "w31")])
    features = by_row(task.features(rows, [0, 1], True))
    features = [each for group in features for each in group]

    def model(input_ids, **_):
        return SimpleNamespace(start_logits=input_ids * 1.0, end_logits=-input_ids * 1.0)

    pointed_at, answers = [], []
    for side in ("right", "left"):
        task.tokenizer.padding_side = side
        batch = task.collate(features)
        pointed_at.append(batch["input_ids"].gather(1, batch["labels"]).flatten().tolist())
        records = task.outputs(model, batch, None)
        answers.append([record.tolist() for record in records])
    words = [task.tokenizer.convert_tokens_to_ids(word) for word in ("w22", "w23", "w31", "w31")]
    assert pointed_at == [words, words]
    expected = [[each["input_ids"], [-token for token in each["input_ids"]]] for each in features]
    assert answers == [expected, expected]


# Answers


def brute_force(task, context, features, records):
    """All passages of all windows, one by one."""
    best: dict[tuple[int, int], float] = {}
    for feature, (starts, ends) in zip(features, records, strict=True):
        places = feature["offsets"]
        for i, j in itertools.product(range(len(places)), repeat=2):
            if i <= j < i + task.kwargs["max_answer_length"] and places[i] != [-1, -1] and places[j] != [-1, -1]:
                text = context[places[i][0] : places[j][1]]
                if text.strip():
                    begin = places[i][0] + text.index(text.strip())
                    key, score = (begin, begin + len(text.strip())), float(starts[i]) + float(ends[j])
                    best[key] = max(score, best.get(key, score))
    ranking = sorted(best.items(), key=lambda each: each[1], reverse=True)[: task.kwargs["n_best"]]
    nothing = min(float(record[0, 0] + record[1, 0]) for record in records)
    return ranking, nothing


@pytest.mark.parametrize("tokenizer", ["minilm", "stories260k"])
@pytest.mark.parametrize("threshold", [None, 0.0, 3.0])
def test_answers_against_brute_force(tokenizer, threshold, shared, request):
    name = request.getfixturevalue("minilm") if tokenizer == "minilm" else str(shared / "models" / tokenizer)
    settings = {"max_answer_length": 7, "n_best": 5, "null_score_threshold": threshold}
    task = new_task(name, max_length=48, task_kwargs=settings)
    rows = xquad(shared, 8)
    generator = torch.Generator().manual_seed(0)
    empty = 0
    for number, (row, features) in enumerate(
        zip(rows, by_row(task.features(columns(rows), list(range(len(rows))), False)), strict=True)
    ):
        records = [2 * torch.randn(2, len(each["input_ids"]), generator=generator) for each in features]
        for record in records:
            record[:, 0] += 5 * (number % 4)
        answer = task.answer(row, features, records)
        ranking, nothing = brute_force(task, row["context"], features, records)
        ((begin, end), score), total = ranking[0], sum(math.exp(each) for _, each in ranking)
        if threshold is None:
            assert set(answer) == {"prediction", "start", "score"}
        else:
            assert answer["null_score_difference"] == pytest.approx(nothing - score, abs=1e-4)
            total += math.exp(nothing)
        if threshold is not None and nothing > score + threshold:
            begin, end, score, empty = 0, 0, nothing, empty + 1
        assert answer["prediction"] == row["context"][begin:end]
        assert answer["start"] == (begin if end else None)
        assert answer["score"] == pytest.approx(math.exp(score) / total, rel=1e-4)
    assert 0 < empty < len(rows) if threshold is not None else empty == 0


def test_questions_without_an_answer_set_the_threshold(tiny_bert):
    answered, not_answered = row("w20 w21", "w21"), row("w20 w21")
    task = new_task(tiny_bert)
    task.learn_labels(Dataset.from_list([answered, answered]), "rows")
    assert task.kwargs["null_score_threshold"] is None
    task.learn_labels(Dataset.from_list([answered, not_answered]), "rows")
    assert task.kwargs["null_score_threshold"] == task.recipe.task_kwargs["null_score_threshold"] == 0
    task = new_task(tiny_bert, task_kwargs={"null_score_threshold": -2.5})
    task.learn_labels(Dataset.from_list([answered, not_answered]), "rows")
    assert task.kwargs["null_score_threshold"] == -2.5
    with pytest.raises(DataError, match="no question has an answer"):
        task.learn_labels(Dataset.from_list([not_answered]), "rows")


# Metrics


def f1_by_hand(guess, true):
    """The metrics ignore case, articles and punctuation."""
    guess, true = guess.split(), true.split()
    if not guess or not true:
        return float(guess == true)
    common = sum((Counter(guess) & Counter(true)).values())
    return 2 * common / (len(guess) + len(true))


def test_metrics(tiny_bert):
    task = new_task(tiny_bert)
    cases = [  # prediction, texts of the solution, and the words of both that count
        ("The Panthers!", ["Panthers", "Carolina"], "panthers", ["panthers", "carolina"]),
        ("red green blue", ["green", "green blue black"], "red green blue", ["green", "green blue black"]),
        ("", ["green"], "", ["green"]),
        ("", [], "", [""]),
        ("green", [], "green", [""]),
    ]
    expected = {
        "exact_match": [max(float(guess == each) for each in true) for _, _, guess, true in cases],
        "f1": [max(f1_by_hand(guess, each) for each in true) for _, _, guess, true in cases],
    }
    assert expected["exact_match"] == [1, 0, 0, 1, 0]
    answers = [{"prediction": text} for text, *_ in cases]
    solutions = [{"text": texts, "answer_start": [0] * len(texts)} for _, texts, *_ in cases]
    found = task.metrics(answers, solutions)
    for name, values in expected.items():
        assert found[name] == pytest.approx(sum(values) / 5)
        assert found[f"has_answer_{name}"] == pytest.approx(sum(values[:3]) / 3)
        assert found[f"no_answer_{name}"] == pytest.approx(sum(values[3:]) / 2)
    assert set(task.metrics(answers[:3], solutions[:3])) == {"exact_match", "f1"}
    assert task.default_metric in found


# Bad rows and settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "'question' is empty"),
        ({"context": None}, "'context' must be a text"),
        ({"answers": None}, "must be {'text'"),
        ({"answers": {"text": ["w21"], "answer_start": []}}, "1 texts and 0 starts"),
        ({"answers": {"text": ["w21"], "answer_start": [4]}}, "'w21' is not in .* 4; it begins at character 8"),
        ({"answers": {"text": ["w21"], "answer_start": [-3]}}, "begins at character 8"),
        ({"answers": {"text": ["w99"], "answer_start": [4]}}, "the context does not contain it"),
        ({"answers": {"text": ["  "], "answer_start": [3]}}, "an answer must be a text"),
        ({"answers": {"text": ["w21"], "answer_start": [None]}}, "must be an integer"),
    ],
)  # fmt: skip
def test_bad_rows(tiny_bert, changes, message):
    task = new_task(tiny_bert)
    good = row("w19 w20 w21 w22", "w21")
    task.check(Dataset.from_list([good, row("w20")]), "rows")
    assert task.problem({**good, **changes}, with_targets=True)
    with pytest.raises(DataError, match=f"rows, row 2: .*{message}"):
        task.check(Dataset.from_list([good, {**good, **changes}]), "rows")
    with pytest.raises(DataError, match="no column 'answers'"):
        task.check(Dataset.from_list([good]).remove_columns("answers"), "rows")


def test_bad_settings(tiny_bert):
    for name, value in {"stride": -1, "n_best": 0, "max_answer_length": 2.5, "null_score_threshold": "low"}.items():
        with pytest.raises(RecipeError, match=f"task_kwargs.{name}"):
            new_task(tiny_bert, task_kwargs={name: value})
    with pytest.raises(RecipeError, match="no room for a context"):
        new_task(tiny_bert, max_length=5)


# The model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_loss_equals_that_of_the_base_model_with_token_types(kind, tmp_path):
    """Without a prefix: `token_type_ids` reach the backbone, and padding is not in the loss."""
    base = save_base(tmp_path / "base", kind, "AutoModelForQuestionAnswering", num_labels=2)
    task = new_task(base)
    assert ("token_type_ids" in task.tokenizer.model_input_names) == (kind == "bert")
    rows = [row("w20 w21 w22 w23 w24", "w23"), row("w30 w31", "w31", question="w11 w12")]
    features = [each for group in by_row(task.features(columns(rows), [0, 1], True)) for each in group]
    model = wrap(task.recipe, task, *load_base(task.recipe, task)).eval()
    with model.disable_adapter():
        loss, _ = task.loss(model, task.collate(features))
    plain = AutoModelForQuestionAnswering.from_pretrained(base).eval()
    expected = []
    for feature in features:
        inputs = {key: torch.tensor([feature[key]]) for key in task.tokenizer.model_input_names}
        logits = plain(**inputs)
        for name, place in zip(("start_logits", "end_logits"), feature["labels"], strict=True):
            expected.append(-logits[name][0].log_softmax(0)[place])
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def treasure_rows(count: int, seed: int) -> list[dict]:
    """Contexts of many words. Most have an answer: one or two words out of `w0` to `w4`."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        words = [f"w{rng.randrange(20, 80)}" for _ in range(rng.randrange(4, 30))]
        answers = []
        if i % 5:
            answer = [f"w{rng.randrange(5)}" for _ in range(1 + i % 2)]
            place = rng.randrange(len(words))
            words[place:place] = answer
            answers = [" ".join(answer)]
        rows.append(row(" ".join(words), *answers))
    return rows


def test_a_run(tiny_bert, tmp_path):
    rows = treasure_rows(30, seed=1)
    results = train(
        Recipe(
            task="question-answering",
            model=tiny_bert,
            output_dir=tmp_path / "out",
            data=Data(
                train=write_rows(tmp_path / "train.jsonl", treasure_rows(200, seed=0)),
                validation=write_rows(tmp_path / "validation.jsonl", rows),
            ),
            adapter={"num_virtual_tokens": 4},
            batch_size=16,
            num_train_epochs=12,
            max_length=24,
            task_kwargs={"stride": 4},
            learning_rate=0.1,
            head_learning_rate=0.02,
            eval_steps=78,
        )
    )
    assert results["metric"] == "f1"
    assert results["validation"]["f1"] > 0.7  # always the empty text: 0.2
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.task_kwargs["null_score_threshold"] == 0
    task = QuestionAnswering(recipe, load_tokenizer(recipe))
    model = PeftModel.from_pretrained(load_base(recipe, task)[0], tmp_path / "out").eval()
    questions = columns([{key: each[key] for key in ("question", "context")} for each in rows])
    answers = answer_rows(task, model, questions, 8, CPU)
    found = task.metrics(answers, [each["answers"] for each in rows])
    assert found == pytest.approx({name: results["validation"][name] for name in found})
    for each, answer in zip(rows, answers, strict=True):
        start = answer["start"]
        assert answer["prediction"] == ("" if start is None else each["context"][start:][: len(answer["prediction"])])


# The example


def test_example(shared, minilm, tmp_path, with_curve):
    output = tmp_path / "out"
    data = write_rows(tmp_path / "all.jsonl", [each for each in xquad(shared) if len(each["context"]) < 400])
    example(
        *("question_answering.py", "--data", data, "--model", minilm),
        *("--output", output, "--max-rows", 6, "--epochs", 1),
    )
    parts = [(output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "validation")]
    contexts = [{json.loads(line)["context"] for line in part} for part in parts]
    assert all(contexts)
    assert not set.intersection(*contexts)
    files = {path.name for path in (output / "adapter").iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json", "curve.png"}
    assert json.loads((output / "adapter" / "results.json").read_text())["rows"]["train"] == 6
