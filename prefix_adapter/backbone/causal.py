"""Causal attention behind a prefix, by the kernel that knows the rule and needs no mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

# From how many tokens for each of the prefix's on causal attention is faster as a square than with a mask. Measured on
# one CPU thread: the same at 13, a third less time at 51.
_ROWS_FOR_A_MASK = 16


def without_mask(tokens: int, length: int) -> bool:
    """Whether attention of that many tokens behind a prefix of that length is faster as a square."""
    return length * _ROWS_FOR_A_MASK <= tokens


class CausalMask(Tensor):
    """The mask `[1, 1, tokens, length + tokens]` of tokens that see a prefix, themselves and what is between.

    `scaled_dot_product_attention` has kernels for causal attention that compute half of the scores and read no mask,
    but only from the upper left corner of a square, and a prefix makes it wider than high. With `length` rows of
    nothing above the queries it is a square again. Their outputs are dropped: a share of `length / tokens` more work,
    in place of a mask and of twice the scores. Everything else gets to see the mask itself, element by element.
    (`torch.nn.attention.bias` has a mask of the same kind for kernels of CUDA.)

    Where several heads of queries share one of keys, transformers leaves that to the kernel if there is no mask, and
    else repeats keys and values for each. Autograd would keep all of that: of repeated heads the kernel is given one,
    if it takes that.

    Args:
        tokens: of the input.
        length: of the prefix.
        device: where it is.
        groups: how many times in a row each head of keys and values is repeated, if they are.
    """

    length: int
    groups: int
    _plain: Tensor | None

    @staticmethod
    def __new__(cls, tokens: int, length: int, device: torch.device, groups: int = 1) -> CausalMask:
        """A tensor of that shape, and of a single element in memory."""
        element = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        mask = element.expand(1, 1, tokens, length + tokens).as_subclass(cls)
        mask.length, mask.groups, mask._plain = length, groups, None
        return mask

    def plain(self) -> Tensor:
        """The mask, element by element; the same for whoever asks again, which is each layer."""
        if self._plain is None:
            with torch._C.DisableTorchFunctionSubclass():
                whole = self.clone(memory_format=torch.contiguous_format)
                self._plain = whole.as_subclass(Tensor).tril_(self.length)
        return self._plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            with torch._C.DisableTorchFunctionSubclass():
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
        tokens, length = query.shape[-2], key.shape[-2] - query.shape[-2]
        if not isinstance(attn_mask, CausalMask) or args or is_causal or length != attn_mask.length:
            return None
        square = without_mask(tokens, length)
        if square:
            query = F.pad(query, (0, 0, length, 0))
        if attn_mask.groups > 1 and key.shape[-3] == query.shape[-3]:
            one_key, one_value = (each.unflatten(-3, (-1, attn_mask.groups)).select(-3, 0) for each in (key, value))
            if _shares_heads(query, one_key, one_value, square, kwargs.get("dropout_p", 0.0)):
                # Copies, or all would be kept for the one.
                key, value, kwargs["enable_gqa"] = one_key.contiguous(), one_value.contiguous(), True
        if square:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **kwargs)[..., length:, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask.plain(), **kwargs)


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, square: bool, dropout: float) -> bool:
    """Whether a kernel takes fewer heads of keys than of queries; without one, sdpa would keep all of the scores.

    On a CPU it does. On CUDA it is flash attention's, which takes no mask.
    """
    if query.device.type == "cpu":
        return True
    if not square:
        return False
    cuda = torch.backends.cuda
    return cuda.can_use_flash_attention(cuda.SDPAParams(query, key, value, None, dropout, True, True))
