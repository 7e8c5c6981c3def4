"""The README's examples run as they stand, on models that are at hand."""

import re

from pages import ROOT, blocks, run

README = ROOT / "README.md"
BLOCKS = blocks("README.md")


def test_bert_classifier(minilm, capsys):
    model = run(BLOCKS[0], {"bert-base-multilingual-cased": minilm})["model"]
    assert "trainable params: 93,315" in capsys.readouterr().out  # 20 x 6 x 2 x 384, and a head of 3 x 385
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[-3] for name in trained} == {"prefix_tuning_v2_embedding", "modules_to_save"}


def test_causal_language_model(shared, capsys):
    model = run(BLOCKS[1], {"Qwen/Qwen3-0.6B": str(shared / "models" / "stories260k")})["model"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "Once upon a time" in capsys.readouterr().out


def test_every_test_that_it_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README.read_text(encoding="utf-8"))
    assert len(named) > 8
    for file, function in named:
        path = README.parent / file
        assert path.is_file() and f"def {function}" in path.read_text(encoding="utf-8"), (file, function)


def test_every_example_that_it_names_exists():
    named = set(re.findall(r"examples/[\w/]+\.py", README.read_text(encoding="utf-8")))
    assert named and not [path for path in named if not (README.parent / path).is_file()]
