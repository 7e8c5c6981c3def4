"""sentence-transformers: a training step and the embeddings are those of plain tensor maths, sentence by sentence."""

import pytest
import reference
import tiny
import torch
from datasets import Dataset
from pages import blocks, run
from plain import N, step, table_of, text
from torch.nn.functional import cross_entropy, normalize

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

st = pytest.importorskip("sentence_transformers", reason="needs the `works-with` extra")
losses = pytest.importorskip("sentence_transformers.losses")

RATE = 0.5
PAIRS = {"anchor": [text(3 + i, i) for i in range(4)], "positive": [text(6 - i, 9 + i) for i in range(4)]}


@pytest.fixture
def base(tmp_path):
    """The folder of a saved SentenceTransformer without an adapter."""
    words = [f"w{i}" for i in range(tiny.VOCAB)]
    folder = tiny.save(tmp_path / "bert", "bert", words, vocab_size=len(words) + 6)
    st.SentenceTransformer(folder, device="cpu").save(str(tmp_path / "base"))  # it adds mean pooling
    return str(tmp_path / "base")


def load(folder):
    return st.SentenceTransformer(folder, device="cpu")


def wrapped(folder):
    model = load(folder)
    config = PrefixTuningV2Config(num_virtual_tokens=N, prefix_dropout=0.0, init_std=0.5)
    model[0].model = get_peft_model(model[0].model, config)
    return model


def by_hand(model, table, sentences):
    """The mean of the last hidden states of each sentence alone."""
    inner = model[0].model.get_base_model()
    weights = {f"bert.{name}": value.detach() for name, value in inner.state_dict().items()}
    found = []
    for sentence in sentences:
        ids = model.tokenizer(sentence, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        found.append(reference.hidden_states("bert", inner.config, weights, ids, mask, table)[0].mean(dim=0))
    return torch.stack(found)


def test_a_step_and_encode(base, tmp_path):
    model = wrapped(base)
    before = table_of(model).detach().clone()
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model, scale=5.0)
    trainer = st.SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(PAIRS), loss=loss)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()

    def loss_of(table):
        anchors, positives = (normalize(by_hand(model, table, PAIRS[name]), dim=1) for name in PAIRS)
        return cross_entropy(5.0 * anchors @ positives.T, torch.arange(4))

    expected, moved = step(before, loss_of, RATE)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert (moved - before).abs().max() > 1e-3
    torch.testing.assert_close(table_of(model).detach(), moved, rtol=1e-3, atol=1e-5)

    embeddings = model.encode(PAIRS["anchor"], convert_to_tensor=True)
    torch.testing.assert_close(embeddings, by_hand(model, moved, PAIRS["anchor"]), rtol=1e-3, atol=1e-4)
    assert (embeddings - load(base).encode(PAIRS["anchor"], convert_to_tensor=True)).abs().max() > 0.1

    model[0].model.save_pretrained(tmp_path / "adapter")
    again = load(base)
    again[0].model = PeftModel.from_pretrained(again[0].model, tmp_path / "adapter")
    assert torch.equal(again.encode(PAIRS["anchor"], convert_to_tensor=True), embeddings)


@pytest.mark.usefixtures("native_adapters")
def test_saved_as_a_whole(base, tmp_path):
    """`SentenceTransformer.save` keeps the adapter, and loading finds the base model through transformers."""
    model = wrapped(base)
    tiny.randomize(model)
    model.save(str(tmp_path / "whole"))
    expected = model.encode(PAIRS["anchor"], convert_to_tensor=True)
    assert torch.equal(load(str(tmp_path / "whole")).encode(PAIRS["anchor"], convert_to_tensor=True), expected)


def test_the_page_runs(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/works-with.md")
    run(code, {"sentence-transformers/all-MiniLM-L6-v2": minilm})
    assert capsys.readouterr().out.endswith("(1, 384)\n")
