"""The documentation site: complete, and built without a warning."""

import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import pytest

import prefix_adapter
import prefix_adapter.templates
import prefix_adapter.training
from prefix_adapter import PeftConfig, PrefixTuningV2Config, PTuningConfig
from prefix_adapter.training import Recipe
from prefix_adapter.training.settings import TASK_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
PAGES = ("adapter.md", "training.md", "recipe.md", "templates.md")


def text_of(page: str) -> str:
    return (REFERENCE / page).read_text(encoding="utf-8")


def objects_of(*pages: str) -> set[str]:
    """The objects whose docstrings a page shows."""
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", text_of(page), re.MULTILINE)}


def test_the_reference_has_every_public_name():
    page = text_of("adapter.md")
    own = {name.removeprefix("prefix_adapter.") for name in objects_of("adapter.md")}
    of_peft = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert not own & of_peft
    assert own | of_peft | {"__version__"} == set(prefix_adapter.__all__) and "`__version__`" in page
    assert {getattr(prefix_adapter, name).__module__.partition(".")[0] for name in of_peft} == {"peft"}
    training = {name for name in objects_of("training.md", "recipe.md") if "settings" not in name}
    assert training == {f"prefix_adapter.training.{name}" for name in prefix_adapter.training.__all__}
    names = {f"prefix_adapter.templates.{name}" for name in prefix_adapter.templates.__all__}
    assert objects_of("templates.md") == names


def is_called(name: str) -> bool:
    """Whether a user calls it: an error or an enum is made by others."""
    shown = pkgutil.resolve_name(name)
    return not (isinstance(shown, type) and issubclass(shown, (Exception, Enum)))


@pytest.mark.parametrize("name", sorted(filter(is_called, objects_of(*PAGES))))
def test_a_docstring_has_every_argument(name):
    """mkdocstrings shows the part `Args` of a docstring: each argument, field or key of a recipe stands there."""
    shown = pkgutil.resolve_name(name)
    part = re.search(r"^(?:Args|Attributes):\n(.*?)(?:\n\n|\Z)", inspect.getdoc(shown), re.DOTALL | re.MULTILINE)
    documented = re.findall(r"^    \**(\w+)(?: \(.*\))?:", part[1], re.MULTILINE) if part else []
    configs = (PrefixTuningV2Config, PTuningConfig)
    of_peft = {field.name for field in dataclasses.fields(PeftConfig)} if shown in configs else set()
    assert documented == [each for each in inspect.signature(shown).parameters if each not in of_peft]


@pytest.mark.parametrize(("page", "config"), [("method.md", PrefixTuningV2Config), ("ptuning.md", PTuningConfig)])
def test_the_guide_has_every_setting_of_an_adapter(page, config):
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n## Settings\n")[2].partition("\n\n**")[0]
    own = [field.name for field in dataclasses.fields(config)]
    of_peft = {field.name for field in dataclasses.fields(PeftConfig)}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {each for each in own if each not in of_peft}


def test_the_reference_has_the_settings_of_each_task():
    rows = [
        f"| `{task}` | `{name}` | {'none' if default is None else f'`{default}`'} | {text} |"
        for task, settings in TASK_SETTINGS.items()
        for name, (default, text) in settings.items()
    ]
    assert re.findall(r"^\| `.*", text_of("recipe.md"), re.MULTILINE) == rows


def test_each_row_of_works_with_has_its_test():
    page = (ROOT / "docs" / "works-with.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!library|---)(.*) \|$", page.partition("\n## ")[0], re.MULTILINE)
    named = [re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row) for row in rows]
    assert len(rows) > 10 and all(named)
    for file, function in (each for row in named for each in row):
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), (file, function)
    own = {f"tests/works_with/{path.name}" for path in (ROOT / "tests" / "works_with").glob("test_*.py")}
    assert own <= {file for row in named for file, _ in row}


def test_the_site_builds_without_a_warning(tmp_path):
    if missing := [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install -e '.[docs]' installs what the site needs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    keys = (site / "reference" / "recipe" / "index.html").read_text(encoding="utf-8")
    assert all(f"<code>{field.name}</code>" in keys for field in dataclasses.fields(Recipe))
    settings = (site / "reference" / "adapter" / "index.html").read_text(encoding="utf-8")
    assert "int</span> | None</code>" in settings and "optional*" not in settings  # docs/docstrings.py
    assert "backbones" in (site / "search" / "search_index.json").read_text(encoding="utf-8")
