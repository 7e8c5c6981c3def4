"""A whole run and its output folder."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import save_base
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, Recipe, evaluate_adapter, train


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


@pytest.mark.parametrize("kind", ["PREFIX_TUNING_V2", "LORA", "HEAD"])
def test_new_weights_are_trained_and_saved(topics, tmp_path, kind):
    """A masked-language BERT has no pooler. A frozen random pooler would differ after loading."""
    base = save_base(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    adapter = {"peft_type": kind} if kind != "PREFIX_TUNING_V2" else {"num_virtual_tokens": 4}
    train(recipe(base, topics, tmp_path / "out", adapter=adapter, num_train_epochs=1))
    weights = load_file(next((tmp_path / "out").glob("*.safetensors")))
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
