"""The private names of other libraries that this package reads, each with its reason.

A test per entry fails when the name changes.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from peft import PeftConfig


class ReadingConfig(NamedTuple):
    """The arguments of a running call of `PeftConfig.from_pretrained`.

    Attributes:
        name: the folder, or the repository on the Hub.
        subfolder: a folder within it, or `None`.
        hub_options: the arguments for `huggingface_hub.hf_hub_download`.
    """

    name: str
    subfolder: str | None
    hub_options: dict[str, Any]


def running_config_read() -> ReadingConfig | None:
    """Find the call of `PeftConfig.from_pretrained` that the calling code runs in.

    PEFT makes a config from the fields in a file, and does not pass it the folder of that file. transformers'
    `load_adapter` changes the model before it reads the weights, so our config must know the folder in order to
    check the weights first. The frames of the running calls are the only place where the folder stands.

    Private names: the local variables `pretrained_model_name_or_path`, `subfolder` and `hf_hub_download_kwargs` of
    `PeftConfig.from_pretrained`. `tests/test_config.py` fails when one of them changes.

    Returns:
        The arguments of that call; `None` outside of such a call.
    """
    reader = inspect.unwrap(PeftConfig.from_pretrained).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not reader:
        frame = frame.f_back
    found = {} if frame is None else frame.f_locals
    if not {"pretrained_model_name_or_path", "subfolder", "hf_hub_download_kwargs"} <= found.keys():
        return None
    return ReadingConfig(found["pretrained_model_name_or_path"], found["subfolder"], found["hf_hub_download_kwargs"])
