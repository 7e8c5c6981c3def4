"""A whole run and its output folder."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import save_base, topic_rows, write_rows
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from prefix_adapter import PeftModel, PrefixTuningV2Config
from prefix_adapter.training import Data, Recipe, RecipeError, evaluate_adapter, reports, train


def recipe(base, topics, output, **changes) -> Recipe:
    return Recipe(
        **{
            "task": "sequence-classification",
            "model": base,
            "output_dir": output,
            "data": Data(**topics),
            "adapter": {"num_virtual_tokens": 4},
            "batch_size": 8,
            "num_train_epochs": 15,
            "max_length": 16,
            "learning_rate": 0.03,
            "head_learning_rate": 0.02,
            **changes,
        }
    )


def test_outputs_of_a_run(tiny_bert, topics, tmp_path, with_curve):
    adapter = {"num_virtual_tokens": 4, "prefix_projection": True}
    topics["test"] = write_rows(tmp_path / "test.jsonl", topic_rows(11, 300))
    results = train(recipe(tiny_bert, topics, tmp_path / "out", adapter=adapter))
    out = tmp_path / "out"
    assert results["validation"]["accuracy"] == 1.0
    assert json.loads((out / "results.json").read_text())["validation"] == results["validation"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in load_file(out / "adapter_model.safetensors") if "output" in name or "hidden" in name]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    folded = PeftModel.from_pretrained(base, out).eval()
    ids = torch.tensor([[2, 10, 20, 3]])
    logits = folded(input_ids=ids).logits
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    best = Path(out / "checkpoints" / f"step-{results['best_step']:06d}")
    unfolded = PeftModel.from_pretrained(base, best).eval()
    torch.testing.assert_close(unfolded(input_ids=ids).logits, logits)
    assert any("prefix_tuning_v2_output" in name for name in load_file(best / "adapter_model.safetensors"))
    _check_card(out / "README.md", results, [tmp_path, tiny_bert])
    _check_label_names(out)


def _check_card(path, results, folders):
    card = ModelCard.load(path)
    assert not [folder for folder in folders if str(folder) in card.content]
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "peft"
    assert "accuracy" in card.data.metrics and "prefix-adapter" in card.data.tags and card.data.base_model is None
    assert "More Information Needed" not in card.text
    assert "The head has 2 labels, in this order: `a`, `b`." in card.text
    assert "](curve.png)" in card.text and "Trained on 48 rows of files (`train.jsonl`)" in card.text
    rows, names = table_rows(card.text), list(results["validation"])
    assert ["`num_virtual_tokens`", "`4`"] in rows and ["batch size", "`8`"] in rows
    assert ["split", "rows", *names] in rows
    for split, count in (("validation", 19), ("test", 11)):
        (values,) = [row[2:] for row in rows if row[:2] == [split, str(count)]]
        assert list(map(float, values)) == pytest.approx([results[split][name] for name in names], abs=1e-4)


@pytest.mark.parametrize("path", ["user/data", "{folder}/a `b` | <c>", "no\x1b[2J name"])
def test_the_card_names_the_data_set(tmp_path, path):
    """A data set of the Hub is linked, and other names neither show a path nor break the card."""
    path = path.format(folder=tmp_path)
    made = Recipe(
        task="sequence-classification",
        model="user/base",
        output_dir=tmp_path / "out",
        data=Data(path=path, name="part", train="train[:9]", validation="dev", columns={"text": "a|b"}),
        adapter={"num_virtual_tokens": 4, "modules_to_save": ["x|`y`"]},
        labels=["a|b", "`", "<b>"],
    )
    results = {
        "validation": {"loss": 0.5, "accuracy": 0.75}, "metric": "accuracy", "epochs": 2.0, "trained_parameters": 1234,
        "learning_rates": [0.03, 0.02], "max_length": 16, "rows": {"train": 1200, "validation": 7}, "best_step": 3,
        "steps": 4, "mixed_precision": "no", "versions": {"torch": "2"},
    }  # fmt: skip
    named = {"label_names": made.labels, "base_model_name_or_path": "user/base"}
    PrefixTuningV2Config(task_type="SEQ_CLS", **named).save_pretrained(tmp_path)
    reports.write_run_card(tmp_path, made, results)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == (["user/data"] if path == "user/data" else None)
    assert card.data.base_model == "user/base" and str(tmp_path) not in card.content and "\x1b" not in card.content
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    assert len([token for token in tokens if token.type == "html_block"]) == 4  # the comments around our parts
    inline = [child for token in tokens for child in token.children or ()]
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert ("https://huggingface.co/datasets/user/data" in links) == (path == "user/data")
    assert not [child for child in inline if child.type == "html_inline"]
    assert {"a|b", "`", "<b>", "part", "train[:9]"} <= {
        child.content for child in inline if child.type == "code_inline"
    }
    assert ["validation", "7", "0.5000", "0.7500"] in table_rows(card.text)
    assert "Trained on 1,200 rows" in card.text and "curve.png" not in card.text


def table_rows(text):
    rows = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("tr_open", "table_close"):
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append(token.content)
    return rows


def _check_label_names(folder):
    """A pipeline shows the names of the labels, and answers as `predict` does."""
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    texts = [row["text"] for row in topic_rows(8, 200)]
    tokenizer = AutoTokenizer.from_pretrained(loaded.peft_config["default"].base_model_name_or_path)
    answers = pipeline("text-classification", model=loaded, tokenizer=tokenizer)(texts)
    assert [answer["label"] for answer in answers] == [row["label"] for row in topic_rows(8, 200)]


def test_a_card_keeps_the_text_of_a_user_when_a_run_goes_on(tiny_bert, topics, tmp_path):
    short = recipe(tiny_bert, topics, tmp_path / "out", num_train_epochs=1)
    train(short)
    path = tmp_path / "out" / "README.md"
    card = ModelCard.load(path)
    card.text = f"\n# Mine\n{card.text}\nWords.\n"
    card.data.license = "mit"
    card.save(path)
    train(recipe(tiny_bert, topics, tmp_path / "out", num_train_epochs=2), resume=True)
    again = ModelCard.load(path)
    assert again.text.startswith("\n# Mine\n") and again.text.endswith("\nWords.\n") and again.data.license == "mit"
    assert ["epochs", "`1`"] in table_rows(card.text) and ["epochs", "`2`"] in table_rows(again.text)
    assert again.text.count("\n# ") == 1 and again.text.count("## Training") == 1
    path.write_text("---\na: [\n---\n")
    with pytest.raises(RecipeError, match=r"README\.md cannot be read as a model card"):
        train(recipe(tiny_bert, topics, tmp_path / "out", num_train_epochs=3), resume=True)
    assert path.read_text() == "---\na: [\n---\n"


@pytest.mark.parametrize("kind", ["PREFIX_TUNING_V2", "LORA", "HEAD"])
def test_new_weights_are_trained_and_saved(topics, tmp_path, kind):
    """A masked-language BERT has no pooler. A frozen random pooler would differ after loading."""
    base = save_base(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    adapter = {"peft_type": kind} if kind != "PREFIX_TUNING_V2" else {"num_virtual_tokens": 4}
    train(recipe(base, topics, tmp_path / "out", adapter=adapter, num_train_epochs=1))
    weights = load_file(next((tmp_path / "out").glob("*.safetensors")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "More Information Needed" not in card and str(tmp_path) not in card
    assert ("load_trained(" if kind == "HEAD" else "AutoPeftModelForSequenceClassification") in card
    assert [name for name in weights if name.endswith("pooler.dense.weight")]
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)


def test_heads_that_peft_does_not_know_are_trained_and_saved(topics, tmp_path):
    base = save_base(tmp_path / "base", "bart")
    train(recipe(base, topics, tmp_path / "out", num_train_epochs=1))
    heads = [
        name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "classification_head" in name
    ]
    assert len(heads) == 4  # two linear layers
    recorded = json.loads((tmp_path / "out" / "results.json").read_text())["validation"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate_adapter(tmp_path / "out") == pytest.approx(recorded, abs=1e-6)


def test_the_callers_recipe_stays_as_it_is(tiny_bert, topics, tmp_path):
    made = recipe(tiny_bert, topics, tmp_path / "out", num_train_epochs=1)
    before = made.to_dict()
    train(made)
    assert made.to_dict() == before


def test_runs_of_one_process_have_each_their_own_precision(tiny_bert, topics, tmp_path):
    losses = []
    for number, precision in enumerate([None, "bf16", None]):
        changes = {"mixed_precision": precision, "num_train_epochs": 1, "adapter": {"prefix_dropout": 0.0}}
        results = train(recipe(tiny_bert, topics, tmp_path / str(number), **changes))
        assert results["mixed_precision"] == (precision or "no")
        losses.append(results["validation"]["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_the_precision_of_an_earlier_accelerator_is_not_taken_over(tiny_bert, topics, tmp_path):
    Accelerator(mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision='no'"):
        train(recipe(tiny_bert, topics, tmp_path / "out"))
