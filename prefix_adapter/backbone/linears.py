"""Find the linear layers in attention modules, whose outputs low-rank matrices beside a prefix change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .attention import AttentionTarget
from .parallel import is_divided
from .probe import probe, untouched


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer in an attention module that takes a prefix.

    Attributes:
        name: Its name in the model.
        module: The layer.
        target: The attention module.
        inputs: Its input size, in all processes together.
        outputs: Its output size, in all processes together.
        divided: Which of these each process has a part of, if tensor parallelism divides the layer.
    """

    name: str
    module: nn.Module
    target: AttentionTarget
    inputs: int
    outputs: int
    divided: Literal["inputs", "outputs"] | None = None


def find_linear_layers(model: nn.Module, targets: Iterable[AttentionTarget], processes: int = 1) -> list[LinearLayer]:
    """Run the probe, and find the linear layers that attention modules call on hidden states `[batch, tokens, size]`.

    A layer whose weight is used without a call of the layer is left out, because a hook would not see it. So is a
    layer that divides its input into groups (DeepSeek-V4).

    Args:
        model: The model.
        targets: Its attention modules.
        processes: The number of processes among which tensor parallelism may divide a layer.

    Raises:
        ProbeError: If no dummy input runs.
        ValueError: If processes divide some layers of an attention module, and all have another layer whole: it is not
            known whether they have parts of its gradient.
    """
    candidates = [layer for target in targets for layer in _get_linear_layers(target)]
    found: dict[str, LinearLayer] = {}
    handles = []
    try:
        for layer in candidates:
            handles.append(layer.module.register_forward_hook(partial(_note_call, layer, found, processes)))
        with untouched(model):
            probe(model, found.clear, lambda: len(candidates) - len(found))
    finally:
        for handle in handles:
            handle.remove()
    layers = [found[layer.name] for layer in candidates if layer.name in found]
    divided = {layer.target.name for layer in layers if layer.divided}
    for layer in layers:
        if layer.target.name in divided and not layer.divided and not is_divided(layer.module):
            raise ValueError(
                f"`lora_r`: tensor parallelism divides {layer.target.name}, and leaves {layer.name} whole. What each "
                "process has of the gradient of its low-rank matrices is not known. Use `lora_r=0`, or load the model "
                "without `tp_plan`."
            )
    return layers


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
    layer: LinearLayer,
    found: dict[str, LinearLayer],
    processes: int,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    states = args[0] if args else None
    if not isinstance(states, Tensor) or not isinstance(output, Tensor):
        return
    if states.dim() < 3 or states.shape[:-1] != output.shape[:-1]:
        return
    match layer.inputs / states.shape[-1], layer.outputs / output.shape[-1]:
        case (1, 1):
            found[layer.name] = layer
        case (parts, 1) if parts == processes:
            found[layer.name] = replace(layer, divided="inputs")
        case (1, parts) if parts == processes:
            found[layer.name] = replace(layer, divided="outputs")
