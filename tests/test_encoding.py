"""Text is UTF-8 on every system: nothing is left to the locale, which on Windows is another encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("prefix_adapter", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
OTHERS = ("os", "gzip", "Image", "outputs")
"""What has an `open` or a `write_text` of another kind."""


def without_encoding(source: str) -> list[int]:
    """The lines of calls that read or write text in the locale's encoding."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or "encoding" in {keyword.arg for keyword in call.keywords}:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        owner = getattr(getattr(call.func, "value", None), "id", None)
        inner = [each.value for each in ast.walk(call) if isinstance(each, ast.Constant)]
        binary = any(isinstance(each, str) and len(each) <= 3 and "b" in each for each in inner)
        method = isinstance(call.func, ast.Attribute) and owner not in OTHERS
        text = any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
        if (
            (name == "open" and not binary and owner not in OTHERS)
            or (name in ("read_text", "write_text") and method)
            or (name in ("run", "Popen", "check_output") and text)
        ):
            found.append(call.lineno)
    return found


def test_the_check_finds_what_it_is_for():
    bad = ["open(path)", "path.open('w')", "path.read_text()", "path.write_text(text)", "run(command, text=True)"]
    good = ["open(path, 'rb')", "path.open('wb')", "os.open(path, 0)", "open(path, encoding='utf-8')", "run(command)"]
    assert [bool(without_encoding(line)) for line in bad] == [True] * 5
    assert [bool(without_encoding(line)) for line in good] == [False] * 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_says_its_encoding(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []
