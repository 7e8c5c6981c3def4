"""Distillation of a text: the loss and its teacher, the start, and the questions that the model makes."""

import json

import pytest
import torch
from conftest import save_base, write_rows
from test_loop import Crash, before_step, crash, what_counts
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_adapter.cli import main
from prefix_adapter.training import Data, DataError, Recipe, RecipeError, SelfStudy, self_study, train

TEXT = "w3 w60 w17 w5 w44 w2"
ROWS = [
    {"context": TEXT, "prompt": "w9 w10", "text": "w11 w12 w13"},
    {"context": TEXT, "prompt": "w20", "text": "w8"},
    {"context": "w1 w2 w7", "prompt": "w30 w31", "text": "w33 w34"},
]
# The template of a chat: [CLS], the system message and [SEP], w70 and the question, w71 and the answer.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '[CLS] ', 'user': 'w70 '}[m.role] ~ m.content ~ ' [SEP] ' }}{% endfor %}"
    "{{ 'w71 ' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: save_base(folder / kind, kind, "AutoModelForCausalLM") for kind in ("llama", "gpt2")}
    found["chat"] = save_base(folder / "chat", "llama", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(found["chat"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(found["chat"])
    return found


@pytest.fixture
def distilling(tmp_path, bases):
    data = {name: write_rows(tmp_path / f"{name}.jsonl", ROWS) for name in ("train", "validation")}

    def make(name="out", kind="llama", adapter=None, **changes):
        adapter = {"num_virtual_tokens": 3, "num_frozen_tokens": 1, "prefix_dropout": 0.0, **(adapter or {})}
        settings = {"max_steps": 1, "batch_size": len(ROWS), "logging_steps": 1, "max_length": 24, **changes}
        output = str(tmp_path / name)
        return Recipe(
            task="distil", model=bases[kind], output_dir=output, data=Data(**data), adapter=adapter, **settings
        )

    return make


def ids_of(text):
    return [int(word[1:]) + 6 for word in text.split()]


@torch.no_grad()
def divergence(base, front) -> float:
    """The mean divergence from the model behind each row's context of the model behind the tokens `front`."""
    model, total, count = AutoModelForCausalLM.from_pretrained(base).eval(), 0.0, 0
    for row in ROWS:
        answer = [*ids_of(row["text"]), 5]

        def logits(before, row=row, answer=answer):
            ids = torch.tensor([[*before, *ids_of(row["prompt"]), *answer]])
            return model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)

        teacher, student = logits(ids_of(row["context"])), logits(front)
        total += kl_div(student, teacher, log_target=True, reduction="sum").item()
        count += len(answer)
    return total / count


def first_loss(folder) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"gradient_checkpointing": True}),
        ("gpt2", {"adapter": {"shift_positions": True}}),
    ],
)
def test_the_first_loss_is_that_of_the_first_tokens_against_the_whole_text(distilling, bases, tmp_path, kind, changes):
    train(distilling(kind=kind, **changes))
    front = ids_of(TEXT)[:3]
    assert first_loss(tmp_path / "out") == pytest.approx(divergence(bases[kind], front), abs=1e-5)
    assert abs(divergence(bases[kind], []) - divergence(bases[kind], front)) > 1e-3


def test_without_an_adapter_the_loss_is_that_of_the_model_without_the_text(distilling, bases):
    recipe = distilling(adapter=None)
    recipe.adapter = {"peft_type": "NONE"}
    assert train(recipe)["validation"]["loss"] == pytest.approx(divergence(bases["llama"], []), abs=1e-5)


def test_it_learns_and_resumes_bit_for_bit(distilling, monkeypatch, tmp_path):
    settings = {"max_steps": 12, "num_train_epochs": 12, "eval_steps": 4, "learning_rate": 0.1}
    results = train(distilling("whole", **settings))
    assert results["validation"]["loss"] < 0.7 * first_loss(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        before_step(patch, 6, crash)
        train(distilling("cut", **settings))
    train(distilling("cut", **settings), resume=True)
    assert what_counts(tmp_path / "cut") == what_counts(tmp_path / "whole")


def test_a_prefix_that_is_longer_than_the_text(distilling):
    with pytest.raises(RecipeError, match="`init_rows`: the context of the first row has 6"):
        train(distilling(adapter={"num_virtual_tokens": 7}, init_rows=True))


def test_the_teacher_must_stay_as_it_is(distilling):
    recipe = distilling()
    recipe.adapter = {"peft_type": "FULL"}
    with pytest.raises(RecipeError, match="it is the teacher"):
        train(recipe)


def test_rows_need_a_context(distilling, tmp_path):
    recipe = distilling()
    for name in ("train", "validation"):
        setattr(recipe.data, name, write_rows(tmp_path / "bare.jsonl", [{"prompt": "w1", "text": "w2"}]))
    with pytest.raises(DataError, match="there is no 'context'"):
        train(recipe)


# ---- Questions


def study(recipe, path, questions=6, **changes):
    settings = {"batch_size": 4, "question_tokens": 3, "answer_tokens": 4, **changes}
    self_study(f"{TEXT}\n", path, recipe, SelfStudy(questions=questions, **settings))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "chat"])
def test_questions_do_not_depend_on_interruptions(distilling, tmp_path, kind):
    recipe = distilling(kind=kind)
    whole = study(recipe, tmp_path / "whole.jsonl")
    assert whole and all(row["number"] < 6 for row in whole)
    context = f"[CLS] {TEXT} [SEP] " if kind == "chat" else f"{TEXT}\n\n"
    start = "w70 " if kind == "chat" else "Question: "
    assert all(row["context"] == context and row["prompt"].startswith(start) for row in whole)
    path = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20])
    assert study(recipe, path) == whole
    assert study(recipe, path, 3) == whole  # nothing is taken away
    with pytest.raises(RecipeError, match="other settings"):
        study(recipe, path, temperature=1.0)
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match="row 1 is damaged"):
        study(recipe, path)


def test_one_command_from_a_text_to_an_adapter(bases, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["distil", str(tmp_path / "text.txt"), "--config", "distil", "--model", bases["llama"]]
    arguments += ["--output_dir", str(tmp_path / "run"), "--adapter.num_virtual_tokens", "4", "--max_length", "32"]
    arguments += ["--study.questions", "12", "--study.answer_tokens", "4", "--batch_size", "4", "--quiet"]
    main([*arguments, "--max_steps", "2"])
    assert "The adapter is in" in capsys.readouterr().out
    questions = (tmp_path / "run-questions.jsonl").read_bytes()
    main([*arguments, "--max_steps", "4"])  # the same run, longer
    assert (tmp_path / "run-questions.jsonl").read_bytes() == questions
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "validation"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(results["validation"]["loss"], abs=1e-5)
