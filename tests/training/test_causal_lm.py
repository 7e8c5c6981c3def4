"""Causal language modelling: labels, blocks, the loss, and what is generated."""

import json
import math
import re

import pytest
import torch
from accelerate import Accelerator
from conftest import WORDS, save_base, write_rows
from datasets import Dataset
from programs import example
from rouge_score.rouge_scorer import RougeScorer
from tiny import randomize
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model
from prefix_adapter.training import Data, DataError, Recipe, RecipeError, answer_rows, predict, train
from prefix_adapter.training.evaluation import evaluate, make_features
from prefix_adapter.training.tasks import TASK_CLASSES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """A Llama whose tokenizer puts a token before every text, as Llama's does, and a GPT-2 without a padding token.

    And the tokenizer of `closing`, which puts the end-of-sequence token after every text itself.
    """
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: save_base(folder / kind, kind, "AutoModelForCausalLM") for kind in ("llama", "gpt2")}
    tokenizer = AutoTokenizer.from_pretrained(found["llama"])
    tokenizer.bos_token = "[CLS]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(found["llama"])
    tokenizer = AutoTokenizer.from_pretrained(found["gpt2"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(found["gpt2"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder / "closing")
    return {**found, "closing": str(folder / "closing")}


def make_recipe(base, output="unused", data=None, **changes) -> Recipe:
    settings = {"adapter": {"num_virtual_tokens": 4}, "max_length": 24, "batch_size": 4, **changes}
    return Recipe(task="causal-lm", model=str(base), output_dir=output, data=data or Data(), **settings)


def make_task(base, **changes):
    return TASK_CLASSES["causal-lm"](make_recipe(base, **changes), AutoTokenizer.from_pretrained(base))


def with_prefix(base):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    randomize(model)
    return model.eval()


def words(*numbers) -> str:
    return " ".join(f"w{number}" for number in numbers)


PAIRS = {
    "prompt": [words(1, 2), words(*range(10, 17)), words(30)],
    "text": [words(3, 4), words(5), words(*range(40, 46))],
}
"""Prompts and texts of different lengths."""


def shown(task, features: dict, i: int) -> tuple[str, str]:
    """A feature as words, and its labels, with `-` for tokens without a loss."""
    labels = features["labels"][i]
    marked = [task.tokenizer.decode(label) if label != -100 else "-" for label in labels]
    return task.tokenizer.decode(features["input_ids"][i]), " ".join(marked)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("gpt2", {"text": words(1, 2)}, ("w1 w2 </s>", "- w2 </s>")),
        ("llama", {"text": words(1, 2)}, ("[CLS] w1 w2 </s>", "- w1 w2 </s>")),
        ("llama", {"prompt": words(1), "completion": words(3)}, ("[CLS] w1 w3 </s>", "- - w3 </s>")),
        ("llama", {"prompt": None, "text": words(1, 2)}, ("[CLS] w1 w2 </s>", "- w1 w2 </s>")),
        ("gpt2", {"prompt": words(1, 2), "text": words(3, 4)}, ("w1 w2 w3 w4 </s>", "- - w3 w4 </s>")),
        ("closing", {"text": words(1, 2)}, ("w1 w2 </s>", "- w2 </s>")),
        ("closing", {"prompt": words(1, 2), "text": words(3, 4)}, ("w1 w2 w3 w4 </s>", "- - w3 w4 </s>")),
        ("llama", {"prompt": words(1, 2), "text": words(3, 4)}, ("[CLS] w1 w2 w3 w4 </s>", "- - - w3 w4 </s>")),
        # Too long: first the start of the prompt is cut, then the end of the text.
        ("gpt2", {"prompt": words(*range(9)), "text": words(30, 31)}, ("w6 w7 w8 w30 w31 </s>", "- - - w30 w31 </s>")),
        ("llama", {"prompt": words(*range(9)), "text": words(30)}, ("[CLS] w6 w7 w8 w30 </s>", "- - - - w30 </s>")),
        ("gpt2", {"prompt": words(1, 2), "text": words(*range(3, 12))}, ("w2 w3 w4 w5 w6 w7", "- w3 w4 w5 w6 w7")),
        ("llama", {"prompt": words(1), "text": words(*range(3, 12))}, ("[CLS] w3 w4 w5 w6 w7", "- w3 w4 w5 w6 w7")),
    ],
)  # fmt: skip
def test_labels(bases, kind, row, expected):
    task = make_task(bases[kind], max_length=6)
    features = task.features({key: [value] for key, value in row.items()}, [0], True)
    assert features["row"] == [0]
    assert shown(task, features, 0) == expected
    assert task.num_items(features["labels"][0]) == sum(word != "-" for word in expected[1].split())


def test_long_text_is_divided_into_blocks(bases):
    task = make_task(bases["llama"], max_length=6)
    features = task.features({"text": [words(*range(13)), words(20)]}, [7, 8], True)
    assert features["row"] == [7, 7, 7, 8]
    assert [shown(task, features, i) for i in range(4)] == [
        ("[CLS] w0 w1 w2 w3 w4", "- w0 w1 w2 w3 w4"),
        ("w5 w6 w7 w8 w9 w10", "- w6 w7 w8 w9 w10"),
        ("w11 w12 </s>", "- w12 </s>"),
        ("[CLS] w20 </s>", "- w20 </s>"),
    ]


def test_packing_loses_no_token(bases):
    task = make_task(bases["llama"], max_length=10, task_kwargs={"packing": True})
    texts = [words(*((i + j) % 80 for j in range(1 + i % 7))) for i in range(1100)]
    blocks = make_features(task, Dataset.from_dict({"text": texts}), True)
    joined = [id_ for block in blocks["input_ids"] for id_ in block]
    assert task.tokenizer.decode(joined) == " ".join(f"[CLS] {text} </s>" for text in texts)
    lengths = [len(block) for block in blocks["input_ids"]]
    assert sum(length != 10 for length in lengths) <= 2  # `datasets` passes a thousand texts at a time
    for ids, labels, mask in zip(blocks["input_ids"], blocks["labels"], blocks["attention_mask"], strict=True):
        assert labels == [-100, *ids[1:]]
        assert mask == [1] * len(ids)
    assert len(task.features({"text": texts[:9]}, list(range(9)), True)["row"]) == 9  # evaluation: each text alone


def losses(model, tokenizer, pairs) -> torch.Tensor:
    """The losses of the texts' tokens after their prompts, computed one row after the other without any padding."""
    found = []
    for prompt, text in pairs:
        start = tokenizer(prompt).input_ids
        ids = start + tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [-logits[i - 1, ids[i]] for i in range(max(len(start), 1), len(ids))]
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_loss_is_that_of_the_texts_tokens(bases, kind):
    task, model = make_task(bases[kind]), with_prefix(bases[kind])
    rows = {"prompt": [*PAIRS["prompt"], None], "text": [*PAIRS["text"], words(50, 51, 52)]}
    features = task.features(rows, list(range(4)), True)
    each = [{key: features[key][i] for key in features} for i in range(4)]
    expected = losses(
        model, task.tokenizer, [(prompt or "", text) for prompt, text in zip(*rows.values(), strict=True)]
    )
    torch.testing.assert_close(task.loss(model, task.collate(each))[0], expected.mean())
    # In parts of different sizes, weighted as in the training loop.
    counts = [task.num_items(labels) for labels in features["labels"]]
    assert len(set(counts)) > 1
    parts = [(each[:1], counts[0]), (each[1:], sum(counts[1:]))]
    mean = sum(task.loss(model, task.collate(part))[0] * count for part, count in parts) / sum(counts)
    torch.testing.assert_close(mean, expected.mean())

    metrics, answers = evaluate(task, model, Dataset.from_dict(rows), 2, Accelerator(cpu=True))
    assert metrics == pytest.approx(
        {"loss": float(expected.mean()), "perplexity": math.exp(expected.mean())}, rel=1e-5
    )
    assert answers == [{}] * 4


@torch.no_grad()
def test_a_block_of_one_token_does_not_spoil_the_evaluation(bases):
    task, model = make_task(bases["gpt2"], max_length=4), with_prefix(bases["gpt2"])
    rows = Dataset.from_dict({"text": [words(1, 2, 3, 4)]})  # and the end-of-sequence token, which nothing predicts
    metrics, _ = evaluate(task, model, rows, 1, Accelerator(cpu=True))
    logits = (
        model(input_ids=task.tokenizer(words(1, 2, 3, 4), return_tensors="pt").input_ids).logits[0].log_softmax(-1)
    )
    ids = task.tokenizer(words(1, 2, 3, 4)).input_ids
    assert metrics["loss"] == pytest.approx(-sum(float(logits[i, ids[i + 1]]) for i in range(3)) / 3, rel=1e-5)


@torch.no_grad()
def one_by_one(model, tokenizer, prompts, count) -> list[str]:
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id, "do_sample": False}
        sequence = model.generate(**inputs, max_new_tokens=count, **options)[0]
        found.append(tokenizer.decode(sequence[inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_predictions_are_those_of_each_row_alone(bases, kind):
    task, model = make_task(bases[kind], task_kwargs={"max_new_tokens": 6}), with_prefix(bases[kind])
    prompts = [words(*((7 * i + 3 * j) % 80 for j in range(1 + 2 * i))) for i in range(6)]
    answers = answer_rows(task, model, {"prompt": prompts}, 4, CPU)
    assert [answer["prediction"] for answer in answers] == one_by_one(model, task.tokenizer, prompts, 6)
    assert len({answer["prediction"] for answer in answers}) > 1


def test_generation_stops_at_the_tokenizers_end(bases):
    model = with_prefix(bases["gpt2"])
    task = make_task(bases["gpt2"], task_kwargs={"max_new_tokens": 8})
    (free,) = one_by_one(model, task.tokenizer, [words(1)], 8)
    written = free.split()
    task.tokenizer.eos_token = written[-1]
    end = written.index(written[-1]) + 1
    assert end < len(written)
    (answer,) = answer_rows(task, model, {"prompt": [words(1)]}, 1, CPU)
    assert answer == {"prediction": " ".join(written[:end])}


def test_a_prompt_leaves_room_for_what_is_generated(bases):
    task = make_task(bases["llama"], max_length=10, task_kwargs={"max_new_tokens": 4})
    features = task.features({"prompt": [words(*range(20)), words(1)]}, [0, 1], False)
    assert task.tokenizer.batch_decode(features["input_ids"]) == ["[CLS] w15 w16 w17 w18 w19", "[CLS] w1"]
    assert make_task(bases["llama"], max_length=10).kwargs["max_new_tokens"] == 5


def test_generation_in_evaluation(bases):
    task = make_task(bases["llama"], task_kwargs={"generate": True, "max_new_tokens": 5})
    model = with_prefix(bases["llama"])
    guesses = one_by_one(model, task.tokenizer, PAIRS["prompt"], 5)
    first = guesses[0].split()
    solutions = [guesses[0] + " ", " ".join(first[:2]), words(70)]  # right, half right, wrong
    rows = Dataset.from_dict({"prompt": [PAIRS["prompt"][i] for i in (0, 0, 2)], "text": solutions})
    metrics, answers = evaluate(task, model, rows, 2, Accelerator(cpu=True))
    assert [answer["prediction"] for answer in answers] == [guesses[0], guesses[0], guesses[2]]
    scorer = RougeScorer(["rougeL"])
    pairs = zip(solutions, answers, strict=True)
    expected = [scorer.score(text, answer["prediction"])["rougeL"].fmeasure for text, answer in pairs]
    assert 0 < sum(expected) < 3
    assert metrics["rougeL"] == pytest.approx(sum(expected) / 3)
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    pairs = list(zip(rows["prompt"], solutions, strict=True))
    with torch.no_grad():
        assert metrics["loss"] == pytest.approx(float(losses(model, task.tokenizer, pairs).mean()), rel=1e-5)
    assert task.default_metric == "rougeL"
    assert make_task(bases["llama"]).default_metric == "loss"


@pytest.mark.parametrize(
    ("row", "task_kwargs", "with_targets", "message"),
    [
        ({"text": ""}, {}, True, "row 1: 'text' is empty"),
        ({"text": None}, {}, True, "row 1: 'text' must be a text, got None"),
        ({"prompt": 3, "text": "w1"}, {}, True, "row 1: 'prompt' must be a text, got 3"),
        (
            {"prompt": "w1", "text": "w1"},
            {"packing": True},
            True,
            "row 1: the row has a prompt, but `task_kwargs.packing`",
        ),
        ({"text": "w1"}, {"generate": True}, True, "row 1: there is no 'prompt' to generate from"),
        ({"prompt": " "}, {}, False, "row 1: there is no 'prompt' to generate from"),
        ({"text": "w1"}, {}, False, "row 1: there is no 'prompt' to generate from"),
        ({"prompt": [], "text": "w1"}, {}, True, "'prompt' must be a text, .* choose the task chat"),
        ({"prompt": "w1", "completion": " "}, {}, True, "row 1: 'completion' is empty"),
        ({"answer": "w1"}, {}, True, r"has no column 'text'.*data.columns: \{text: ...\}"),
    ],
)
def test_bad_rows(bases, row, task_kwargs, with_targets, message):
    task = make_task(bases["llama"], task_kwargs=task_kwargs)
    with pytest.raises(DataError, match=message):
        task.check(Dataset.from_list([row]), "rows.jsonl", with_targets)


@pytest.mark.parametrize(
    ("task_kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "`task_kwargs.max_new_tokens` must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 24}, r"above `task_kwargs.max_new_tokens` \(24\), got 24"),
        ({"generation_kwargs": {"beams": 2}}, "`task_kwargs.generation_kwargs.beams`: .*no such setting"),
        ({"generation_kwargs": {"max_new_tokens": 2}}, "set `task_kwargs.max_new_tokens` instead"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "cannot be set"),
        ({"pack": True}, "`task_kwargs.pack`: causal-lm has no such setting"),
    ],
)
def test_bad_recipes(bases, task_kwargs, message):
    with pytest.raises(RecipeError, match=message):
        make_task(bases["llama"], task_kwargs=task_kwargs)


def test_a_tokenizer_must_have_an_end(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="no end-of-sequence token"):
        TASK_CLASSES["causal-lm"](make_recipe(tiny_bert), tokenizer)


def test_generation_kwargs_reach_generate(bases):
    model = with_prefix(bases["gpt2"])
    settings = {"max_new_tokens": 5, "generation_kwargs": {"suppress_tokens": [*range(6), *range(10, 99)]}}
    task = make_task(bases["gpt2"], task_kwargs=settings)
    (answer,) = answer_rows(task, model, {"prompt": [words(1, 2)]}, 1, CPU)
    assert set(answer["prediction"].split()) <= set(WORDS[:4])  # the ids from 6 to 9


def greeting_rows(count: int) -> list[dict]:
    return [{"prompt": words(i % 5, 10 + i % 3), "text": words(60, 61, 62)} for i in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_on_prompts(bases, kind, tmp_path):
    data = Data(
        train=write_rows(tmp_path / "train.jsonl", greeting_rows(24)),
        validation=write_rows(tmp_path / "validation.jsonl", greeting_rows(5)),
    )
    settings = {"generate": True, "max_new_tokens": 5}
    recipe = make_recipe(
        bases[kind],
        tmp_path / "out",
        data,
        learning_rate=0.3,
        num_train_epochs=20,
        eval_steps=60,
        task_kwargs=settings,
    )
    results = train(recipe)
    assert results["metric"] == "rougeL"
    assert results["validation"]["exact_match"] == 1.0
    assert results["validation"]["perplexity"] == pytest.approx(math.exp(results["validation"]["loss"]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), tmp_path / "out").eval()
    task = make_task(bases[kind], task_kwargs={"max_new_tokens": 5})
    answers = answer_rows(task, model, {"prompt": [words(3, 10), words(4, 11)]}, 2, CPU)
    assert answers == [{"prediction": words(60, 61, 62)}] * 2


@pytest.mark.parametrize("packing", [False, True])
def test_training_on_texts(bases, packing, tmp_path):
    rows = [{"text": words(*range(10 + i % 3))} for i in range(30)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    settings = {"packing": packing}
    recipe = make_recipe(
        bases["gpt2"], tmp_path / "out", Data(train=path), learning_rate=0.3, num_train_epochs=8, task_kwargs=settings
    )
    results = train(recipe)
    before, _ = evaluate(
        make_task(bases["gpt2"]),
        AutoModelForCausalLM.from_pretrained(bases["gpt2"]).eval(),
        Dataset.from_list(rows),
        8,
        Accelerator(cpu=True),
    )
    assert results["metric"] == "loss"
    assert results["validation"]["perplexity"] < before["perplexity"] / 5

    prompts = [words(0), words(0, 1, 2)]
    source = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    assert predict(tmp_path / "out", source, tmp_path / "answers.jsonl") == 2
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), tmp_path / "out").eval()
    expected = one_by_one(model, AutoTokenizer.from_pretrained(bases["gpt2"]), prompts, 12)
    assert [answer["prediction"] for answer in answers] == expected


def test_real_model_continues_a_text(shared):
    folder = str(shared / "models" / "stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    task = make_task(folder, max_length=128, task_kwargs={"max_new_tokens": 20})
    prompts = ["Once upon a time, there was a", "Tom had a big red ball. One day, he", "The cat"]
    answers = answer_rows(task, model, {"prompt": prompts}, 3, CPU)
    write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    for prompt, answer in zip(prompts, answers, strict=True):
        (expected,) = write(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)
        assert answer["prediction"].strip() == expected["generated_text"].strip()
        assert len(answer["prediction"].split()) > 8


def test_the_example(shared, tmp_path):
    model = shared / "models" / "stories260k"
    shown = example("causal_lm.py", "--model", model, "--output", tmp_path / "out", "--epochs", 1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    lines = re.findall(r"^(with\S*) the prefix +(\d+\.\d\d) +(\d) of 6$", shown, re.MULTILINE)
    assert [line[0] for line in lines] == ["without", "with"]
    assert lines[1][1] == f"{results['perplexity']:.2f}"
    assert float(lines[1][1]) < float(lines[0][1])
    _, *texts = re.findall(r"\.\.\. ?(.*)$", shown, re.MULTILINE)
    assert len(texts) == 2
    assert texts[0] != texts[1]
