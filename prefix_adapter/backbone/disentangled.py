"""A prefix for DeBERTa-v2 and v3, whose attention uses neither a cache nor transformers' attention interface.

Disentangled attention (He et al. 2021, https://arxiv.org/abs/2006.03654, section 3.1) adds to the scores a bias that
depends on contents and relative positions. Here a module's forward computes query, key, value and bias with the
module's own parts, and calls a function. A prefix has no position, so its bias is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from ..private import get_forward_attribute
from .attention import AttentionEntry
from .attention_entry import InterfaceEntry

# The parts of a module that the forward below uses.
_PARTS = ("query_proj", "key_proj", "value_proj", "pos_att_type", "disentangled_attention_bias")


class DisentangledEntry(AttentionEntry):
    """The entry into a module with DeBERTa-v2's disentangled attention."""

    @classmethod
    def find(cls, module: nn.Module) -> DisentangledEntry | None:
        """The entry into a module; `None` if the module has another kind of attention."""
        return cls() if all(hasattr(module, name) for name in _PARTS) else None

    @property
    def implementation(self) -> str:
        """Masks are bool, and always passed."""
        return "eager"

    def install(self, module: nn.Module, attend: Callable[..., Any]) -> None:
        """Replace the module's forward by one that calls `attend`."""
        forward = partial(_forward, module, attend)
        setattr(module, get_forward_attribute(module), update_wrapper(forward, type(module).forward))

    def uninstall(self, module: nn.Module) -> None:
        """Let the module use the forward of its class again, unless other code has replaced ours."""
        name = get_forward_attribute(module)
        if getattr(vars(module).get(name), "func", None) is _forward:
            delattr(module, name)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend as the module does, in the same order of operations, so that results are equal bit for bit.

        Returns:
            The outputs `[batch, tokens, heads, size]`, and the attention weights `[batch, heads, tokens, keys]`.
        """
        scores = query @ (key.transpose(-1, -2) / kwargs["scale"])
        if kwargs["position_bias"] is not None:
            scores = scores + kwargs["position_bias"]
        if attention_mask.is_floating_point():  # the strength of a prefix is added to its scores
            scores = scores + attention_mask
        else:
            scores = scores.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
        weights = module.dropout(scores.softmax(-1))
        return (weights @ value).transpose(1, 2), weights


def find_entry(module: nn.Module) -> AttentionEntry | None:
    """The entry for a prefix into a module's attention; `None` if there is none, or if it is no attention module."""
    return InterfaceEntry.find(module) or DisentangledEntry.find(module)


def _forward(
    module: Any,
    attend: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of DeBERTa-v2's `DisentangledSelfAttention`, with attention by a function.

    SEW-D passes further arguments to the module, which the module does not use.
    """
    heads = module.num_attention_heads
    # [batch x heads, tokens, size], as the module's own bias expects it.
    query = module.transpose_for_scores(
        module.query_proj(hidden_states if query_states is None else query_states), heads
    )
    key, value = (
        module.transpose_for_scores(projection(hidden_states), heads)
        for projection in (module.key_proj, module.value_proj)
    )
    factor = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    bias = None
    if module.relative_attention:
        embeddings = module.pos_dropout(rel_embeddings)
        bias = module.disentangled_attention_bias(query, key, relative_pos, embeddings, factor)
        bias = bias.unflatten(0, (-1, heads)) if isinstance(bias, Tensor) else None
    query, key, value = (states.unflatten(0, (-1, heads)) for states in (query, key, value))
    # A float32 tensor, as in the module.
    scale = torch.tensor(query.shape[-1] * factor, dtype=torch.float, device=query.device).sqrt().to(query.dtype)
    outputs, weights = attend(
        module, query, key, value, attention_mask.bool(), scale=scale, position_bias=bias, is_causal=False
    )
    return outputs.flatten(2), weights if output_attentions else None
