"""The public names of the package. Importing this module registers `PREFIX_TUNING_V2` with PEFT."""

# ruff: noqa: F401

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

from .adapters.engine import export_kv
from .adapters.exchange import export_peft, import_peft
from .adapters.hub import push_to_hub
from .adapters.pool import AdapterPool, LoadedAdapter
from .adapters.ptuning_v2 import import_ptuning_v2
from .adapters.saved import fold
from .adapters.start import init_from, init_from_text
from .adapters.strength import set_strength, use_strength
from .backbone.dropout import turn_off_dropout
from .backbone.dummy_inputs import example_inputs
from .backbone.unsupported import UnsupportedBackboneError
from .config import PrefixTuningV2Config, PrefixTuningV2Type
from .model import PrefixTuningV2Model
from .prefix.layer import PrefixTuningV2Layer
from .prefix.names import PREFIX
from .prefix.usage import PrefixNotUsedError

# The steps of `peft.utils.register_peft_method`, which rejects names that are not members of PEFT's `PeftType`.
_entries: list[tuple[dict[Any, Any], Any]] = [
    (PEFT_TYPE_TO_CONFIG_MAPPING, PrefixTuningV2Config),
    (PEFT_TYPE_TO_TUNER_MAPPING, PrefixTuningV2Model),
    (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
]
for _mapping, _entry in _entries:
    _mapping[PrefixTuningV2Type.PREFIX_TUNING_V2] = _entry
