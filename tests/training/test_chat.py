"""Chat: answers in conversations, by the tokenizer's chat template."""

import json
import math

import pytest
import torch
from conftest import save_base, write_rows
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, Recipe, RecipeError, predict, train
from prefix_adapter.training.evaluation import answer_rows
from prefix_adapter.training.tasks import TASK_CLASSES

# A message of the user begins with w70, an answer with w71, and every message ends with [SEP] and a space.
TEMPLATE = (
    "{{ '[CLS] ' }}{% for m in messages %}{{ 'w70 ' if m.role == 'user' else 'w71 ' if m.role == 'assistant' else "
    "raise_exception('no role ' + m.role) }}{{ m.content }}{{ ' [SEP] ' }}{% endfor %}"
    "{{ 'w71 ' if add_generation_prompt else '' }}"
)
# As templates that leave out the reasoning in all answers but the last.
FORGETFUL = TEMPLATE.replace("m.content }}", "m.content if loop.last or m.role == 'user' else 'w79' }}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = save_base(tmp_path_factory.mktemp("chat") / "llama", "llama", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[CLS]", "[SEP]"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe(base, output="unused", data=None, **changes) -> Recipe:
    settings = {"adapter": {"num_virtual_tokens": 4}, "max_length": 24, "batch_size": 4, **changes}
    return Recipe(task="chat", model=base, output_dir=output, data=data or Data(), **settings)


def make_task(base, template=None, **changes):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    return TASK_CLASSES["chat"](make_recipe(base, **changes), tokenizer)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def features_of(task, messages, with_targets=True):
    """Each feature as a pair of texts: all tokens, and those in the loss."""
    return features_of_row(task, {"messages": messages}, with_targets)


def features_of_row(task, row, with_targets=True):
    """As `features_of`, for a row with any columns."""
    found = task.features({name: [value] for name, value in row.items()}, [0], with_targets)
    labels = found.get("labels") or [[]] * len(found["input_ids"])
    decode = task.tokenizer.decode
    return [
        (decode(ids), decode([label for label in own if label != -100]))
        for ids, own in zip(found["input_ids"], labels, strict=True)
    ]


TWO_TURNS = [user("w1 w2"), assistant("w3"), user("w4"), assistant("w5 w6")]


def test_all_answers_are_in_the_loss_of_one_feature(base):
    whole = "[CLS] w70 w1 w2 [SEP] w71 w3 [SEP] w70 w4 [SEP] w71 w5 w6 [SEP]"
    assert features_of(make_task(base), TWO_TURNS) == [(whole, "w3 [SEP] w5 w6 [SEP]")]


def test_labels_stand_at_their_tokens(base):
    found = make_task(base).features({"messages": [TWO_TURNS]}, [0], True)
    pairs = zip(found["labels"][0], found["input_ids"][0], strict=True)
    assert all(label in (-100, token) for label, token in pairs)


def test_an_answer_that_is_rendered_differently_later_has_a_feature_of_its_own(base):
    assert features_of(make_task(base, FORGETFUL), TWO_TURNS) == [
        ("[CLS] w70 w1 w2 [SEP] w71 w3 [SEP]", "w3 [SEP]"),
        ("[CLS] w70 w1 w2 [SEP] w71 w79 [SEP] w70 w4 [SEP] w71 w5 w6 [SEP]", "w5 w6 [SEP]"),
    ]


def test_no_answer_of_a_long_conversation_is_lost(base):
    task = make_task(base, max_length=8, task_kwargs={"max_new_tokens": 2})
    assert features_of(task, TWO_TURNS) == [
        ("[CLS] w70 w1 w2 [SEP] w71 w3 [SEP]", "w3 [SEP]"),
        ("[SEP] w70 w4 [SEP] w71 w5 w6 [SEP]", "w5 w6 [SEP]"),
    ]


@pytest.mark.parametrize("messages", [TWO_TURNS, TWO_TURNS[:3]])
def test_predictions_begin_after_the_last_question(base, messages):
    prompt = "[CLS] w70 w1 w2 [SEP] w71 w3 [SEP] w70 w4 [SEP] w71"
    assert features_of(make_task(base, task_kwargs={"max_new_tokens": 2}), messages, False) == [(prompt, "")]


def test_the_loss_is_that_of_the_answers(base):
    """Against the probabilities of the plain model for the tokens of the template as a whole."""
    task, model = make_task(base), AutoModelForCausalLM.from_pretrained(base).eval()
    batch = task.collate([{k: v[0] for k, v in task.features({"messages": [TWO_TURNS]}, [0], True).items()}])
    ids = task.tokenizer.apply_chat_template(TWO_TURNS, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        loss, _ = task.loss(model, batch)
        probabilities = log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
    texts = task.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    answers = [texts.index("w3"), texts.index("w3") + 1, texts.index("w5"), texts.index("w6"), texts.index("w6") + 1]
    expected = -sum(probabilities[place - 1, ids[0, place]] for place in answers) / len(answers)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_keys_that_arrow_adds_to_messages_do_not_reach_the_template(base):
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ ' w9' if m.name is defined else '' }}")
    row = [{**user("w1"), "name": None}, assistant("w3")]
    assert features_of(make_task(base, template), row)[0][0] == "[CLS] w70 w1 [SEP] w71 w3 [SEP]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("w1", "'messages' must be a list"),
        ([], "'messages' must be a list"),
        ([{"role": "user"}], "message 1 of 'messages' must have a text 'role' and a text 'content'"),
        ([user("w1"), assistant(None)], "message 2 of 'messages' must have a text"),
        ([user("w1")], "the last message of 'messages' must be of 'assistant', got 'user'"),
        ([assistant("w1")], "no message before the last one"),
        ([{"role": "poet", "content": "w1"}, assistant("w1")], "does not take the conversation: no role poet"),
    ],
)
def test_bad_rows(base, messages, message):
    assert message in make_task(base).problem({"messages": messages}, True)


