"""Lets mkdocstrings read the docstrings of this package: Google style with types as Hugging Face writes them."""

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(\s+\**\w+) \((`.*)\):", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:", re.MULTILINE)


def _plain_type(written: str) -> str:
    """Turn a type such as "`int` or `list[int]`, *optional*" into a Python type. The signature has the default."""
    kind = written.partition(", defaults to")[0]
    types = re.findall("`([^`]+)`", kind)
    return " | ".join([*types, "None"] if "*optional*" in kind else types)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites a docstring before griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write types as Python does, and "Example:" as griffe expects it. Otherwise it reads a box of plain text."""
        if obj.docstring:
            text = _ARGUMENT.sub(lambda found: f"{found[1]} ({_plain_type(found[2])}):", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)
