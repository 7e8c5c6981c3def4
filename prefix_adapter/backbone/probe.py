"""One tiny forward pass of a backbone, to see what its modules do instead of keeping a list of models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROBE_LENGTH = 4


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's `forward`, in order, without `*args` and `**kwargs`.

    Of the class's `forward`: accelerate puts a wrapper with another signature on the instance.
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]


def innermost(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the named modules that have none of the others inside."""
    return {
        name: module
        for name, module in named.items()
        if not any(other.startswith(f"{name}." if name else "") for other in named if other != name)
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and leave no trace: neither in modes and random numbers, nor where a model changes itself.

    BigBird, for one, exchanges its attention modules for good when an input is short.
    """
    plain = (bool, int, float, str, type(None))
    modules = list(model.modules())
    states = [{k: v for k, v in vars(module).items() if isinstance(v, plain)} for module in modules]
    children = [dict(module._modules) for module in modules]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, state, own in zip(modules, states, children, strict=True):
            vars(module).update(state)
            module._modules.clear()
            module._modules.update(own)


def _ordinary_token(model: nn.Module) -> int:
    """A token id without a meaning of its own (a padding token, for one, may get no position)."""
    config = getattr(model, "config", None)
    special: set[int] = set()
    for part in (config, getattr(config, "get_text_config", lambda: None)()):
        for name, value in vars(part).items() if part is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's embeddings of token ids; `None` if it has none, or several and no word for them (CANINE)."""
    try:
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        return get_embeddings() if get_embeddings is not None else None
    except NotImplementedError:
        return None


def _inputs(model: nn.Module, backbone: nn.Module) -> dict[str, Any]:
    names = parameter_names(backbone)
    weight = getattr(input_embeddings(model), "weight", None)
    if weight is None:
        weight = next(model.parameters())
    ids = torch.full((1, PROBE_LENGTH), _ordinary_token(model), dtype=torch.long, device=weight.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    for name, value in (
        ("attention_mask", torch.ones_like(ids)),
        ("decoder_input_ids", ids),
        ("use_cache", True),
    ):
        # A backbone that only passes its arguments on names none of them.
        if name in names or (name == "use_cache" and "input_ids" not in names):
            inputs[name] = value
    return inputs


def probe(model: nn.Module) -> Any:
    """Run the backbone under `model` once on four tokens, with a cache of its own, for the hooks that the caller set.

    To be called in `untouched`. Gradients are on, and hidden states need one, as in training: the hooks see where the
    backbone turns them off, and bitsandbytes does not repack its weights for inference, after which there are none.

    Returns:
        The backbone's output.

    Raises:
        whatever the backbone raises.
    """
    backbone: Any = getattr(model, "base_model", model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(_need_gradient) for module in embeddings]
    try:
        with torch.enable_grad():
            return backbone(**_inputs(model, backbone))
    finally:
        for handle in handles:
            handle.remove()


def _need_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad or output.is_inference():
        return output
    # A copy, since some backbones (CTRL) go on in place, which a leaf would not allow.
    return output.detach().requires_grad_().clone()


def is_count(tensor: Any) -> int | None:
    """The first of a row of consecutive integers `[..., PROBE_LENGTH]`, `None` if the tensor is no such thing."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.device.type == "meta":
        return None
    if tensor.dim() == 0 or tensor.shape[-1] != PROBE_LENGTH or tensor.numel() != PROBE_LENGTH:
        return None
    first, *_ = row = tensor.flatten().tolist()
    return first if row == list(range(first, first + PROBE_LENGTH)) else None
