"""Taking an adapter out of a model again, when loading it has failed.

PEFT and transformers put an adapter into the model first and read its weights afterwards. If reading fails, the model
has an adapter with random weights. PEFT has no call for that moment, so the layer records which adapters still wait
for their weights: they are never used, and they are removed when the model is used next.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import PrefixTuningV2Layer


@dataclass
class Unfinished:
    """An adapter that was put into the model to be loaded, and whose weights are not there yet.

    Attributes:
        source: where its weights are, for messages.
        parameters: those of its prefix, each with the number of times that it had been written to.
        active: the adapters that were active before.
        requires_grad: what each parameter of the model had as `requires_grad` before.
        embeddings: the base model's own embeddings that the file has too, by name, as they were before.
        ends_later: whether loading is over only when `PrefixTuningV2Layer.finish` is called, as PEFT's loading is.
        thread: the thread that loads it.
    """

    source: str
    parameters: list[tuple[Tensor, int]]
    active: list[str]
    requires_grad: list[tuple[nn.Parameter, bool]]
    embeddings: dict[str, Tensor]
    ends_later: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def of(
        cls,
        source: str,
        model: nn.Module,
        parameters: Iterable[Tensor],
        active: list[str],
        embeddings: dict[str, Tensor],
    ) -> Unfinished:
        """The state of an adapter that was just made."""
        return cls(
            source,
            [(parameter, _writes(parameter)) for parameter in parameters],
            active,
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            {name: tensor.detach().clone() for name, tensor in embeddings.items()},
        )

    def is_loaded(self, parameters: list[Tensor]) -> bool:
        """Whether all parameters of the prefix have been written to or replaced: PEFT loads them after the heads."""
        if len(parameters) != len(self.parameters):
            return True
        return all(
            new is not old or new.is_inference() or _writes(new) != count
            for new, (old, count) in zip(parameters, self.parameters, strict=True)
        )


def _writes(parameter: Tensor) -> int:
    # `_version` has no public name. autograd counts there how often a tensor was written to, except in inference mode.
    return 0 if parameter.is_inference() else parameter._version


def drop_unfinished(layer: PrefixTuningV2Layer) -> None:
    """Remove the adapters that this thread began to load and that never got their weights."""
    for name, entry in list(layer.find_unfinished().items()):
        if entry.thread != threading.get_ident():
            continue  # it may still be loading
        drop_adapter(layer, name)
        warnings.warn(
            f"Adapter {name!r} was removed: its weights were never read from {entry.source}, because loading failed "
            "or was interrupted. Load it again. (`get_peft_model` makes a new adapter of a config that was read.)",
            stacklevel=2,
        )


def drop_adapter(layer: PrefixTuningV2Layer, adapter_name: str) -> None:
    """Remove an adapter from the model, loaded or not; with the last one, the layer and its hooks are removed too.

    If this is interrupted, it can be called again.
    """
    model: Any = layer.model
    entry = layer.find_unfinished().get(adapter_name)
    others = [name for name in layer.adapter_names if name != adapter_name]
    active = [name for name in (entry.active if entry else layer.active_adapters) if name in others]
    for parent, name, wrapper in wrapped_heads(model):
        if set(wrapper.modules_to_save) <= {adapter_name}:
            setattr(parent, name, wrapper.original_module)
        else:
            own = wrapper.active_adapters
            wrapper.delete_adapter(adapter_name, (active if adapter_name in own else own) or None)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if others:
        if adapter_name in layer.active_adapters:
            layer.set_adapter(active or others[:1])
        layer.delete_adapter(adapter_name)
    if entry is not None:
        for parameter, flag in entry.requires_grad:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for name, before in entry.embeddings.items():
                model.get_parameter(name).copy_(before)
    if not others:
        remove_layer(layer)


def remove_layer(layer: PrefixTuningV2Layer) -> None:
    """Remove the layer, its hooks, and what PEFT's tuner and transformers' `load_adapter` leave in the model."""
    model = layer.model
    if not getattr(model, "peft_config", {}):
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(attribute, None)
    layer.remove_hooks()
    for name, child in list(model.named_children()):
        if child is layer:
            delattr(model, name)


def wrapped_heads(model: nn.Module) -> list[tuple[nn.Module, str, ModulesToSaveWrapper]]:
    """Where PEFT has put its wrappers of heads: the module around, the name in it, and the wrapper."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
