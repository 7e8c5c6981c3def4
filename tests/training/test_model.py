"""The base model of a run: its tokenizer and its head."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, save_base, topic_rows, write_rows
from datasets import Dataset
from test_run import recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from prefix_adapter import PeftModel
from prefix_adapter.training import DataError, RecipeError, evaluate_adapter, predict, train
from prefix_adapter.training.model import load_base, load_tokenizer, wrap
from prefix_adapter.training.tasks import TASK_CLASSES


def task_of(made):
    return TASK_CLASSES[made.task](made, load_tokenizer(made))


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5", "bart"])
def test_a_folder_without_a_tokenizer_is_refused(kind, topics, tmp_path):
    """transformers then makes a tokenizer without words, with which no text can be learned."""
    base = Path(save_base(tmp_path / "base", kind))
    for path in base.glob("*token*"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"`model`: .*(has no tokenizer|no tokenizer can be loaded)"):
        train(recipe(str(base), topics, tmp_path / "out", labels=["a", "b"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"backbone_dropout": True}, {"adapter": {"peft_type": "FULL"}}])
def test_dropout_of_the_backbone(settings, tiny_bert, topics, tmp_path):
    """It is off in a frozen backbone, unless the recipe turns it on; the head keeps its own."""
    folder = shutil.copytree(tiny_bert, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.1}))
    made = recipe(str(folder), topics, tmp_path / "out", labels=["a", "b"], **settings)
    task = task_of(made)
    base, new = load_base(made, task)
    wrap(made, task, base, new)
    modules = dict(base.bert.named_modules())
    probabilities = {module.p for name, module in modules.items() if name.endswith("output.dropout")}
    assert probabilities == ({0.1} if settings else {0.0})
    assert base.dropout.p == 0.1


def test_an_unused_dropout_of_the_backbone_is_refused(tiny_bert, topics, tmp_path):
    settings = {"model_kwargs": {"hidden_dropout_prob": 0.2}}
    with pytest.raises(RecipeError, match=r"`model_kwargs.hidden_dropout_prob`: .*`backbone_dropout: true`"):
        recipe(tiny_bert, topics, tmp_path / "out", **settings)
    recipe(tiny_bert, topics, tmp_path / "out", **settings, backbone_dropout=True)
    recipe(tiny_bert, topics, tmp_path / "out", **settings, adapter={"peft_type": "FULL"})


def save_tokenizer(folder: str, words: list[str], **special) -> None:
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", **special}
    tokens = [token for token in special.values() if token is not None]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*tokens, *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_a_tokenizer_of_another_model_is_refused(tiny_bert, topics, tmp_path):
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    save_tokenizer(base, [f"x{i}" for i in range(200)])
    with pytest.raises(
        RecipeError, match=r"has a token 203 \('x199'\), and the model has embeddings for 99 tokens only"
    ):
        train(recipe(str(base), topics, tmp_path / "out"))
    save_tokenizer(base, [f"x{i}" for i in range(90)])  # its size fits, and it has none of the words
    with pytest.raises(DataError, match=r"train.jsonl: 100% of the tokens are unknown to the tokenizer of"):
        train(recipe(str(base), topics, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tokens_that_were_added_without_embeddings_are_refused(tiny_bert, topics, tmp_path):
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"new{i}" for i in range(20)])
    tokenizer.save_pretrained(base)
    train(recipe(str(base), topics, tmp_path / "fine", max_steps=1))  # no text has a token beyond the embeddings
    rows = [*topic_rows(20), {"text": "w1 new19 w2", "label": "a"}]
    with pytest.raises(
        DataError, match=r"rows.jsonl: the tokenizer makes token 105 \('new19'\) .* for 99 tokens only"
    ):
        train(recipe(str(base), {"train": write_rows(tmp_path / "rows.jsonl", rows)}, tmp_path / "out"))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(RecipeError, match=r"token 106 \('<pad>'\).*not resized"):
        train(recipe(str(base), topics, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("unknown", "said"), [(2, None), (4, "33%"), (6, None)])
def test_unknown_words_are_counted(tiny_bert, topics, capsys, unknown, said):
    """The token ids of the words, without special tokens."""
    task = task_of(recipe(tiny_bert, topics, "out", labels=["a", "b"]))
    text = " ".join([*(f"?{i}" for i in range(unknown)), *WORDS[:8]])
    rows = Dataset.from_list([{"text": text, "label": "a"}] * 3)
    features = rows.map(task.features, batched=True, with_indices=True, fn_kwargs={"with_targets": True})
    capsys.readouterr()
    if unknown == 6:
        features = features.map(lambda row: {"input_ids": [*row["input_ids"], 1, 1, 1]})  # 9 of 17 words
        with pytest.raises(DataError, match="53% of the tokens are unknown"):
            task.check_tokens(features, "rows")
        return
    task.check_tokens(features, "rows")
    shown = capsys.readouterr().err
    assert (f"rows: {unknown / (unknown + 8):.0%} of the tokens are unknown" in shown) == (
        unknown / (unknown + 8) > 0.1
    )
    assert said is None or said in shown


def test_unknown_words_in_choices_are_counted(tiny_bert, tmp_path):
    rows = [{"text": "x y", "choices": ["z", "t"], "label": 0}] * 3
    made = recipe(
        tiny_bert, {"train": write_rows(tmp_path / "r.jsonl", rows)}, tmp_path / "out", task="multiple-choice"
    )
    with pytest.raises(DataError, match="100% of the tokens are unknown"):
        train(made)


def test_a_base_model_without_the_head_of_the_task(tiny_bert, tmp_path):
    rows = write_rows(tmp_path / "r.jsonl", [{"text": "x", "target": "y"}] * 3)
    with pytest.raises(RecipeError, match=r"AutoModelForSeq2SeqLM: Bert has no such head. Choose another base model,"):
        train(recipe(tiny_bert, {"train": rows}, tmp_path / "out", task="seq2seq-lm"))


def test_a_tokenizer_that_cannot_pad_is_refused(tiny_bert, topics, tmp_path):
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    save_tokenizer(base, WORDS, pad_token=None)
    with pytest.raises(RecipeError, match=r"neither a padding nor an end-of-sequence token"):
        train(recipe(str(base), topics, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bart", "t5", "llama"])
def test_a_head_of_another_size_makes_room_for_a_new_one(kind, topics, tmp_path, capsys):
    """The saved base has a head for three labels, and the rows have two."""
    base = save_base(tmp_path / "base", kind, "AutoModelForSequenceClassification")
    train(recipe(base, topics, tmp_path / "out", num_train_epochs=1))
    assert f"{base} has a head with 3 outputs. The task needs 2, so a new head replaces it." in capsys.readouterr().err
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)


def test_tags_and_questions_with_a_head_of_another_size(tmp_path):
    base = save_base(tmp_path / "base", "bert", "AutoModelForTokenClassification")
    rows = [{"tokens": ["w1", "w2"], "tags": ["A", "B"]}] * 8
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    results = train(recipe(base, data, tmp_path / "out", task="token-classification", max_steps=1))
    assert results["rows"]["train"] == 7


def test_another_size_of_the_backbone_is_refused(tiny_bert, topics, tmp_path):
    with pytest.raises(
        RecipeError, match=r"`model`: .*intermediate.dense.bias is \(48,\) in the .*and \(56,\) in its conf"
    ):
        train(recipe(tiny_bert, topics, tmp_path / "out", model_kwargs={"intermediate_size": 56}))
    made = recipe(tiny_bert, topics, tmp_path / "out", task="causal-lm", model_kwargs={"vocab_size": 120})
    with pytest.raises(RecipeError, match=r"`model`: .*weight is \(99, 32\)"):
        load_base(made, task_of(made))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_without_a_padding_token_classifies(kind, topics, tmp_path):
    """The head reads the last token before the padding, so the answers of a batch must be those of single rows."""
    base = Path(save_base(tmp_path / "base", kind))
    for name in ("config.json", "tokenizer_config.json"):
        settings = {k: v for k, v in json.loads((base / name).read_text()).items() if not k.startswith("pad_token")}
        (base / name).write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    train(recipe(str(base), topics, tmp_path / "out", num_train_epochs=2))
    texts = [row["text"] for row in topic_rows(9, 300)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    predict(tmp_path / "out", rows, tmp_path / "answers.jsonl", batch_size=9)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model, tokenizer = PeftModel.from_pretrained(model, tmp_path / "out").eval(), AutoTokenizer.from_pretrained(base)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    with torch.no_grad():
        for text, answer in zip(texts, answers, strict=True):
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
            assert math.isclose(answer["probability"], float(expected.max()), abs_tol=1e-5)
            assert answer["prediction"] == "ab"[expected.argmax()]
