"""The names of labels in a model's config: those of the active adapter's task head, or the base model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class LabelNames:
    """The names of the labels in a model's config.

    Pipelines and users read them there (`model.config.id2label`). An adapter brings a head of its own, and its labels
    mean something else than those of the base model's head. Names that somebody else sets later stay.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._config: Any = getattr(model, "config", None)
        self._own: dict[int, str] | None = None
        self._shown: dict[int, str] | None = None
        self._kept = False

    @property
    def own(self) -> list[str]:
        """The names of the base model's labels, in their order; empty if it has none."""
        names = self._own or getattr(self._config, "id2label", None)
        if not isinstance(names, dict) or set(names) != set(range(len(names))):
            return []
        return [str(names[index]) for index in range(len(names))]

    def show(self, names: Sequence[str] | None) -> None:
        """Write names into the config, or the base model's own again if they are `None`.

        Nothing is written if the number of the names is not that of the model's labels.
        """
        now = getattr(self._config, "id2label", None)
        if self._kept or (self._shown is not None and now != self._shown):
            return
        if names is not None and isinstance(now, dict) and len(names) == len(now):
            self._own = self._own or now
            self._write(dict(enumerate(names)))
            self._shown = self._config.id2label
        elif self._own is not None:
            self._write(self._own)
            self._own = self._shown = None

    def keep_own(self) -> None:
        """Keep the base model's own names from now on: where each row has another adapter, no names fit all rows."""
        self.show(None)
        self._kept = True

    def _write(self, names: dict[int, str]) -> None:
        self._config.id2label = names
        self._config.label2id = {name: index for index, name in names.items()}
