"""Find the linear layers in attention modules, whose outputs low-rank matrices beside a prefix change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .attention import AttentionTarget
from .probe import probe, untouched


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer in an attention module that takes a prefix.

    Attributes:
        name: Its name in the model.
        module: The layer.
        target: The attention module.
        inputs: Its input size.
        outputs: Its output size.
    """

    name: str
    module: nn.Module
    target: AttentionTarget
    inputs: int
    outputs: int


def find_linear_layers(model: nn.Module, targets: Iterable[AttentionTarget]) -> list[LinearLayer]:
    """Run the probe, and find the linear layers that attention modules call on hidden states `[batch, tokens, size]`.

    A layer whose weight is used without a call of the layer is left out, because a hook would not see it. So is a
    layer that divides its input into groups (DeepSeek-V4).

    Raises:
        ProbeError: If no dummy input runs.
    """
    candidates = [layer for target in targets for layer in _get_linear_layers(target)]
    found: dict[str, LinearLayer] = {}
    handles = []
    try:
        for layer in candidates:
            handles.append(layer.module.register_forward_hook(partial(_note_call, layer, found)))
        with untouched(model):
            probe(model, found.clear, lambda: len(candidates) - len(found))
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer.name] for layer in candidates if layer.name in found]


def _get_linear_layers(target: AttentionTarget) -> list[LinearLayer]:
    """The outermost linear layers in an attention module. A layer with LoRA around it counts as one."""
    layers: list[LinearLayer] = []
    for name, module in target.module.named_modules():
        inside = any(name.startswith(f"{layer.name}.") for layer in layers)
        sizes = _get_sizes(module)
        if name and sizes and not inside:
            layers.append(LinearLayer(name, module, target, *sizes))
    return [replace(layer, name=f"{target.name}.{layer.name}") for layer in layers]


def _get_sizes(module: nn.Module) -> tuple[int, int] | None:
    """The input and output size of a linear layer; `None` for other modules."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _note_call(
    layer: LinearLayer, found: dict[str, LinearLayer], module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    states = args[0] if args else None
    if not isinstance(states, Tensor) or not isinstance(output, Tensor):
        return
    expected = (*states.shape[:-1], layer.outputs)
    if states.dim() >= 3 and states.shape[-1] == layer.inputs and output.shape == expected:
        found[layer.name] = layer
