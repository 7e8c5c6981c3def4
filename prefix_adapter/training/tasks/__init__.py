"""The tasks, one file for each: columns, head, loss, predictions and metrics."""

from .causal_lm import CausalLM
from .chat import Chat
from .cloze import Cloze
from .distil import Distil
from .fill_mask import FillMask
from .multiple_choice import MultipleChoice
from .question_answering import QuestionAnswering
from .seq2seq_lm import Seq2SeqLM
from .sequence_classification import SequenceClassification
from .task import Task
from .token_classification import TokenClassification

TASK_CLASSES: dict[str, type[Task]] = {
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "multiple-choice": MultipleChoice,
    "causal-lm": CausalLM,
    "chat": Chat,
    "seq2seq-lm": Seq2SeqLM,
    "cloze": Cloze,
    "distil": Distil,
    "fill-mask": FillMask,
}

__all__ = ["TASK_CLASSES", "Task"]
