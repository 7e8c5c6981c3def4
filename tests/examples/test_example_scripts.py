"""Examples that run in the process of the tests, because a new process takes longer than their few steps."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, ModernBertConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    verbosity = transformers.logging.get_verbosity()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        found = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return found, capsys.readouterr().out

    yield run
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore")
def test_image_classification(example, tmp_path):
    found, shown = example("image_classification.py", "--output", tmp_path, "--steps", 4)
    assert "the saved adapter gives the same answers: True" in shown
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # The head, and eight keys and eight values in each of three layers.
    head = "base_model.model.classifier"
    assert {key: list(value.shape) for key, value in saved.items()} == {
        "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight": [8, 3 * 2 * 64],
        f"{head}.weight": [5, 64],
        f"{head}.bias": [5],
    }
    images, colours = found["draw"](3, 8, seed=1)
    halves = images.unflatten(2, (2, 4)).mean((3, 4))
    assert (halves - found["torch"].tensor(list(found["COLOURS"].values()))[colours].mT).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore")
def test_vision_language(example, tmp_path):
    found, shown = example("vision_language.py", "--output", tmp_path, "--steps", 4)
    assert "the saved adapter gives the same answers: True" in shown
    (table,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert table.shape == (8, 2 * 2 * 64)
    inputs, answers = found["make_batch"](3, seed=1, upper_first=True)
    _, turned = found["make_batch"](3, seed=1, upper_first=False)
    assert answers[:, :2].tolist() == turned[:, [1, 0]].tolist()
    # The image is in the middle of the text.
    assert inputs["input_ids"][0].tolist() == [1, 4, 3, 3, 3, 3, 5]


@pytest.mark.filterwarnings("ignore")
def test_ner_with_modernbert(example, shared, minilm, tmp_path, monkeypatch):
    pytest.importorskip("seqeval", reason="needs the `train` extra")
    monkeypatch.setattr("prefix_adapter.training.reports.draw_curve", lambda *args: None)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    data = shared / "data" / "wnut17-ner"
    _, shown = example(
        *("ner.py", "--train", data / "train.jsonl.gz", "--validation", data / "dev.jsonl.gz"),
        *("--model", tmp_path / "base", "--entry-point", "attention"),
        *("--output", tmp_path / "out", "--max-rows", 48, "--epochs", 1),
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["entry_point"] == "attention"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(key.split(".")[2] for key in saved) == ["classifier"] * 2 + ["head"] * 2 + ["prefix_tuning_v2"]
    assert re.search(r"^Ravi/\S+ flew/\S+ from/\S+ Lima/\S+", shown, re.MULTILINE)
