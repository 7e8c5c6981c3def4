"""The strength of a prefix: how much of the attention it takes, from none to as trained and beyond."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..config import PrefixTuningV2Config, check_strength
from ..prefix.layer import find_prefix_layer


def set_strength(model: nn.Module, strength: float, adapter_name: str = "default") -> None:
    """Set the strength of an adapter. It is saved with the adapter, as `strength` in its config.

    Attention with a prefix is `(1 - s) * attention to the tokens + s * attention to the prefix`, where s is the
    prefix's share of the softmax. `log(strength)` is added to the scores of the prefix, so that its weight in the
    softmax is multiplied by the strength. At 0 the outputs are those of the base model, bit for bit.

    Args:
        model: A `PeftModel`, or a transformers model with the adapter in it.
        strength: From 0 (no effect) over 1 (as trained) to 1000.
        adapter_name: The adapter.

    Raises:
        ValueError: If there is no such adapter, or the strength is out of range, or it is neither 0 nor 1 and the
            backbone cannot add something to the scores of a prefix. Nothing is changed then.

    Example:
        ```python
        set_strength(model, 0.5)
        model.save_pretrained("adapter")  # "strength": 0.5 in its config
        ```
    """
    check_strength("strength", strength)
    layer = find_prefix_layer(model, adapter_name)
    layer.check_strengths([strength], layer.adapters[adapter_name].columns)
    layer.set_strength(adapter_name, float(strength))
    config = layer.configs[adapter_name]
    assert isinstance(config, PrefixTuningV2Config)
    config.strength = float(strength)


@contextmanager
def use_strength(model: nn.Module, strength: float | Sequence[float]) -> Iterator[None]:
    """Inside this context, the calls of a model in this thread use another strength.

    Args:
        model: A `PeftModel`, or a transformers model with a prefix in it.
        strength: The strength of all prefixes, or one for each row of the batch, beside `adapter_names` too. See
            `set_strength`.

    Raises:
        ValueError: If a strength is out of range or the backbone cannot have it, or, when the model is called, if
            the number of strengths is not that of the rows.

    Example:
        ```python
        with use_strength(model, 0.5):
            model.generate(**inputs)
        with use_strength(model, [0.0, 0.5, 1.0]):
            model.generate(**three_rows)
        ```
    """
    strengths = list(strength) if isinstance(strength, Sequence) else [strength]
    if not strengths:
        raise ValueError("`strength` is an empty list; it needs a number for each row of the batch.")
    for each in strengths:
        check_strength("strength", each)
    layer = find_prefix_layer(model)
    layer.check_strengths(strengths, {slot for adapter in layer.adapters.values() for slot in adapter.columns})
    numbers = [float(each) for each in strengths]
    with layer.run(layer.new_call(strengths=numbers if isinstance(strength, Sequence) else numbers[0])):
        yield
