"""The quick tour runs from its first block to its last, on tiny random models whose vocabulary is its own words."""

import re

import pytest
import tiny
import torch
from pages import ROOT, blocks, run
from safetensors.torch import load_file


def test_the_quick_tour_runs(tmp_path, monkeypatch, capsys):
    page = "docs/quick-tour.md"
    words = sorted(set(re.findall(r"[^\s\"',()\[\]]+", (ROOT / page).read_text(encoding="utf-8"))))
    sizes = {"vocab_size": len(words) + 6, "max_position_embeddings": 64}
    places = {
        "bert-base-cased": tiny.save(tmp_path / "bert", "bert", words, num_labels=2, **sizes),
        "Qwen/Qwen3-0.6B": tiny.save(tmp_path / "llama", "llama", words, "AutoModelForCausalLM", **sizes),
    }
    monkeypatch.chdir(tmp_path)
    defined = run("\n".join(blocks(page)), places)
    shown = capsys.readouterr().out
    good, length, pairs = (float(loss) for loss in re.findall(r"^loss: (\S+)$", shown, re.MULTILINE))
    assert good < 0.5 and length < 0.5  # 0.69 and 0.56 with the same answer to every row
    with defined["writer"].disable_adapter():
        assert pairs < defined["writer"](**defined["batch"], labels=defined["labels"]).loss - 0.1
    assert "the same: True" in shown and "fast -> " in shown
    saved = load_file("good-or-bad/adapter_model.safetensors")
    assert sorted(tuple(each.shape) for each in saved.values()) == [(2,), (2, 32), (20, 3 * 2 * 32)]
    mixed = torch.tensor(eval(re.search(r"^tensor\((.*?)\)$", shown, re.DOTALL | re.MULTILINE)[1]))
    rows, model = defined["rows"], defined["loaded"]
    for row, name in zip(mixed[:2], ("default", "length"), strict=True):
        model.set_adapter(name)
        assert row.tolist() == pytest.approx(model(**rows).logits[0].softmax(-1).tolist(), abs=2e-4)
    with model.disable_adapter():
        assert mixed[2].tolist() == pytest.approx(model(**rows).logits[2].softmax(-1).tolist(), abs=2e-4)
