"""The probe: one forward pass of a backbone on four tokens.

Hooks see what the backbone's modules do, so no list of models is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..private import get_children, get_device, set_children
from .calls import parameter_names

PROBE_LENGTH = 4


def innermost(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that contain none of the other modules."""
    return {
        name: module
        for name, module in named.items()
        if not any(other.startswith(f"{name}." if name else "") for other in named if other != name)
    }


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
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, state, own in zip(modules, states, children, strict=True):
            vars(module).update(state)
            set_children(module, own)


def _ordinary_token(model: nn.Module) -> int:
    """The id of a token that is not special. (A padding token, for instance, may get no position.)"""
    config = getattr(model, "config", None)
    special: set[int] = set()
    for part in (config, getattr(config, "get_text_config", lambda: None)()):
        for name, value in vars(part).items() if part is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def get_input_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's token embeddings; `None` if it has none, or several of them (CANINE)."""
    try:
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        return get_embeddings() if get_embeddings is not None else None
    except NotImplementedError:
        return None


def _make_inputs(model: nn.Module, backbone: nn.Module) -> dict[str, Any]:
    names = parameter_names(backbone)
    device = get_device(get_input_embeddings(model) or model) or get_device(model)
    ids = torch.full((1, PROBE_LENGTH), _ordinary_token(model), dtype=torch.long, device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    for name, value in (
        ("attention_mask", torch.ones_like(ids)),
        ("decoder_input_ids", ids),
        ("use_cache", True),
    ):
        # A forward with `**kwargs` alone names no argument.
        if name in names or (name == "use_cache" and "input_ids" not in names):
            inputs[name] = value
    return inputs


def probe(model: nn.Module) -> Any:
    """Run the backbone of a model on four tokens, with a cache. The caller has set hooks, and is in `untouched`.

    Gradients are on, as in training: the hooks see where the backbone turns them off. (Without gradients bitsandbytes
    would also repack its weights for inference, and could no longer train.)

    Returns:
        The backbone's output.

    Raises:
        Exception: Any error of the backbone.
    """
    backbone: Any = getattr(model, "base_model", model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(_require_gradient) for module in embeddings]
    try:
        with torch.enable_grad():
            return backbone(**_make_inputs(model, backbone))
    finally:
        for handle in handles:
            handle.remove()


def _require_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad or output.is_inference():
        return output
    # A copy, because some backbones (CTRL) change it in place, which autograd does not allow for a leaf.
    return output.detach().requires_grad_().clone()


def get_first_position(tensor: Any) -> int | None:
    """The first of consecutive integers `[..., PROBE_LENGTH]`; `None` if the tensor has no such form."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.device.type == "meta":
        return None
    if tensor.dim() == 0 or tensor.shape[-1] != PROBE_LENGTH or tensor.numel() != PROBE_LENGTH:
        return None
    first, *_ = row = tensor.flatten().tolist()
    return first if row == list(range(first, first + PROBE_LENGTH)) else None
