"""The probe: one forward pass of a backbone on a short input.

Hooks see what the backbone's modules do, so no list of models is needed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..private import get_children, set_children
from .checkpointing import require_gradient
from .dummy_inputs import ProbeInputs, UnknownInputError, get_inputs

_WAY_OUT = (
    "If the inputs are not what the model needs, give an example of them around the call: "
    "`with prefix_adapter.example_inputs(**batch): ...`."
)


def innermost(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that contain none of the other modules."""
    return {
        name: module
        for name, module in named.items()
        if not any(other.startswith(f"{name}." if name else "") for other in named if other != name)
    }


class _Thread(threading.local):
    """The state of one thread: how many times it is in `untouched`."""

    depth = 0


_THREAD = _Thread()


def is_probing() -> bool:
    """Whether this thread tries out a model, whose inputs mean nothing then."""
    return _THREAD.depth > 0


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in eval mode; afterwards it is as it was, and so are the random numbers.

    Changes that a model makes to itself are undone too: BigBird replaces its attention modules if an input is short.
    """
    plain = (bool, int, float, str, type(None))
    modules = list(model.modules())
    states = [{k: v for k, v in vars(module).items() if isinstance(v, plain)} for module in modules]
    children = [dict(get_children(module)) for module in modules]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        _THREAD.depth += 1
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        _THREAD.depth -= 1
        for module, state, own in zip(modules, states, children, strict=True):
            vars(module).update(state)
            set_children(module, own)


class ProbeError(RuntimeError):
    """No forward pass on dummy inputs, or on the user's example, succeeded."""


def probe(
    model: nn.Module, begin: Callable[[], None] = lambda: None, count_missed: Callable[[], int] = lambda: 0
) -> Any:
    """Run a model on a short input, with a cache. The caller has set hooks, and is in `untouched`.

    Several inputs are tried until one runs (see dummy_inputs.py). Those of a text come first. Only the part of a
    vision-language model that reads text is then run, if that is enough.

    Gradients are on, as in training: the hooks see where the backbone turns them off. (Without gradients bitsandbytes
    would also repack its weights for inference, and could no longer train.) Nothing is kept for a backward pass.

    Args:
        model: The model.
        begin: Called before each try. Hooks that record must forget what they saw in a try that failed.
        count_missed: Called after a try that ran. It returns how many modules of interest the try did not reach. If
            that is not 0, inputs for more parts of the model are tried.

    Returns:
        The output of the backbone, or of the model if the user gave an example.

    Raises:
        ProbeError: If no input runs. It names the inputs of the most complete try.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(require_gradient) for module in embeddings]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
            return _run_best(get_inputs(model), begin, count_missed)
    finally:
        for handle in handles:
            handle.remove()


def _run_best(candidates: Iterator[ProbeInputs], begin: Callable[[], None], count_missed: Callable[[], int]) -> Any:
    """Run the first inputs that miss no module. If all miss some, run the first of those that miss the fewest."""
    failed: list[tuple[ProbeInputs, Exception]] = []
    best: ProbeInputs | None = None
    fewest = math.inf
    try:
        for inputs in candidates:
            begin()
            try:
                output = inputs.module(**inputs.arguments)
            except Exception as error:
                failed.append((inputs, error))
                continue
            missed = count_missed()
            if not missed:
                return output
            if missed < fewest:
                best, fewest = inputs, missed
    except UnknownInputError as error:
        if best is None:
            raise ProbeError(f"{error}. {_WAY_OUT}") from error
    if best is None:
        raise ProbeError(_describe_failure(*failed[0])) from failed[0][1]
    if inputs is best:
        return output
    begin()
    return best.module(**best.arguments)


def _describe_failure(inputs: ProbeInputs, error: Exception) -> str:
    kind = "the example inputs" if inputs.is_example else "dummy inputs"
    what = f"a forward pass on {kind} ({inputs.describe()}) failed ({type(error).__name__}: {error})."
    # `NotImplementedError` says that the model can do nothing with a cache or its view, whatever the inputs are.
    return what if inputs.is_example or isinstance(error, NotImplementedError) else f"{what} {_WAY_OUT}"


def _drop(tensor: Any) -> Any:
    """Keep no tensor for a backward pass, because there is none."""
    return None


def get_first_position(tensor: Any) -> int | None:
    """The first of two or more consecutive integers `[..., tokens]`; `None` if the tensor has no such form."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.device.type == "meta":
        return None
    if tensor.dim() == 0 or tensor.shape[-1] != tensor.numel() or tensor.numel() < 2:
        return None
    first, *_ = row = tensor.flatten().tolist()
    return first if row == list(range(first, first + len(row))) else None
