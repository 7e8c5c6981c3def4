"""One call of a module: its arguments by name, and the argument names that transformers uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Names of the cache argument of attention modules and backbones: `cache` from transformers 5.24 on. A cache argument
# with another name is found by its type or by its value in the probe (find.py).
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
MASK_ARGUMENTS = ("attention_mask", "mask", "causal_mask", "encoder_attention_mask")
ENCODER_STATES_ARGUMENTS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
# Keys and values of other layers (Gemma 3n, Gemma 4).
SHARED_STATES_ARGUMENT = "shared_kv_states"
POSITIONS_ARGUMENT = "position_ids"


def parameter_names(module: nn.Module) -> list[str]:
    """The argument names of a module's `forward`, in order, without `*args` and `**kwargs`.

    They are read from the class: accelerate puts a wrapper with another signature on the instance.
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]


def get_required_names(module: nn.Module) -> list[str]:
    """The arguments without a default of a module's `forward`, in order."""
    parameters = inspect.signature(type(module).forward).parameters
    return [name for name in parameter_names(module) if parameters[name].default is inspect.Parameter.empty]


@contextmanager
def forward_pre_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside this context modules have forward pre-hooks, which receive positional and keyword arguments."""
    handles = []
    # Inside `try`, because an interruption may meet the loop.
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class ModuleCall:
    """The arguments of one call of a module, by name, however they were passed.

    Args:
        names: The argument names of the module's `forward`, in order.
        args: The positional arguments; copied.
        kwargs: The keyword arguments; copied.
    """

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names, self.args, self.kwargs = names, list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """The value of an argument; `None` if the caller did not pass it."""
        if name in self.kwargs:
            return self.kwargs[name]
        if not self.args or name not in self.names:
            return None
        index = self.names.index(name)
        return self.args[index] if index < len(self.args) else None

    def get_first(self, names: tuple[str, ...]) -> Any:
        """The value of the first of these arguments that the caller passed; `None` if there is none."""
        return next((value for value in map(self.get, names) if value is not None), None)

    def set(self, name: str, value: Any) -> None:
        """Replace the value of an argument in its place, or add the argument."""
        index = self.names.index(name) if name in self.names else len(self.args)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the form that a forward pre-hook returns."""
        return tuple(self.args), self.kwargs


def count_encoder_tokens(call: ModuleCall) -> int:
    """The number of encoder states of each row in a call of a cross-attention module.

    The states may be those of the tiles of an image `[batch * tiles, tokens, size]` (Mllama).
    """
    encoder_states, states = call.get_first(ENCODER_STATES_ARGUMENTS), call.get(call.names[0])
    tokens: int = encoder_states.shape[0] * encoder_states.shape[1] // states.shape[0]
    return tokens


def get_sequences(call: ModuleCall, side: str = "") -> tuple[Tensor | None, tuple[int, ...]]:
    """The token ids that a model receives, and their shape: batch, choices (in multiple choice) and tokens.

    Args:
        call: The call of the model.
        side: `"decoder_"` for the inputs of an encoder-decoder's decoder.

    Returns:
        The ids are `None` if the model receives embeddings. The shape is empty if it receives neither.
    """
    ids, embeddings = call.get(f"{side}input_ids"), call.get(f"{side}inputs_embeds")
    if isinstance(ids, Tensor):
        return ids, tuple(ids.shape)
    return None, tuple(embeddings.shape[:-1]) if isinstance(embeddings, Tensor) else ()


def get_batch_size(call: ModuleCall, main_input: str) -> int | None:
    """The number of rows that a model receives: of its token ids, else of images, audio and other inputs.

    Args:
        call: The call of the model.
        main_input: The name of its main input.
    """
    tensors = (call.get_first(("input_ids", "inputs_embeds", main_input)), *call.args, *call.kwargs.values())
    return next((tensor.shape[0] for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() > 1), None)
