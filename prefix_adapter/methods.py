"""The methods of this package. Importing this module registers them with PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import PrefixTuningV2Config
from .model import PrefixTuningV2Model
from .ptuning.config import PTuningConfig
from .ptuning.model import PTuningModel
from .tuner.config import AdapterConfig
from .tuner.model import AdapterModel


class Method(NamedTuple):
    """A PEFT method of this package.

    Attributes:
        config: The class of its configs.
        tuner: The class of its tuner.
    """

    config: type[AdapterConfig]
    tuner: type[AdapterModel]


METHODS = [Method(PrefixTuningV2Config, PrefixTuningV2Model), Method(PTuningConfig, PTuningModel)]

# The steps of `peft.utils.register_peft_method`, which rejects names that are not members of PEFT's `PeftType`.
for _method in METHODS:
    _entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, _method.config),
        (PEFT_TYPE_TO_TUNER_MAPPING, _method.tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, _method.tuner.prefix),
    ]
    for _mapping, _entry in _entries:
        _mapping[_method.config.method] = _entry
