"""The examples with images, on a few steps."""

import pytest
from programs import example
from safetensors.torch import load_file
from transformers.utils import logging

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def _logging():
    """The example silences transformers."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.mark.usefixtures("_logging")
def test_image_classification(tmp_path):
    shown = example("image_classification.py", "--output", tmp_path, "--steps", 4)
    assert "the saved adapter gives the same answers: True" in shown
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # The head, and eight keys and eight values in each of three layers.
    assert {key.removeprefix("base_model.model."): list(value.shape) for key, value in saved.items()} == {
        "prefix_tuning_v2.prefix_tuning_v2_embedding.weight": [8, 3 * 2 * 64],
        "classifier.weight": [5, 64],
        "classifier.bias": [5],
    }


def test_vision_language(tmp_path):
    shown = example("vision_language.py", "--output", tmp_path, "--steps", 4)
    assert "the saved adapter gives the same answers: True" in shown
    (table,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    # The language model has two layers, and the vision tower no prefix.
    assert table.shape == (8, 2 * 2 * 64)
