"""The parameters of one adapter: a table or an MLP that computes keys and values (P-Tuning v2, section 3).

Beside it there may be low-rank matrices (LoRA) that change the outputs of the attention's linear layers. All are plain
torch modules (Liu et al. 2022, https://arxiv.org/abs/2110.07602): nothing here knows transformers or PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A good learning rate for a table is about this many times as large as one for low-rank matrices (docs/learning.md).
# The matrices are multiplied by 1 / _RATE_RATIO in use and start larger by this factor, so that one rate suits both:
# Adam's steps are then smaller by the factor, and nothing else changes.
_RATE_RATIO = 16
# `lora_alpha / r` of PEFT's LoRA, at the usual `lora_alpha = 2 * r`.
_LORA_SCALE = 2.0
LOW_RANK_SCALE = _LORA_SCALE / _RATE_RATIO**2


class EncoderSizes(NamedTuple):
    """The sizes of an adapter's parameters.

    Attributes:
        length: Number of virtual tokens.
        columns: Columns of the table.
        hidden_size: Width of an MLP's embedding.
        width: Width of an MLP's hidden layer; `None` for a table.
        rank: Rank of the low-rank matrices; 0 for none.
        inputs: The input sizes of the linear layers that they change.
        outputs: The output sizes of those.
    """

    length: int
    columns: int
    hidden_size: int
    width: int | None = None
    rank: int = 0
    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.length, self.columns)}
        if self.width is not None:
            shapes = {
                "embedding.weight": (self.length, self.hidden_size),
                "hidden.weight": (self.width, self.hidden_size),
                "hidden.bias": (self.width,),
                "output.weight": (self.columns, self.width),
                "output.bias": (self.columns,),
            }
        if self.rank:
            shapes |= {"down.weight": (self.rank, sum(self.inputs)), "up.weight": (self.rank, sum(self.outputs))}
        return shapes


class PrefixEncoder(NamedTuple):
    """The modules of an adapter. The embedding alone is a table; with `hidden` and `output` it is an MLP.

    Attributes:
        embedding: Weight `[n, columns]` of a table, `[n, hidden_size]` of an MLP.
        hidden: Linear, `hidden_size` to `encoder_hidden_size`.
        output: Linear, `encoder_hidden_size` to `columns`.
        down: Weight `[rank, inputs]`, LoRA's matrices A of all linear layers side by side.
        up: Weight `[rank, outputs]`, LoRA's transposed matrices B of all linear layers side by side.
    """

    embedding: nn.Embedding
    hidden: nn.Linear | None = None
    output: nn.Linear | None = None
    down: nn.Embedding | None = None
    up: nn.Embedding | None = None

    @classmethod
    def new(cls, sizes: EncoderSizes, std: float) -> PrefixEncoder:
        """Create the parameters of an adapter.

        Weights of the table or the MLP are drawn from N(0, std^2) and biases are zero, as in the reference
        implementation. Low-rank matrices start as in LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685), so that
        they change nothing before the first step.

        Args:
            sizes: The sizes of the parameters.
            std: Standard deviation of the weights.
        """
        length, columns, hidden_size, width, rank, inputs, outputs = sizes
        if width is None:
            encoder = cls(nn.Embedding(length, columns))
        else:
            encoder = cls(nn.Embedding(length, hidden_size), nn.Linear(hidden_size, width), nn.Linear(width, columns))
        for module in encoder:
            if module is not None:
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if not rank:
            return encoder
        encoder = encoder._replace(down=nn.Embedding(rank, sum(inputs)), up=nn.Embedding(rank, sum(outputs)))
        assert encoder.down is not None and encoder.up is not None
        nn.init.zeros_(encoder.up.weight)
        for size, part in zip(inputs, encoder.down.weight.detach().split(list(inputs), 1), strict=True):
            nn.init.uniform_(part, -_RATE_RATIO / math.sqrt(size), _RATE_RATIO / math.sqrt(size))
        return encoder

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of `EncoderSizes.shapes`."""
        return [parameter for module in self if module is not None for parameter in module.parameters()]

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

    def folded(self) -> PrefixEncoder:
        """The same adapter with the table in place of the MLP."""
        table = nn.Embedding.from_pretrained(self.fold(), freeze=not self.embedding.weight.requires_grad)
        return self._replace(embedding=table.train(self.embedding.training), hidden=None, output=None)
