"""Causal attention behind a prefix by a kernel that needs no mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..private import without_torch_function

# Minimum number of input tokens per prefix token at which the square form is faster than a mask. Measured on one CPU
# thread: equal at 13, a third less time at 51.
_MIN_TOKENS_PER_PREFIX_TOKEN = 16


def is_square_faster(tokens: int, length: int) -> bool:
    """Whether causal attention of `tokens` behind a prefix of `length` is faster in the square form."""
    return length * _MIN_TOKENS_PER_PREFIX_TOKEN <= tokens


class CausalMask(Tensor):
    """The mask `[1, 1, tokens, length + tokens]` for tokens that see the whole prefix, earlier tokens and themselves.

    `scaled_dot_product_attention` has causal kernels that compute half of the scores and read no mask. They need the
    scores to be a square, and a prefix makes them wider than high. `length` rows of zeros above the queries make them
    a square again; the outputs of those rows are dropped. That is a share of `length / tokens` more work, in place of
    the mask and of twice the scores. All other functions receive the mask itself, element by element.
    (`torch.nn.attention.bias` has such a mask for CUDA kernels only.)

    In grouped-query attention transformers repeats keys and values for each query head if there is a mask. Autograd
    would keep the copies. Where the kernel accepts fewer key heads, it receives one of each group.

    Args:
        tokens: Number of input tokens.
        length: Prefix length in tokens.
        device: Device of the mask.
        groups: How many times in a row each key head is repeated.
    """

    length: int
    groups: int
    _plain: Tensor | None

    @staticmethod
    def __new__(cls, tokens: int, length: int, device: torch.device, groups: int = 1) -> CausalMask:
        """A tensor of the mask's shape that takes the memory of one element."""
        element = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        mask = element.expand(1, 1, tokens, length + tokens).as_subclass(cls)
        mask.length, mask.groups, mask._plain = length, groups, None
        return mask

    def plain(self) -> Tensor:
        """The mask as a plain bool tensor. It is computed once, since each layer asks for it."""
        if self._plain is None:
            with without_torch_function():
                whole = self.clone(memory_format=torch.contiguous_format)
                self._plain = whole.as_subclass(Tensor).tril_(self.length)
        return self._plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            with without_torch_function():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            output = cls._attend(*args, **kwargs)
            if output is not None:
                return output
        args, kwargs = tree_map(lambda each: each.plain() if isinstance(each, cls) else each, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *args: Any, is_causal: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """Attention without the mask; `None` if the call is of another kind."""
        tokens, length = query.shape[-2], key.shape[-2] - query.shape[-2]
        if not isinstance(attn_mask, CausalMask) or args or is_causal or length != attn_mask.length:
            return None
        square = is_square_faster(tokens, length)
        if square:
            query = F.pad(query, (0, 0, length, 0))
        if attn_mask.groups > 1 and key.shape[-3] == query.shape[-3]:
            one_key, one_value = (each.unflatten(-3, (-1, attn_mask.groups)).select(-3, 0) for each in (key, value))
            if _accepts_fewer_key_heads(query, one_key, one_value, square, kwargs.get("dropout_p", 0.0)):
                # Contiguous copies: autograd would keep a view's base, which has all heads.
                key, value, kwargs["enable_gqa"] = one_key.contiguous(), one_value.contiguous(), True
        if square:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **kwargs)[..., length:, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask.plain(), **kwargs)


def _accepts_fewer_key_heads(query: Tensor, key: Tensor, value: Tensor, square: bool, dropout: float) -> bool:
    """Whether a fused kernel accepts fewer key heads than query heads; without one, sdpa keeps all scores.

    The CPU kernel does. On CUDA only flash attention does, and it takes no mask.
    """
    if query.device.type == "cpu":
        return True
    if not square:
        return False
    cuda = torch.backends.cuda
    return cuda.can_use_flash_attention(cuda.SDPAParams(query, key, value, None, dropout, True, True))
