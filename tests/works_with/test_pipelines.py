"""Pipelines beside those of `tests/test_transformers.py`: answers are those of plain tensor maths for a text alone."""

import pytest
import reference
import tiny
import torch
import transformers as tr
from plain import N, table_of, text, tokenizer

from prefix_adapter import PrefixTuningV2Config, get_peft_model

TEXTS = [text(length, seed) for seed, length in enumerate((3, 7, 5))]


def wrapped(auto_class, task=None):
    model = get_peft_model(tiny.model("bert", auto_class), PrefixTuningV2Config(task_type=task, num_virtual_tokens=N))
    tiny.randomize(model)
    return model.eval()


def states(model, words, sentence, prefix=True):
    """Last hidden states `[tokens, hidden]` of one text."""
    weights = {
        name if name.startswith("bert.") else f"bert.{name}": w for name, w in reference.weights_of(model).items()
    }
    ids = torch.tensor([words(sentence)["input_ids"]])
    table = table_of(model) if prefix else None
    with torch.no_grad():
        return reference.hidden_states("bert", model.config, weights, ids, torch.ones_like(ids), table)[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_feature_extraction(batch_size):
    model, words = wrapped("AutoModel"), tokenizer()
    found = tr.pipeline("feature-extraction", model=model, tokenizer=words, device="cpu")(TEXTS, batch_size=batch_size)
    for row, each in zip(found, TEXTS, strict=True):
        expected = states(model, words, each)
        torch.testing.assert_close(torch.tensor(row[0])[: len(expected)], expected, rtol=1e-4, atol=1e-4)
        assert (expected - states(model, words, each, prefix=False)).abs().max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_token_classification(batch_size):
    model, words = wrapped("AutoModelForTokenClassification", "TOKEN_CLS"), tokenizer()
    tag = tr.pipeline("token-classification", model=model, tokenizer=words, device="cpu", ignore_labels=[])
    head = model.base_model.model.classifier.modules_to_save["default"]
    answers = {}
    for prefix in (True, False):
        scores = [(states(model, words, each, prefix) @ head.weight.T + head.bias).softmax(-1) for each in TEXTS]
        answers[prefix] = [[(row.argmax().item(), row.max().item()) for row in each] for each in scores]
    found = [
        [(model.config.label2id[word["entity"]], word["score"]) for word in row]
        for row in tag(TEXTS, batch_size=batch_size)
    ]
    assert [[label for label, _ in row] for row in found] == [[label for label, _ in row] for row in answers[True]]
    flat, expected, base = (
        [score for row in each for _, score in row] for each in (found, answers[True], answers[False])
    )
    assert flat == pytest.approx(expected, abs=1e-4) and flat != pytest.approx(base, abs=1e-2)


def test_zero_shot_classification():
    """Each candidate label is a second text beside the first."""
    model, words = wrapped("AutoModelForSequenceClassification", "SEQ_CLS"), tokenizer()
    model.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
    model.config.id2label = {index: name for name, index in model.config.label2id.items()}
    classify = tr.pipeline("zero-shot-classification", model=model, tokenizer=words, device="cpu")
    labels = ["w20", "w30 w31"]
    found = classify(TEXTS[1], labels, hypothesis_template="w9 {}", multi_label=True)
    scores = {}
    for label in labels:
        ids = torch.tensor([words(TEXTS[1], f"w9 {label}")["input_ids"]])
        weights = reference.weights_of(model)
        table = table_of(model)
        _, logits = reference.encoder("bert", model.config, weights, ids, torch.ones_like(ids), table, shift=0)
        scores[label] = logits[0, [0, 2]].softmax(-1)[1].item()
    assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(scores, abs=1e-4)
