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
from prefix_adapter.cli import COMMANDS, _parser
from prefix_adapter.training import Recipe
from prefix_adapter.training.settings import TASK_SETTINGS
from prefix_adapter.training.tasks import TASK_CLASSES

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


@pytest.mark.parametrize("name", TASK_CLASSES)
def test_the_rows_of_each_task_are_in_the_guide(name):
    task, page = TASK_CLASSES[name], (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
    columns = getattr(task, "columns", ())  # a template has those of the data
    assert row and {*columns, task.target} <= set(re.findall(r"`(\w+)`", row[0]))


def section_of(command: str) -> str:
    """What the page of the commands says about a command, from the command's own help.

    Keys of a recipe, a search or a study have pages of their own, and two options are in every command.
    """
    left_out = {"help", "debug", "search", "study"}
    if COMMANDS[command].has_recipe:
        left_out |= {field.name for field in dataclasses.fields(Recipe)}
    rows = []
    for argument in sorted(_parser(command)._actions, key=lambda each: bool(each.option_strings)):
        if argument.dest.partition(".")[0] in left_out:
            continue
        name = argument.option_strings[0] if argument.option_strings else argument.dest
        value = argument.metavar or (
            f"{{{','.join(argument.choices)}}}" if argument.choices else argument.dest.upper()
        )
        if argument.option_strings and argument.nargs != 0 and argument.nargs != "...":
            name = f"{name} {value}"
        text = " ".join((argument.help % {"default": argument.default}).split())
        rows.append(f"| `{name}` | {text} |")
    summary = COMMANDS[command].help.splitlines()[0]
    return "\n".join([f"## {command}", "", summary, "", "| argument | meaning |", "|---|---|", *rows])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_each_argument_of_a_command(command):
    section = re.search(rf"^## {command}$.*?(?=\n+## |\n*\Z)", text_of("commands.md"), re.MULTILINE | re.DOTALL)
    assert section and section[0] == section_of(command)


def test_pages_name_no_option_that_does_not_exist():
    """In the blocks that call the command."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [each for page in pages for each in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    calls = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    found = re.findall(r"^(?:.* -m prefix_adapter|prefix-adapter) ([a-z][\w-]*)(.*)$", calls, re.MULTILINE)
    assert len(found) > 40
    known = {
        command: {name for argument in _parser(command)._actions for name in argument.option_strings}
        for command in COMMANDS
    }
    for command, words in found:
        options = re.findall(r"(?<!\S)--[\w.]+", words.partition(" -m ")[0])
        assert not [name for name in options if name not in known[command] and not name.startswith("--adapter.")], (
            words
        )


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
