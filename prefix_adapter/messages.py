"""Untrusted texts and values in error messages: short, and safe to print in a terminal."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

# Bounds the text of values that are nested deeply or very large.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, 300, 300, 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 40


def shorten(text: Any, length: int = 200) -> str:
    """Cut an untrusted text, or the `repr` of an untrusted value, to `length` and escape its control characters."""
    text = text if isinstance(text, str) else _REPR.repr(text)
    return escape(text if len(text) <= length else f"{text[:length]}...")


def escape(text: str) -> str:
    """Escape the characters of an untrusted text that a terminal would execute as commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def join_names(names: Iterable[str]) -> str:
    """Join the first four names in alphabetical order, and say how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(shorten(name, 100) for name in ordered[:4]) + more


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A sentence, after a space, that suggests the name most like a wrong one; nothing if none is like it."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
