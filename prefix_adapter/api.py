"""The public names of the package. Importing this module registers the methods with PEFT."""

# ruff: noqa: F401

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

from . import methods
from .adapters.engine import export_kv
from .adapters.exchange import export_peft, import_peft
from .adapters.hub import push_to_hub
from .adapters.join import join
from .adapters.pool import AdapterPool, LoadedAdapter
from .adapters.ptuning import import_ptuning
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
from .prefix.usage import PrefixNotUsedError
from .ptuning.config import PTuningConfig, PTuningType
from .ptuning.layer import PTuningLayer
from .ptuning.model import PTuningModel
