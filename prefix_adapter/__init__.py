"""P-Tuning v2 (deep prefix tuning; Liu et al. 2022, arXiv:2110.07602) as a PEFT method.

Importing this package registers the method `PREFIX_TUNING_V2` with PEFT.

Example:
    >>> from prefix_adapter import PrefixTuningV2Config, get_peft_model
    >>> model = get_peft_model(base_model, PrefixTuningV2Config(num_virtual_tokens=20, task_type="SEQ_CLS"))
"""

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
    "PTuningConfig",
    "PTuningLayer",
    "PTuningModel",
    "PTuningType",
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
    "example_inputs",
    "export_kv",
    "export_peft",
    "fold",
    "get_peft_model",
    "import_peft",
    "import_ptuning",
    "import_ptuning_v2",
    "init_from",
    "init_from_text",
    "join",
    "push_to_hub",
    "set_strength",
    "turn_off_dropout",
    "use_strength",
]


def _runs_command_line() -> bool:
    """Whether this process runs `prefix-adapter` or `python -m prefix_adapter`.

    The command line imports peft and torch only when a command needs them, so that its help and its error messages
    appear at once. A process that is not recognised here imports them at the start and works the same.
    """
    arguments = sys.orig_argv
    if sys.argv[:1] == ["-m"]:  # Python sets this while it imports the package of the module that `-m` names
        return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == [__name__]
    return len(arguments) > 1 and Path(arguments[1]).name in ("prefix-adapter", "prefix-adapter.exe")


if TYPE_CHECKING or not _runs_command_line():
    from .api import *
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".api", __name__), name)
