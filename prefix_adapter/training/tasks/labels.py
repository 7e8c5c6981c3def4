"""Labels of classification tasks: collecting, ordering and naming them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..data import DataError


def distinct_labels(targets: Iterable[Any], source: str) -> set[Any]:
    """Collect the labels that occur in the rows.

    Args:
        targets: For each row a label or a list of labels.
        source: The name of the rows in error messages.

    Raises:
        DataError: If the labels are neither all strings nor all integers.
    """
    found: set[Any] = set()
    for number, target in enumerate(targets, start=1):
        for label in target if isinstance(target, list) else [target]:
            if type(label) not in (str, int) or any(type(label) is not type(other) for other in found):
                raise DataError(
                    f"{source}, row {number}: the label {label!r} is a {type(label).__name__}; labels must be strings "
                    "in all rows, or integers in all rows."
                )
            found.add(label)
    return found


def sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Sort labels: by size if all are whole numbers (integers or texts such as '12'), else alphabetically."""
    try:
        numbers = {label: int(label) for label in labels}
    except ValueError:
        return sorted(labels)
    are_plain = all(str(number) == str(label) for label, number in numbers.items())
    return sorted(numbers, key=numbers.__getitem__) if are_plain else sorted(labels)


def unknown_label_problem(label: Any, labels: list[str | int]) -> str:
    """The error text for a label that is not one of `labels`."""
    return f"the label {label!r} is not among the labels of the training rows (or of the recipe's `labels`), {labels}."


def label_config(labels: list[str | int] | None) -> dict[str, Any]:
    """The labels as the configuration of a model stores them: `id2label` and `label2id`."""
    assert labels is not None
    names = [str(label) for label in labels]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
