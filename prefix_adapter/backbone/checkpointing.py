"""Gradient checkpointing: make sure that it loses no gradient of a prefix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ..private import has_input_gradients, uses_reentrant_checkpointing
from .calls import ENCODER_STATES_ARGUMENTS

_EMBEDDINGS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CheckpointingGuard:
    """Prepares a model for reentrant gradient checkpointing.

    Reentrant checkpointing drops the gradients inside a layer whose input needs none. PEFT turns input gradients on
    only if checkpointing is on before wrapping.

    Args:
        model: The model.
        attention: Its attention modules with a prefix.
        shares_keys: Whether its layers pass keys and values on to each other.
    """

    def __init__(self, model: nn.Module, attention: list[nn.Module], shares_keys: bool):
        self._model, self._attention, self._shares_keys = model, attention, shares_keys
        self._checks: list[RemovableHandle] = []
        self._checks_inputs = False
        self._enabled = False
        self._handles: list[RemovableHandle] = []
        self._modules: list[Any] | None = None

    def prepare(self, trains: bool) -> None:
        """Turn input gradients on if reentrant checkpointing needs them.

        Args:
            trains: Whether the forward that begins computes gradients in training mode.

        Raises:
            ValueError: If layers share keys and values, whose gradients reentrant checkpointing loses.
        """
        self._checks_inputs = False
        if not trains:
            return
        if self._modules is None:
            # Walking through all modules takes time, and this set of modules never changes.
            self._modules = [module for module in self._model.modules() if hasattr(module, "gradient_checkpointing")]
        modules = [module for module in self._modules if module.gradient_checkpointing]
        if not any(uses_reentrant_checkpointing(module) for module in modules):
            return
        if self._shares_keys:
            raise ValueError(
                f"{type(self._model).__name__} hands keys and values on from layer to layer, and reentrant gradient "
                'checkpointing loses their gradients. Use `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        self._checks_inputs = True
        if not self._checks:
            layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
            self._checks = [
                layer.register_forward_pre_hook(self._check_inputs, with_kwargs=True)
                for layer in layers
                if any(part in self._attention for part in layer.modules())
            ]
        enable: Any = getattr(self._model, "enable_input_require_grads", None)
        if enable is not None and not has_input_gradients(self._model):
            enable()
            self._enabled = True
        if not self._handles:
            # A model may have more embeddings than those that transformers knows: MusicGen, and the convolutions that
            # read sound and images.
            first = [module for module in self._model.modules() if isinstance(module, _EMBEDDINGS)]
            self._handles = [module.register_forward_hook(require_gradient) for module in first]

    def _check_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that a layer's inputs keep their gradients.

        Input gradients come from embeddings: a layer of an image or audio encoder may have none. An encoder's states
        that are passed by keyword lose theirs.
        """
        if not self._checks_inputs or not module.training or not uses_reentrant_checkpointing(module):
            return
        given = {name: kwargs.get(name) for name in ENCODER_STATES_ARGUMENTS}
        lost = [name for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
        if lost or not any(isinstance(value, Tensor) and value.requires_grad for value in args):
            what = f"receives {', '.join(lost)} by keyword" if lost else "has an input that needs no gradient"
            raise ValueError(
                f"{type(module).__name__} in {type(self._model).__name__} {what}, and reentrant gradient "
                "checkpointing would lose gradients of the prefix. Use "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

    def release(self) -> None:
        """Remove the hooks, and turn input gradients off again if this guard has turned them on."""
        for handle in self._checks:
            handle.remove()
        self._checks = []
        if self._enabled:
            model: Any = self._model
            model.disable_input_require_grads()
            self._enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles = []


def require_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook: the output of an embedding, or of a convolution in its place, needs a gradient.

    It is no leaf, because some backbones (CTRL, BLIP) change it in place, which autograd does not allow for a leaf.
    """
    if not isinstance(output, Tensor) or output.is_inference() or not output.is_leaf:
        return output
    return output.detach().requires_grad_().clone()
