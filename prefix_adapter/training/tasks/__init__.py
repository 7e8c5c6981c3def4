"""The tasks, one file each."""

from .sequence_classification import SequenceClassification
from .task import Task
from .token_classification import TokenClassification

TASK_CLASSES: dict[str, type[Task]] = {
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
}

__all__ = ["TASK_CLASSES", "Task"]
