"""P-Tuning v2 for Hugging Face PEFT: importing this package makes `PREFIX_TUNING_V2` a PEFT method like LoRA."""

# ruff: noqa: F403, F405

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = [
    "AdapterPool",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoadedAdapter",
    "PeftConfig",
    "PeftModel",
    "PrefixNotUsedError",
    "PrefixTuningV2Config",
    "PrefixTuningV2Layer",
    "PrefixTuningV2Model",
    "PrefixTuningV2Type",
    "TaskType",
    "UnsupportedBackboneError",
    "__version__",
    "export_peft",
    "fold",
    "get_peft_model",
    "import_peft",
    "import_ptuning_v2",
    "init_from",
    "init_from_text",
    "push_to_hub",
]


def _is_the_command() -> bool:
    """Whether this process is the command `prefix-adapter`, or `python -m prefix_adapter`.

    The command imports peft and torch when it needs them, so that its help and its messages about mistakes do not wait
    for them. A command that is not recognised here works as well, and starts more slowly.
    """
    started = sys.orig_argv
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module that it was told to run
        return "-m" in started and started[started.index("-m") + 1 :][:1] == [__name__]
    return len(started) > 1 and Path(started[1]).name in ("prefix-adapter", "prefix-adapter.exe")


if TYPE_CHECKING or not _is_the_command():
    from .api import *
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".api", __name__), name)
