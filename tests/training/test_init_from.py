"""Runs whose prefix starts from a text, or from another adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import save_base, topic_rows, write_rows
from safetensors.torch import load_file
from test_loop import Crash, before_step, crash, what_counts
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from prefix_adapter import PeftModel, PrefixTuningV2Config
from prefix_adapter.training import Data, Recipe, RecipeError, load_recipe, train

TEXT = "w3 w60 w17 w5"
WEIGHTS = "adapter_model.safetensors"
FROZEN = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_frozen.weight"
ROWS = [{"text": "w1 w2 w3 w4"}, {"text": "w70 w8"}, {"prompt": "w9 w10", "text": "w11 w12 w13"}]
MLP = {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """A Llama whose tokenizer puts a token before every text, and a GPT-2."""
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: save_base(folder / kind, kind, "AutoModelForCausalLM") for kind in ("llama", "gpt2")}
    tokenizer = AutoTokenizer.from_pretrained(found["llama"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer.save_pretrained(found["llama"])
    return found


@pytest.fixture
def writing(tmp_path, bases):
    """A function that makes recipes of short causal-lm runs, with all rows in one batch and no dropout."""
    rows = [{"prompt": None, **row} for row in ROWS]
    data = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")}

    def make(name, kind="llama", adapter=None, **changes):
        settings = {"max_steps": 1, "batch_size": len(ROWS), "logging_steps": 1, "max_length": 24, **changes}
        adapter = {"prefix_dropout": 0.0, **(adapter or {})}
        return Recipe(
            task="causal-lm",
            model=bases[kind],
            output_dir=str(tmp_path / name),
            data=Data(**data),
            adapter=adapter,
            **settings,
        )

    return make


def first_loss(folder) -> float:
    line = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[0])
    assert (line["step"], line["split"]) == (1, "train")
    return line["loss"]


@torch.no_grad()
def loss_of(model, kind: str, front: str | None) -> float:
    """The mean loss of the tokens that count, row by row, with a text in front of each; w0 has the id 6."""
    start = [2] if kind == "llama" else []
    ids = {name: [int(word[1:]) + 6 for word in (name or "").split()] for name in (front, *_texts())}
    total, count = 0.0, 0
    for row in ROWS:
        before = [*(start + ids[front] if front else []), *start, *ids[row.get("prompt", "")]]
        text = [*ids[row["text"]], 5]
        if "prompt" not in row and not start:
            before, text = [*before, text[0]], text[1:]  # nothing stands before it to tell it from
        logits = model(input_ids=torch.tensor([before + text])).logits[0, len(before) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(text), reduction="sum").item()
        count += len(text)
    return total / count


def _texts():
    return ["", *(row["text"] for row in ROWS), *(row["prompt"] for row in ROWS if "prompt" in row)]


# ---- From a text


@pytest.mark.parametrize(
    ("kind", "adapter", "count"), [("llama", {}, 5), ("gpt2", {"shift_positions": True}, 4), ("gpt2", {}, 4)]
)
def test_the_first_step_is_as_with_the_text_in_front(writing, bases, tmp_path, kind, adapter, count):
    train(writing("out", kind, adapter, init_text=TEXT))
    base = AutoModelForCausalLM.from_pretrained(bases[kind]).eval()
    expected = loss_of(base, kind, TEXT)
    assert first_loss(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
    assert abs(loss_of(base, kind, None) - expected) > 0.01
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == count
    assert load_recipe(tmp_path / "out" / "recipe.yaml").init_text == TEXT


def test_a_longer_text_gives_its_first_tokens(writing, bases, tmp_path):
    adapter = {"num_virtual_tokens": 4, "num_frozen_tokens": 1, "shift_positions": True}
    train(writing("out", "gpt2", adapter, init_text=f"{TEXT} {TEXT}"))
    base = AutoModelForCausalLM.from_pretrained(bases["gpt2"]).eval()
    assert first_loss(tmp_path / "out") == pytest.approx(loss_of(base, "gpt2", TEXT), abs=1e-5)
    # The frozen token is the first one of the text, in the checkpoints too.
    ids = [int(word[1:]) + 6 for word in TEXT.split()][:1]
    cache = DynamicCache()
    with torch.no_grad():
        base(input_ids=torch.tensor([ids]), past_key_values=cache)
    expected = torch.cat([part[0].flatten() for layer in cache.layers for part in (layer.keys, layer.values)])
    files = [tmp_path / "out" / WEIGHTS, *(tmp_path / "out" / "checkpoints").rglob(WEIGHTS)]
    assert len(files) > 1
    for file in files:
        torch.testing.assert_close(load_file(file)[FROZEN][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("llama", {"adapter": {"num_virtual_tokens": 6}}, "`adapter.num_virtual_tokens`: `init_text` has 5 tokens"),
        ("gpt2", {"adapter": {"shift_positions": False}}, "`init_text`: .*shift_positions=True"),
        ("llama", {"adapter": {"layers_to_transform": [0]}}, "`init_text`: .*layers_to_transform"),
    ],
)
def test_a_text_that_a_run_cannot_start_from(writing, tmp_path, kind, changes, why):
    with pytest.raises(RecipeError, match=why):
        train(writing("out", kind, **changes, init_text=TEXT))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init_text": TEXT, "init_from": "x"}, "`init_from` and `init_text`"),
        ({"init_text": TEXT, "task": "seq2seq-lm"}, "`init_text` is for causal-lm"),
        ({"init_text": TEXT, "adapter": {"prefix_projection": True}}, "`adapter.prefix_projection`"),
        ({"init_text": TEXT, "adapter": {"entry_point": "attention"}}, "`adapter.entry_point`: .*the cache only"),
        ({"init_text": " "}, "`init_text` is empty"),
        ({"init_from": ""}, "`init_from` is empty"),
        ({"init_from": "x", "adapter": {"peft_type": "LORA"}}, "`init_from` is for PREFIX_TUNING_V2, not for LORA"),
        ({"init_text": TEXT, "adapter": {"peft_type": "full"}}, "`init_text` is for PREFIX_TUNING_V2, not for FULL"),
    ],
)
def test_invalid_initial_prefixes(changes, why):
    with pytest.raises(RecipeError, match=why):
        Recipe(**{"task": "causal-lm", "model": "m", "output_dir": "o", **changes})


# ---- From another adapter


@pytest.mark.parametrize("source", ["table", "mlp", "folded"])
def test_a_run_starts_where_another_one_ended(writing, bases, tmp_path, source):
    mlp = source != "table"
    rate = 1e-2 if mlp else 0.5
    first = train(writing("first", adapter=MLP if mlp else {"num_virtual_tokens": 4}, learning_rate=rate, max_steps=3))
    best = tmp_path / "first" / "checkpoints" / f"step-{first['best_step']:06d}"
    folder = best if source == "mlp" else tmp_path / "first"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder).eval()
    expected = loss_of(model, "llama", None)
    assert abs(loss_of(AutoModelForCausalLM.from_pretrained(bases["llama"]), "llama", None) - expected) > 0.01
    adapter = MLP if source == "mlp" else {"num_virtual_tokens": 4}
    train(writing("second", adapter=adapter, init_from=str(folder)))
    assert first_loss(tmp_path / "second") == pytest.approx(expected, abs=1e-5)
    assert yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())["init_from"] == str(folder)


def make_topics(base, folder, labels="ab", **changes) -> Recipe:
    """A recipe for a classifier; dropout is on."""
    rows = [{**row, "label": labels["ab".index(row["label"])]} for row in topic_rows(24)]
    data = {name: write_rows(folder / f"{labels}-{name}.jsonl", rows) for name in ("train", "validation")}
    settings = {"batch_size": 8, "eval_steps": 2, "max_steps": 5, "max_length": 16, **changes}
    return Recipe(
        task="sequence-classification",
        model=base,
        data=Data(**data),
        adapter={"num_virtual_tokens": 4},
        **settings,
    )


def test_the_head_starts_anew_and_resuming_is_exact(tiny_bert, tmp_path, monkeypatch):
    """The other adapter is read when a run starts. It may be gone when the run is resumed."""
    source = tmp_path / "source"
    train(make_topics(tiny_bert, tmp_path, output_dir=str(source)))

    def make(name):
        return make_topics(tiny_bert, tmp_path, "xy", output_dir=str(tmp_path / name), init_from=str(source))

    train(make("whole"))
    with monkeypatch.context() as patch:
        before_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(make("stopped"))
    shutil.move(source, tmp_path / "moved")
    train(make("stopped"), resume=True)
    assert what_counts(tmp_path / "stopped") == what_counts(tmp_path / "whole")
    with pytest.raises(RecipeError, match="`init_from`: "):
        train(make("new"))

    shutil.move(tmp_path / "moved", source)
    still = make("still").with_values({"learning_rate": 1e-30, "head_learning_rate": 1e-30, "max_steps": 1})
    train(still)
    models = []
    for name in ("source", "still"):
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        models.append(PeftModel.from_pretrained(base, tmp_path / name).eval())
    parameters, others = (dict(model.named_parameters()) for model in models)
    own = [name for name in parameters if "prefix_tuning_v2" in name]
    heads = [name for name in parameters if "modules_to_save" in name and name.endswith("weight")]
    assert own and all(torch.allclose(parameters[name], others[name], atol=1e-6) for name in own)
    assert heads and not any(torch.allclose(parameters[name], others[name], atol=1e-3) for name in heads)


def test_an_adapter_that_a_run_cannot_start_from(writing, tmp_path):
    train(writing("first", adapter={"num_virtual_tokens": 4}))
    with pytest.raises(RecipeError, match=r"`init_from`: .*num_virtual_tokens=4"):
        train(writing("second", init_from=str(tmp_path / "first")))
    with pytest.raises(RecipeError, match=r"`init_from`: .*is a table"):
        train(writing("second", adapter=MLP, init_from=str(tmp_path / "first")))
    assert not (tmp_path / "second").exists()


# ---- From training rows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_step_is_as_with_the_last_tokens_of_rows_in_front(writing, bases, tmp_path, kind):
    """Also where that needs shifted positions, which the run then sets: in a table of positions."""
    made = writing("out", kind, adapter={"num_virtual_tokens": 8})
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": "w1 w2 w3 w4"}] * 3)
    train(made)
    row = [*([2] if kind == "llama" else []), 7, 8, 9, 10, 5]  # [CLS] w1 w2 w3 w4 [SEP]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(bases[kind]).eval()
        logits = base(input_ids=torch.tensor([[*[*row, *row][-8:], *row]])).logits[0, 8:-1]
    assert first_loss(tmp_path / "out") == pytest.approx(
        F.cross_entropy(logits, torch.tensor(row[1:])).item(), abs=1e-5
    )
    assert PrefixTuningV2Config.from_pretrained(tmp_path / "out").shift_positions == (kind == "gpt2")


def test_positions_are_not_shifted_out_of_the_table(writing, bases, tmp_path, capsys):
    """The prefix then starts from random numbers: a whole input must have a position."""
    size = AutoModelForCausalLM.from_pretrained(bases["gpt2"]).config.n_positions
    for name, length in (("fits", size - 8), ("too-long", size - 7)):
        train(writing(name, "gpt2", adapter={"num_virtual_tokens": 8}, max_length=length))
        fits = name == "fits"
        assert PrefixTuningV2Config.from_pretrained(tmp_path / name).shift_positions == fits
        assert ("starts from random numbers" in capsys.readouterr().err) != fits


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"init_rows": False}, False),
        ("llama", {"adapter": MLP}, False),
        ("llama", {"adapter": {"layers_to_transform": [0]}}, False),
        ("gpt2", {"adapter": {"num_virtual_tokens": 4, "shift_positions": False}}, True),
    ],
)
def test_a_prefix_that_starts_from_random_numbers(writing, tmp_path, kind, changes, says, capsys):
    """The rate is 0, so that the table that is saved is the one at the start."""
    train(writing("out", kind, **changes, learning_rate=1e-30))
    assert ("starts from random numbers" in capsys.readouterr().err) == says
    table = (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(writing("unused", kind).model), tmp_path / "out"
        )
        .base_model.prefix_layer.encoder_of("default")
        .embedding.weight
    )
    assert table.std().item() < 0.05


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        (
            "gpt2",
            {"adapter": {"num_virtual_tokens": 4, "shift_positions": False}},
            "`init_rows`: .*shift_positions=True",
        ),
        ("llama", {"adapter": MLP}, "`init_rows`: .*MLP"),
        ("llama", {"init_text": TEXT}, "`init_text` and `init_rows` are both set"),
        ("llama", {"adapter": {"peft_type": "LORA"}}, "`init_rows` is for PREFIX_TUNING_V2, not for LORA"),
    ],
)
def test_rows_that_a_run_cannot_start_from(writing, tmp_path, kind, changes, why):
    with pytest.raises(RecipeError, match=why):
        train(writing("out", kind, **{"init_rows": True, **changes}))
    assert not (tmp_path / "out").exists()
