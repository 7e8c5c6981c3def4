"""Base models in 4 bits (`load_in_4bit`)."""

import re

import pytest
import torch
from conftest import save_base, topic_rows, write_rows
from torch import nn
from transformers import AutoModelForCausalLM

from prefix_adapter.training import Data, Recipe, RecipeError, evaluate_adapter, load_recipe, load_trained, train
from prefix_adapter.training import model as model_file
from prefix_adapter.training.adapter_recipe import load_adapter_recipe
from prefix_adapter.training.model import load_base, load_tokenizer, wrap
from prefix_adapter.training.tasks import TASK_CLASSES


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    # bitsandbytes quantizes blocks of 64 numbers.
    return save_base(tmp_path_factory.mktemp("base") / "bert", "bert", hidden_size=64, intermediate_size=128)


def make_recipe(base, output="unused", data=None, **changes) -> Recipe:
    settings = {
        "adapter": {"num_virtual_tokens": 2},
        "max_length": 16,
        "batch_size": 8,
        "load_in_4bit": True,
        **changes,
    }
    return Recipe("sequence-classification", base, str(output), data or Data(), labels=["a", "b"], **settings)


def load(recipe) -> tuple:
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    return task, *load_base(recipe, task)


def test_what_is_quantized(base):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    _, model, _ = load(make_recipe(base))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, bitsandbytes.nn.Linear4bit) == ("encoder.layer." in name), name


def test_gradients_pass_after_an_evaluation(base):
    """On CPUs with AVX512 for bfloat16, bitsandbytes would pack the weights in the evaluation, for good."""
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(base)
    task, model, new = load(recipe)
    model = wrap(recipe, task, model, new)
    features = task.features({"text": ["w1 w2"], "label": ["a"]}, [0], True)
    batch = task.collate([{name: values[0] for name, values in features.items()}])
    with torch.no_grad():
        task.loss(model.eval(), batch)
    task.loss(model.train(), batch)[0].backward()
    (table,) = [each for name, each in model.named_parameters() if "prefix_tuning_v2_embedding" in name]
    assert (table.grad != 0).any(1).all()


def test_a_decoder_starts_from_rows_and_all_its_parameters_are_counted(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128}
    base = save_base(tmp_path / "llama", "llama", "AutoModelForCausalLM", **shape)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2 w3 w4"}] * 4)
    settings = {"adapter": {"num_virtual_tokens": 4}, "init_rows": True, "load_in_4bit": True, "batch_size": 2}
    train(Recipe("causal-lm", base, str(tmp_path / "out"), Data(train=rows), max_steps=1, max_length=8, **settings))
    expected = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    trained, total = re.search(r"trained: ([\d,]+) of ([\d,]+) parameters", capsys.readouterr().err).groups()
    assert int(total.replace(",", "")) == expected + int(trained.replace(",", ""))


def test_a_run(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    rows = write_rows(tmp_path / "rows.jsonl", topic_rows(16))
    recipe = make_recipe(base, tmp_path / "out", Data(train=rows, validation=rows), max_steps=2)
    results = train(recipe)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").load_in_4bit
    assert load_adapter_recipe(tmp_path / "out" / "recipe.yaml").load_in_4bit
    assert evaluate_adapter(tmp_path / "out", rows) == pytest.approx(results["validation"])
    _, _, model = load_trained(tmp_path / "out")
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert "base model in 4 bits" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_package_is_an_error_before_the_rows_are_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="`load_in_4bit` needs the package bitsandbytes: pip install"):
        train(make_recipe(base, tmp_path / "out", Data(train="missing.jsonl")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"peft_type": "FULL"}}, "4 bits cannot be trained"),
        ({"model_kwargs": {"quantization_config": {}}}, "are both set"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(RecipeError, match=f"`load_in_4bit`.*{message}"):
        make_recipe("base", **changes)
