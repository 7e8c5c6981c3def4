"""The error for a backbone that cannot take a prefix. It says why, and what to use instead."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import transformers
from packaging.requirements import Requirement
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..version import __version__
from .attention import EntryPoint
from .disentangled import find_entry
from .parallel import TensorParallelism

_ALTERNATIVES = {
    "encoder": "BERT, RoBERTa, XLM-RoBERTa, ELECTRA or CamemBERT (all-MiniLM is a BERT of DistilBERT's size)",
    "decoder": "Llama, Qwen, GPT-2 or OPT",
    "encoder-decoder": "T5, BART or mBART",
}


_ENTRIES = {
    "cache": "by way of `past_key_values` (`cache` from transformers 5.24 on)",
    "attention": "in the call of its attention function",
}


class UnsupportedBackboneError(ValueError):
    """The backbone's attention cannot receive keys and values from outside, so it can take no prefix.

    Args:
        model: The model.
        why: The reason, as a sentence.
        entry_point: Where the prefix should have entered: `"cache"` or `"attention"`.

    Example:
        ```python
        try:
            model = get_peft_model(model, PrefixTuningV2Config())
        except UnsupportedBackboneError:  # ALBERT or DistilBERT, for instance
            model = get_peft_model(model, PrefixTuningV2Config(entry_point="attention"))
        ```
    """

    def __init__(self, model: nn.Module, why: str, entry_point: EntryPoint = "cache"):
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if getattr(config, "is_encoder_decoder", False):
            family = "encoder-decoder"
        elif model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            family = "decoder"
        else:
            family = "encoder"
        other = ""
        if entry_point == "cache" and any(map(find_entry, model.modules())):
            other = (
                'set `PrefixTuningV2Config(entry_point="attention")` (in a recipe `adapter.entry_point: attention`), '
                "which uses another way in, or "
            )
        super().__init__(
            f"{type(model).__name__} cannot take a prefix: {why} P-Tuning v2 puts learned keys and values in front of "
            f"every attention layer {_ENTRIES[entry_point]}. Backbones of the same kind that work: "
            f"{_ALTERNATIVES[family]}. For this one, {other}use another PEFT method (LoRA, for instance)."
            f"{_describe_untested_transformers()}"
        )

    def point_to_inner_model(self, model: nn.Module) -> None:
        """If `model` is a custom module around a transformers model, say that the inner model can be wrapped."""
        inner: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and not name.startswith(tuple(f"{part}." for part in inner)):
                inner[name] = module
        if inner and "" not in inner:
            name, part = next(iter(inner.items()))
            self.args = (
                f"{type(model).__name__} is a module around {type(part).__name__} (`{name}`), and cannot be tried out "
                f"with token ids alone. Add the adapter to the model inside: `model.{name} = "
                f"get_peft_model(model.{name}, config)`. What came of trying: {self}",
            )

    def point_to_processes(self, model: nn.Module, parallelism: TensorParallelism | None) -> None:
        """If tensor parallelism divides `model`, say that its heads are or may be the cause."""
        if parallelism is None:
            return
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        plan = "A `tp_plan` can have each process compute all heads (docs/distributed.md)."
        if isinstance(heads, int) and heads % parallelism.size:
            self.args = (
                f"{type(model).__name__} cannot take a prefix, because its number of key/value heads, {heads}, is no "
                f"multiple of the number of processes, {parallelism.size}, over which tensor parallelism divides it. "
                f"{plan} What came of trying: {self}",
            )
        else:
            self.args = (
                f"{self} Tensor parallelism divides the model over {parallelism.size} processes. If one process can "
                f"have the adapter, the way in which its heads are divided may be the cause. {plan}",
            )


def _describe_untested_transformers() -> str:
    """A way out if the installed transformers is not one of the versions that this package was tested with."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("prefix-adapter") or ()]
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return ""
    tested = next(requirement.specifier for requirement in requirements if requirement.name == "transformers")
    if tested.contains(transformers.__version__, prereleases=True):
        return ""
    return (
        f" transformers {transformers.__version__} is installed, and prefix-adapter {__version__} was tested with "
        f"{tested}. A backbone that worked with one of those versions may work again after: "
        f"pip install 'transformers{tested}'."
    )
