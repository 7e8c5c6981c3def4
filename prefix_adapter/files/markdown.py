"""Markdown from untrusted texts: names with markup, backticks or control characters break no card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..messages import shorten


def code(text: Any, length: int = 200) -> str:
    """An untrusted text, or the `repr` of an untrusted value, as inline code of at most about `length` characters."""
    text = shorten(text, length) or " "
    # More backticks than in any run of the text, and a space where the text begins or ends with one.
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. Its cells are Markdown; the pipes in them are escaped, also those in inline code."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def hub_name(name: Any) -> str | None:
    """The name of a model or data set on the Hub; `None` for a path, or for anything that cannot be such a name."""
    if not isinstance(name, str) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def link(name: Any, kind: str = "") -> str:
    """A link to a model on the Hub, or the last part of a path as inline code.

    Args:
        name: The name or path.
        kind: `"datasets/"` for a data set.
    """
    known = hub_name(name)
    return f"[{code(known)}](https://huggingface.co/{kind}{known})" if known else code(file_name(name))


def file_name(path: Any) -> str:
    """The last part of a path of any system. Cards do not show the folders of the machine that wrote them."""
    return re.split(r"[\\/]", os.fspath(path).rstrip("\\/"))[-1]


def without_paths(value: Any) -> Any:
    """A value in which paths, also those in lists and dictionaries, are replaced by their last parts."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [without_paths(each) for each in (sorted(value, key=str) if isinstance(value, set) else value)]
    if isinstance(value, os.PathLike):
        return file_name(value)
    if isinstance(value, str) and ("/" in value or "\\" in value):
        absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive or value.startswith("~")
        return file_name(value) if absolute or os.path.exists(value) else value
    return value
