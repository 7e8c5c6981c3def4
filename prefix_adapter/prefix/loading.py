"""Adapters that are being loaded.

PEFT and transformers put an adapter into the model first and read its weights afterwards. If reading fails, the model
has an adapter with random weights, and PEFT has no call for that moment. So the layer records which adapters wait for
their weights. Such an adapter is never used, and it is removed when the model is used next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..backbone.attention import AttentionTarget
from ..config import PrefixTuningV2Config
from ..files.check import check_embeddings, check_file
from ..files.contents import SAVED_ROOT, TensorSpec, find_embeddings, find_heads, tensors_of
from ..private import get_write_count
from .names import LAYER_NAME, PREFIX


@dataclass
class PendingLoad:
    """An adapter whose weights are not read yet, and the state of the model before it was added.

    Attributes:
        source: The place of its weights, for messages.
        parameters: The parameters of its prefix, each with its number of writes.
        active: The adapters that were active.
        requires_grad: Each parameter of the model with its `requires_grad`.
        embeddings: Copies of the base model's embeddings that the adapter's file contains too, by name.
        ends_later: Whether loading ends with a call of `PrefixTuningV2Layer.end_load`, as PEFT's loading does, and
            not as soon as the weights are there.
        thread: The thread that loads the adapter.
    """

    source: str
    parameters: list[tuple[Tensor, int]]
    active: list[str]
    requires_grad: list[tuple[nn.Parameter, bool]]
    embeddings: dict[str, Tensor]
    ends_later: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def begin(
        cls,
        source: str,
        model: nn.Module,
        parameters: Iterable[Tensor],
        active: list[str],
        embeddings: dict[str, Tensor],
    ) -> PendingLoad:
        """Record the state of an adapter that was just added to the model."""
        return cls(
            source,
            [(parameter, get_write_count(parameter)) for parameter in parameters],
            active,
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            {name: tensor.detach().clone() for name, tensor in embeddings.items()},
        )

    def has_weights(self, parameters: list[Tensor]) -> bool:
        """Whether all parameters of the prefix were written to or replaced. PEFT loads them after the task heads."""
        if len(parameters) != len(self.parameters):
            return True
        return all(
            new is not old or new.is_inference() or get_write_count(new) != count
            for new, (old, count) in zip(parameters, self.parameters, strict=True)
        )

    @property
    def in_this_thread(self) -> bool:
        """Whether this thread began to load the adapter. Another thread may still be loading it."""
        return self.thread == threading.get_ident()

    def restore(self, model: nn.Module) -> None:
        """Give the base model's parameters the state that they had before."""
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for name, before in self.embeddings.items():
                model.get_parameter(name).copy_(before)


def check_adapter_file(
    layer: BaseTunerLayer,
    model: nn.Module,
    targets: list[AttentionTarget],
    adapter_name: str,
    config: PrefixTuningV2Config,
    encoder: dict[str, TensorSpec],
    has_other_adapters: bool,
) -> dict[str, Tensor]:
    """Check `modules_to_save`, and the file of an adapter that is being loaded, before the model is changed.

    Args:
        layer: The layer that will hold the prefix.
        model: The model.
        targets: Its attention modules.
        adapter_name: The new adapter's name.
        config: The new adapter's config. There is no file to check if its `source` is `None`.
        encoder: The parameters of the prefix, by name.
        has_other_adapters: Whether the model has prefix adapters already, which use the base model's embeddings.

    Returns:
        The embeddings of the base model that loading will write to, by name.

    Raises:
        ValueError: If the file does not fit, or `modules_to_save` names a module that cannot be saved.
    """
    containers = [f"{LAYER_NAME}.{name}" for name in layer.adapter_layer_names]
    own = [LAYER_NAME, *containers, *(f"{name}.{adapter_name}" for name in containers)]
    attention = [target.module for target in targets]
    heads = find_heads(model, config.modules_to_save or (), attention, own, config.task_type)
    if config.source is None:
        return {}
    needed = {f"{SAVED_ROOT}{LAYER_NAME}.{PREFIX}{name}": spec for name, spec in encoder.items()}
    for name, head in heads.items():
        parameters = head.state_dict(keep_vars=True)
        needed |= {f"{SAVED_ROOT}{name}.{key}": TensorSpec.of(tensor) for key, tensor in parameters.items()}
    # PEFT saves the tensors of all methods that have an adapter of this name in one file.
    others = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and m is not layer]
    found = tensors_of(model, adapter_name, others)
    allowed = {SAVED_ROOT + name.replace(f".{adapter_name}.", ".", 1): spec for name, spec in found.items()}
    embeddings, unread = find_embeddings(model, SAVED_ROOT, heads)
    path = config.source.find_weights()
    written = check_file(path, needed, allowed | unread, model, embeddings)
    if written and has_other_adapters:
        check_embeddings(path, model, heads, "the other adapters of this model")
    own_names = {name: name.removeprefix(SAVED_ROOT).replace(".original_module.", ".") for name in written}
    return {own_names[name]: tensor for name, tensor in written.items()}
