"""From virtual tokens to the keys and values of a layer (P-Tuning v2, https://arxiv.org/abs/2110.07602, section 3).

Plain tensors and modules: nothing here knows transformers or PEFT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
