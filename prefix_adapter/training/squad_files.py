"""Files in SQuAD's own format, which KorQuAD 1.0 has too (Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

_HEAD_BYTES = 2**16


def read_squad(file: BufferedIOBase) -> Iterator[dict[str, Any]] | None:
    """Read the questions of a file `{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}`.

    Args:
        file: The file, opened for reading at its beginning. It is left there if it has another format.

    Returns:
        The questions, each a row with `id`, `title`, `question`, `context` and `answers`; `None` for another format. A
        question without an answer (`is_impossible`) has empty lists in `answers`. A question that has no answers in
        the file, as in a test set, has no `answers`.

    Raises:
        ValueError: While the rows are read, if a part is missing or has another type. The message says where.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if not head.lstrip().startswith(b"{") or b'"paragraphs"' not in head:
        return None
    try:
        content = json.load(file)
    except ValueError:  # JSON lines, or damaged
        content = None
    if not isinstance(content, dict) or "data" not in content:
        file.seek(0)
        return None
    return _rows(content)


def _rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for article, at_article in _parts(content, "data"):
        for paragraph, at_paragraph in _parts(article, "paragraphs", at_article):
            context = _part(paragraph, "context", str, at_paragraph)
            for question, place in _parts(paragraph, "qas", at_paragraph):
                row = {"id": question.get("id"), "title": article.get("title")}
                row |= {"question": _part(question, "question", str, place), "context": context}
                if question.get("is_impossible"):
                    row["answers"] = {"text": [], "answer_start": []}
                elif "answers" in question:
                    answers = list(_parts(question, "answers", place))
                    row["answers"] = {
                        name: [_part(answer, name, kind, at_answer) for answer, at_answer in answers]
                        for name, kind in (("text", str), ("answer_start", int))
                    }
                yield row


def _parts(mapping: dict[str, Any], name: str, place: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """The mappings in a list, each with its place in the file."""
    place = f"{place}.{name}" if place else name
    for number, part in enumerate(_part(mapping, name, list, place.rpartition(".")[0])):
        if not isinstance(part, dict):
            raise ValueError(f"{place}[{number}] must be a mapping, got {part!r:.80}")
        yield part, f"{place}[{number}]"


def _part(mapping: dict[str, Any], name: str, kind: type, place: str) -> Any:
    if not isinstance(mapping.get(name), kind):
        words = {str: "a text", int: "a whole number", list: "a list"}[kind]
        found = f"it is {mapping[name]!r:.80}" if name in mapping else "it is missing"
        raise ValueError(f"{name!r} of {place or 'the file'} must be {words}; {found}")
    return mapping[name]