COMPLETION = {"prompt": TWO_TURNS[:3], "completion": [*TWO_TURNS[3:], user("w7"), assistant("w8")]}


def test_only_the_answers_in_a_completion_are_in_the_loss(base):
    whole = "[CLS] w70 w1 w2 [SEP] w71 w3 [SEP] w70 w4 [SEP] w71 w5 w6 [SEP] w70 w7 [SEP] w71 w8 [SEP]"
    task = make_task(base, max_length=32)
    assert task.problem(COMPLETION, True) is None
    assert features_of_row(task, COMPLETION) == [(whole, "w5 w6 [SEP] w8 [SEP]")]


def test_a_prompt_and_a_completion_that_are_texts_are_messages(base):
    row = {"prompt": "w1 w2", "completion": "w3"}
    assert features_of_row(make_task(base), row) == features_of(make_task(base), TWO_TURNS[:2])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": TWO_TURNS[:3]}, "[CLS] w70 w1 w2 [SEP] w71 w3 [SEP] w70 w4 [SEP] w71"),
        (COMPLETION, "[CLS] w70 w1 w2 [SEP] w71 w3 [SEP] w70 w4 [SEP] w71 w5 w6 [SEP] w70 w7 [SEP] w71"),
    ],
)
def test_predictions_begin_after_the_prompt_and_all_given_answers(base, row, prompt):
    task = make_task(base, max_length=32, task_kwargs={"max_new_tokens": 2})
    assert task.problem(row, False) is None
    assert features_of_row(task, row, False) == [(prompt, "")]


TOOL = {"type": "function", "function": {"name": "w9", "parameters": {}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_reach_the_template(base, tools):
    template = TEMPLATE.replace("'[CLS] '", "'[CLS] ' ~ (tools[0].function.name ~ ' ' if tools else '')")
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    row = {"messages": [user("w1"), call, {"role": "tool", "content": "w2"}, assistant("w3")], "tools": tools}
    template = template.replace("raise_exception('no role ' + m.role)", "'w72 '")
    task = make_task(base, template)
    assert task.problem(row, True) is None
    assert features_of_row(task, row)[0][0] == "[CLS] w9 w70 w1 [SEP] w71 [SEP] w72 w2 [SEP] w71 w3 [SEP]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": None}, "'completion' must be a text or a list of messages"),
        ({"completion": " "}, "'completion' is empty"),
        ({"completion": [{"role": "assistant"}]}, "message 1 of 'completion' must have a text 'role'"),
        ({"completion": [user("w1")]}, "the last message of 'completion' must be of 'assistant', got 'user'"),
        ({"prompt": [user("w1"), "w2"]}, "message 2 of 'prompt' must have a text 'role'"),
        ({"prompt": TWO_TURNS}, "the last message of 'prompt' must not be of 'assistant'"),
        ({"tools": "w1"}, "'tools' must be a list of mappings"),
        ({"tools": [1]}, "'tools' must be a list of mappings"),
    ],
)
def test_bad_prompts_and_completions(base, changes, message):
    assert message in make_task(base).problem({"prompt": "w1", "completion": "w2", **changes}, True)


def test_rows_with_prompts_and_completions(base, tmp_path):
    """Training, evaluation of the last answer, and predictions from a file with other columns besides."""
    rows = [
        {"prompt": [user(f"w{10 + i % 3}")], "completion": [assistant("w60 w61")], "id": i, "tools": None}
        for i in range(12)
    ]
    data = Data(train=write_rows(tmp_path / "train.jsonl", rows))
    settings = {"generate": True, "max_new_tokens": 3}
    results = train(
        make_recipe(base, tmp_path / "out", data, learning_rate=0.3, num_train_epochs=30, task_kwargs=settings)
    )
    assert results["validation"]["exact_match"] == 1.0
    write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "w11"}])
    predict(tmp_path / "out", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer == {"id": 1, "prompt": "w11", "prediction": "w60 w61"}


def test_a_template_whose_answers_do_not_begin_where_generation_begins(base):
    template = TEMPLATE.replace("'w71 ' if add", "'w72 ' if add")
    with pytest.raises(ValueError, match="does not begin where generation would begin"):
        make_task(base, template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "has no chat template"),
        (TEMPLATE.replace("[SEP]", "w72"), "ends an answer with 'w72', which is no special token"),
    ],
)
def test_bad_tokenizers(base, template, message):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=message):
        TASK_CLASSES["chat"](make_recipe(base), tokenizer)


def test_training_and_predictions(base, tmp_path):
    def rows(count):
        turns = [user("w1"), assistant("w2")]
        return [{"messages": [*turns, user(f"w{10 + i % 3}"), assistant("w60 w61 w62")]} for i in range(count)]

    data = Data(
        train=write_rows(tmp_path / "train.jsonl", rows(24)),
        validation=write_rows(tmp_path / "validation.jsonl", rows(6)),
    )
    settings = {"generate": True, "max_new_tokens": 5}
    results = train(
        make_recipe(
            base, tmp_path / "out", data, learning_rate=0.3, num_train_epochs=20, eval_steps=60, task_kwargs=settings
        )
    )
    assert results["validation"]["exact_match"] == 1.0
    assert results["validation"]["perplexity"] == pytest.approx(math.exp(results["validation"]["loss"]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    task = make_task(base, task_kwargs={"max_new_tokens": 5})
    question = [*rows(1)[0]["messages"][:2], user("w12")]
    assert answer_rows(task, model, {"messages": [question]}, 1, torch.device("cpu")) == [
        {"prediction": "w60 w61 w62"}
    ]
