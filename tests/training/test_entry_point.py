"""`adapter: {entry_point: attention}`: the training command with backbones whose attention takes no cache."""

import dataclasses
import importlib
import json

import pytest
import tiny
import torch
import transformers
from conftest import save_base, topic_rows, write_rows
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoTokenizer

from prefix_adapter import UnsupportedBackboneError
from prefix_adapter.cli import main
from prefix_adapter.training import (
    Data,
    JointRecipe,
    Recipe,
    evaluate_adapter,
    load_recipe,
    predict,
    reports,
    train,
    train_together,
)
from prefix_adapter.training.search import Search, search

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 2, "num_attention_heads": tiny.HEADS,
    "intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "albert": transformers.AlbertConfig(**SIZES, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=tiny.VOCAB, dim=tiny.HIDDEN, n_layers=2, n_heads=tiny.HEADS, hidden_dim=48, initializer_range=0.2
    ),
    "modernbert": transformers.ModernBertConfig(
        **SIZES, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=4,
        global_attn_every_n_layers=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """The folders of tiny random models with a tokenizer."""
    folders = {}
    for kind, config in CONFIGS.items():
        folders[kind] = save_base(tmp_path_factory.mktemp("base") / kind, "bert")
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folders[kind])
    return folders


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(reports, "draw_curve", lambda *args: None)
    monkeypatch.setattr(importlib.import_module("prefix_adapter.training.search"), "_draw_plots", lambda *args: None)


def recipe(base, data, output, **changes) -> Recipe:
    return Recipe(
        **{
            "task": "sequence-classification",
            "model": base,
            "output_dir": str(output),
            "data": Data(**data),
            "adapter": {"num_virtual_tokens": 4, "entry_point": "attention"},
            "batch_size": 8,
            "max_steps": 6,
            "eval_steps": 3,
            "max_length": 16,
            **changes,
        }
    )


def question_rows(count: int, start: int = 0) -> list[dict]:
    """Questions with one word, which is the answer."""
    rows = []
    for i in range(start, start + count):
        words = [f"w{(i * 7 + j * 11) % 60}" for j in range(6)]
        answer, context = words[i % 6], " ".join(words)
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": str(i), "question": answer, "context": context, "answers": answers})
    return rows


@pytest.mark.parametrize("kind", ["distilbert", "modernbert"])
def test_trained_resumed_and_used(kind, bases, topics, tmp_path, capsys):
    topics["test"] = write_rows(tmp_path / "test.jsonl", topic_rows(9, 200))
    settings = {"lr_scheduler_type": "constant", "gradient_checkpointing": True}
    whole = recipe(bases[kind], topics, tmp_path / "whole", **settings)
    results = train(whole)
    half = dataclasses.replace(whole, output_dir=str(tmp_path / "out"), max_steps=3)
    train(half)
    train(dataclasses.replace(half, max_steps=6), resume=True)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert evaluate_adapter(tmp_path / "out") == pytest.approx(results["test"], abs=1e-6)
    predict(tmp_path / "out", topics["test"], tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    # The adapter in PEFT alone, one row at a time.
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases[kind], model_input_names=["input_ids", "attention_mask"])
    labels = load_recipe(tmp_path / "out" / "recipe.yaml").labels
    with torch.no_grad():
        for answer in answers:
            expected = model(**tokenizer(answer["text"], return_tensors="pt")).logits.softmax(-1)[0]
            assert answer["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
            assert answer["prediction"] == labels[expected.argmax()]
    main(["info", str(tmp_path / "out")])
    assert "attention" in capsys.readouterr().out


def test_a_head_of_questions_with_another_name(bases, tmp_path):
    """ModernBERT's head for questions is `classifier`, which PEFT saves for other tasks by itself."""
    rows = {name: write_rows(tmp_path / f"{name}.jsonl", question_rows(16)) for name in ("train", "validation")}
    train(recipe(bases["modernbert"], rows, tmp_path / "out", task="question-answering", max_length=24))
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)


def test_trained_together(bases, topics, tmp_path):
    rows = write_rows(tmp_path / "questions.jsonl", question_rows(16))
    values = {
        "model": bases["modernbert"],
        "output_dir": str(tmp_path / "out"),
        "adapter": {"num_virtual_tokens": 4, "entry_point": "attention"},
        "batch_size": 4,
        "max_steps": 4,
        "tasks": {
            "topics": {"task": "sequence-classification", "data": topics},
            "questions": {"task": "question-answering", "data": {"train": rows, "validation": rows}},
        },
    }
    results = train_together(JointRecipe.from_dict(values))
    for name, own in results["tasks"].items():
        assert evaluate_adapter(tmp_path / "out" / name) == pytest.approx(own["validation"], abs=1e-5)


def test_searched(bases, topics, tmp_path):
    space = {"adapter.layers_to_transform": [[0], None]}
    made = recipe(bases["albert"], topics, tmp_path / "out", max_steps=2, eval_steps=2)
    report = search(made, Search(space, n_trials=2, sampler="grid"))
    assert report["complete"] == 2
    sizes = [json.loads((tmp_path / f"out/trials/{i}/results.json").read_text())["trained_parameters"] for i in (0, 1)]
    assert abs(sizes[0] - sizes[1]) == 4 * 2 * tiny.HIDDEN


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_error_without_it_names_the_key(kind, bases, topics, tmp_path):
    with pytest.raises(UnsupportedBackboneError, match=r"`adapter\.entry_point: attention`"):
        train(recipe(bases[kind], topics, tmp_path / "out", adapter={"num_virtual_tokens": 4}))
    assert not (tmp_path / "out").exists()
