"""A whole run, and what it leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, Recipe, train


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


def test_what_a_run_leaves(tiny_bert, topics, tmp_path):
    adapter = {"num_virtual_tokens": 4, "prefix_projection": True}
    results = train(recipe(tiny_bert, topics, tmp_path / "out", adapter=adapter))
    out = tmp_path / "out"
    assert results["validation"]["accuracy"] == 1.0
    assert json.loads((out / "results.json").read_text())["validation"] == results["validation"]
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
