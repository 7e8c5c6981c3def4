"""The guides: their commands and rows are those of the project, and their code runs as it stands on tiny models."""

import json
import re
import shlex

import pytest
import tiny
import torch
import transformers as tr
from pages import ROOT, blocks, run

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.cli import COMMANDS, _parser

PAGE = "docs/guides.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMAND_LINES = [line for line in LINES if re.search(r"prefix[-_]adapter (?:train|predict)", line)]
WORDS = ["where", "is", "my", "card", "a", "lovely", "film"]


def recipe_of(line):
    """The recipe of a line that trains."""
    from prefix_adapter.training.recipe import recipe_from

    words = shlex.split(line)
    at = next(index for index, word in enumerate(words) if word in ("prefix-adapter", "prefix_adapter"))
    assert words[at + 1] in COMMANDS
    options = _parser(words[at + 1]).parse_args(words[at + 2 :])
    return recipe_from(options) if words[at + 1] == "train" else None


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    recipe = "task: sequence-classification\nmodel: m\noutput_dir: o\ndata: {train: t.jsonl}\n"
    (tmp_path / "my-recipe.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command(line):
    pytest.importorskip("jsonargparse", reason="needs the `train` extra")
    assert recipe_of(line) or "predict" in line


def test_a_row_is_a_row_of_the_task_that_follows():
    pytest.importorskip("jsonargparse", reason="needs the `train` extra")
    from prefix_adapter.training.tasks import TASK_CLASSES

    found = re.findall(r"```json\n(.*?)\n```\n\n```bash\n(.*?)\n", TEXT)
    assert len(found) == 5
    for row, line in found:
        task = TASK_CLASSES[recipe_of(line).task]
        needed, known = {*task.columns, task.target}, {*task.columns, task.target, *task.optional_columns}
        assert needed <= set(json.loads(row)) <= known


def test_images(tmp_path, capsys):
    config = tr.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    tr.ViTModel(config).save_pretrained(tmp_path / "vit")
    model = run(blocks(PAGE)[0], {"google/vit-base-patch16-224-in21k": str(tmp_path / "vit")})["model"]
    assert "trainable params: 725" in capsys.readouterr().out  # 10 x 2 x 2 x 16, and a head of 5 x 17
    model(pixel_values=torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 4])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_many_adapters(tmp_path):
    place = tiny.save(tmp_path / "bert", "bert", WORDS, num_labels=2, vocab_size=len(WORDS) + 6)
    expected = []
    for seed, name in enumerate(("topics", "reviews")):
        base = tr.AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)
        model = get_peft_model(base, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=3 + seed)).eval()
        tiny.randomize(model, seed=seed)
        model.save_pretrained(f"runs/{name}")
        text = ("where is my card", "a lovely film")[seed]
        with torch.no_grad():
            expected.append(model(**tr.AutoTokenizer.from_pretrained(place)(text, return_tensors="pt")).logits[0])
    with torch.no_grad():
        logits = run(blocks(PAGE)[1], {"bert-base-cased": place})["logits"]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
