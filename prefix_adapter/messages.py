"""Somebody else's texts and values in error messages: short, and safe for a terminal."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

# Limits for the text of a value that is deeply nested or huge.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, 300, 300, 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 40


def shorten(text: Any, length: int = 200) -> str:
    """A text or a value of somebody else's, for a message: short, and without control characters."""
    text = text if isinstance(text, str) else _REPR.repr(text)
    return escape(text if len(text) <= length else f"{text[:length]}...")


def escape(text: str) -> str:
    """A text of somebody else's for a terminal, which takes some characters for commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def join_names(names: Iterable[str]) -> str:
    """The first four names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(shorten(name) for name in ordered[:4]) + more
