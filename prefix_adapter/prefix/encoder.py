"""From virtual tokens to the keys and values of a layer (P-Tuning v2, https://arxiv.org/abs/2110.07602, section 3).

Plain tensors and modules: nothing here knows transformers or PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keys and values.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KeyValueShape:
    """Heads and head size of the keys and of the values that one attention layer caches; they may differ (MLA).

    No value heads means that the keys serve as values too.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def key_columns(self) -> int:
        """Numbers in the key of one token; those of the value follow."""
        return self.key_heads * self.key_size

    @property
    def columns(self) -> int:
        """Numbers in the key and the value of one token."""
        return self.key_columns + self.value_heads * self.value_size

    def split(self, prefix: Tensor) -> Pair:
        """`[batch, n, columns]` to keys `[batch, key_heads, n, key_size]` and values, likewise; no copies."""
        # Not two slices: the gradient of each would be as large as both.
        keys, values = prefix.split([self.key_columns, self.columns - self.key_columns], dim=-1)
        keys = keys.unflatten(-1, (self.key_heads, self.key_size)).transpose(1, 2)
        if not self.value_heads:
            return keys, keys
        return keys, values.unflatten(-1, (self.value_heads, self.value_size)).transpose(1, 2)


def split_layers(prefix: Tensor, shapes: list[KeyValueShape]) -> list[Pair]:
    """`[n, columns]` of several layers to the keys and values of each, as `KeyValueShape.split` has them for one.

    Of layers that are alike in a few operations for all, in the backward pass too.
    """
    shape = shapes[0]
    if any(s != shape for s in shapes) or (shape.key_heads, shape.key_size) != (shape.value_heads, shape.value_size):
        parts = prefix.unsqueeze(0).split([s.columns for s in shapes], dim=-1)
        return [s.split(part) for s, part in zip(shapes, parts, strict=True)]
    sides = prefix.unflatten(-1, (1, 2 * len(shapes), shape.key_heads, shape.key_size)).permute(2, 1, 3, 0, 4).unbind()
    return list(zip(sides[::2], sides[1::2], strict=True))


def prepend(prefix: Pair, keys: Tensor, values: Tensor, past: Pair | None = None) -> Pair:
    """Put a prefix `[1 or batch, heads, n, size]` in front of keys and values `[batch, heads, length, size]`.

    Those of the `past` come between the two. A prefix that serves as both gives one tensor that does.
    """
    joined = _join(prefix[0], None if past is None else past[0], keys)
    if prefix[0] is prefix[1]:
        return joined, joined
    return joined, _join(prefix[1], None if past is None else past[1], values)


def _join(prefix: Tensor, past: Tensor | None, states: Tensor) -> Tensor:
    # In decoding each layer does this for every token, so it asks first what need not be done.
    if prefix.dtype != states.dtype or prefix.device != states.device:
        prefix = prefix.to(states.device, states.dtype)
    if prefix.shape[0] != states.shape[0]:
        prefix = prefix.expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states] if past is None else [prefix, past, states], 2)


class PrefixEncoder(NamedTuple):
    """The modules of an encoder: the embedding alone is a table, all three are an MLP.

    Attributes:
        embedding: weight `[n, columns]` of a table, `[n, hidden_size]` of an MLP.
        hidden: `hidden_size` to `encoder_hidden_size`.
        output: `encoder_hidden_size` to `columns`.
    """

    embedding: nn.Embedding
    hidden: nn.Linear | None = None
    output: nn.Linear | None = None

    @staticmethod
    def shapes(length: int, columns: int, hidden_size: int, width: int | None) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters by name, for the arguments of `new`."""
        if width is None:
            return {"embedding.weight": (length, columns)}
        return {
            "embedding.weight": (length, hidden_size),
            "hidden.weight": (width, hidden_size),
            "hidden.bias": (width,),
            "output.weight": (columns, width),
            "output.bias": (columns,),
        }

    @classmethod
    def new(cls, length: int, columns: int, std: float, hidden_size: int, width: int | None) -> PrefixEncoder:
        """A table of `[length, columns]`, or an MLP if it has a `width`.

        Weights are drawn from N(0, std^2) and biases are zero, as the reference implementation starts.
        """
        if width is None:
            encoder = cls(nn.Embedding(length, columns))
        else:
            encoder = cls(nn.Embedding(length, hidden_size), nn.Linear(hidden_size, width), nn.Linear(width, columns))
        for module in encoder:
            if module is not None:
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return encoder

    def parameters(self) -> list[Tensor]:
        """Its parameters."""
        if self.hidden is None or self.output is None:
            return [self.embedding.weight]
        return [p for module in (self.embedding, self.hidden, self.output) for p in module.parameters()]

    def encode(self, columns: slice) -> Tensor:
        """The prefix's given columns, `[n, len(columns)]`: those of the table, or of the MLP's last matrix.

        The MLP's cost is that of n rows whatever the batch, and a layer pays for its own columns only.
        """
        table = self.embedding.weight
        if self.hidden is None or self.output is None:
            return table[:, columns]
        # In the parameters' own precision: for n rows there is nothing to save, and a folded table is to be the same.
        with torch.autocast(table.device.type, enabled=False):
            hidden = torch.tanh(self.hidden(table))
            return F.linear(hidden, self.output.weight[columns], self.output.bias[columns])

    @torch.no_grad()
    def fold(self) -> Tensor:
        """The table `[n, columns]` that the encoder computes, in its parameters' precision."""
        return self.encode(slice(None)).clone()
