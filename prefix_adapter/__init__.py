"""P-Tuning v2 for Hugging Face PEFT: importing this package makes `PREFIX_TUNING_V2` a PEFT method like LoRA."""

from typing import Any

from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
)
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import PrefixTuningV2Config, PrefixTuningV2Type
from .convert import fold
from .exchange import export_peft, import_peft, import_ptuning_v2
from .find import UnsupportedBackboneError
from .hub import push_to_hub
from .layer import PREFIX, PrefixTuningV2Layer
from .model import PrefixTuningV2Model, settle
from .pool import AdapterPool, LoadedAdapter
from .start import init_from, init_from_text
from .undo import guard_all
from .version import __version__
from .watch import PrefixNotUsedError

# What `peft.utils.register_peft_method` does, which refuses names that are not in PEFT's closed enum.
_entries: list[tuple[dict[Any, Any], Any]] = [
    (PEFT_TYPE_TO_CONFIG_MAPPING, PrefixTuningV2Config),
    (PEFT_TYPE_TO_TUNER_MAPPING, PrefixTuningV2Model),
    (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
]
for _mapping, _entry in _entries:
    _mapping[PrefixTuningV2Type.PREFIX_TUNING_V2] = _entry
guard_all(settle)

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
