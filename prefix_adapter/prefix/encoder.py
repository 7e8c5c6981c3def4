"""The parameters of one adapter: a table or an MLP that computes keys and values (P-Tuning v2, section 3).

Plain torch modules (Liu et al. 2022, https://arxiv.org/abs/2110.07602): nothing here knows transformers or PEFT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixEncoder(NamedTuple):
    """The modules of an adapter's prefix. The embedding alone is a table; all three are an MLP.

    Attributes:
        embedding: Weight `[n, columns]` of a table, `[n, hidden_size]` of an MLP.
        hidden: Linear, `hidden_size` to `encoder_hidden_size`.
        output: Linear, `encoder_hidden_size` to `columns`.
    """

    embedding: nn.Embedding
    hidden: nn.Linear | None = None
    output: nn.Linear | None = None

    @staticmethod
    def shapes(length: int, columns: int, hidden_size: int, width: int | None) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name, for the arguments of `new`."""
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
        """Create a table, or an MLP if `width` is not `None`.

        Weights are drawn from N(0, std^2) and biases are zero, as in the reference implementation.

        Args:
            length: Number of virtual tokens.
            columns: Columns of the table.
            std: Standard deviation of the weights.
            hidden_size: Width of an MLP's embedding.
            width: Width of an MLP's hidden layer.
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
        """The parameters, in the order of `shapes`."""
        if self.hidden is None or self.output is None:
            return [self.embedding.weight]
        return [p for module in (self.embedding, self.hidden, self.output) for p in module.parameters()]

    def encode(self, columns: slice) -> Tensor:
        """Compute some columns of the prefix, `[n, len(columns)]`.

        An MLP runs on n rows, whatever the batch. Its last matrix is only multiplied for the given columns.
        """
        table = self.embedding.weight
        if self.hidden is None or self.output is None:
            return table[:, columns]
        # Without autocast: n rows take little time, and a folded table must have the same values.
        with torch.autocast(table.device.type, enabled=False):
            hidden = torch.tanh(self.hidden(table))
            return F.linear(hidden, self.output.weight[columns], self.output.bias[columns])

    @torch.no_grad()
    def fold(self) -> Tensor:
        """The table `[n, columns]` that the encoder computes, in the precision of its parameters."""
        return self.encode(slice(None)).clone()
