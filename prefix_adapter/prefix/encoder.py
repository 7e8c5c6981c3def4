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
        frozen: Number of virtual tokens at the beginning of the table that are not trained; 0 for an MLP.
    """

    length: int
    columns: int
    hidden_size: int
    width: int | None = None
    rank: int = 0
    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()
    frozen: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, and of the frozen rows, by name."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.length - self.frozen, self.columns)}
        if self.frozen:
            shapes["frozen.weight"] = (self.frozen, self.columns)
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


class FrozenRows(nn.Module):
    """The rows of a table that are not trained.

    They are a buffer and no parameter: PEFT sets `requires_grad` of all parameters of an active adapter.

    Args:
        count: Number of rows.
        columns: Columns of the table.
    """

    weight: Tensor

    def __init__(self, count: int, columns: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(count, columns))


class PrefixEncoder(NamedTuple):
    """The modules of an adapter. The embedding alone is a table; with `hidden` and `output` it is an MLP.

    Attributes:
        embedding: Weight `[n, columns]` of a table, without its frozen rows; `[n, hidden_size]` of an MLP.
        hidden: Linear, `hidden_size` to `encoder_hidden_size`.
        output: Linear, `encoder_hidden_size` to `columns`.
        down: Weight `[rank, inputs]`, LoRA's matrices A of all linear layers side by side.
        up: Weight `[rank, outputs]`, LoRA's transposed matrices B of all linear layers side by side.
        frozen: Weight `[frozen, columns]`, the first rows of a table, if they are not trained.
    """

    embedding: nn.Embedding
    hidden: nn.Linear | None = None
    output: nn.Linear | None = None
    down: nn.Embedding | None = None
    up: nn.Embedding | None = None
    frozen: FrozenRows | None = None

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
        length, columns, hidden_size, width, rank, inputs, outputs, frozen = sizes
        if width is None:
            encoder = cls(
                nn.Embedding(length - frozen, columns), frozen=FrozenRows(frozen, columns) if frozen else None
            )
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
        """The parameters, without frozen rows."""
        return [parameter for module in self if module is not None for parameter in module.parameters()]

    def tensors(self) -> list[Tensor]:
        """The parameters and the frozen rows."""
        return self.parameters() if self.frozen is None else [*self.parameters(), self.frozen.weight]

    @property
    def num_frozen(self) -> int:
        """The number of rows of the table that are not trained."""
        return 0 if self.frozen is None else len(self.frozen.weight)

    @property
    def is_plain(self) -> bool:
        """Whether the prefix is one parameter, so that its keys and values are views of it."""
        return self.output is None and self.frozen is None

    def encode(self, columns: slice) -> Tensor:
        """Compute some columns of the prefix, `[n, len(columns)]`.

        An MLP runs on n rows, whatever the batch. Its last matrix is only multiplied for the given columns.
        """
        table = self.embedding.weight
        if self.hidden is None or self.output is None:
            if self.frozen is None:
                return table[:, columns]
            return torch.cat([self.frozen.weight[:, columns], table[:, columns]])
        # Without autocast: n rows take little time, and a folded table must have the same values.
        with torch.autocast(table.device.type, enabled=False):
            hidden = torch.tanh(self.hidden(table))
            return F.linear(hidden, self.output.weight[columns], self.output.bias[columns])

    @torch.no_grad()
    def fold(self) -> Tensor:
        """The table `[n, columns]` that the encoder computes, in the precision of its parameters."""
        return self.encode(slice(None)).clone()

    @torch.no_grad()
    def set_table(self, table: Tensor) -> None:
        """Write a table `[n, columns]` into an encoder that is a table, its frozen rows included."""
        if self.frozen is not None:
            self.frozen.weight.copy_(table[: self.num_frozen])
        self.embedding.weight.copy_(table[self.num_frozen :])

    def folded(self, frozen: int = 0) -> PrefixEncoder:
        """The same adapter as a table, of which the first `frozen` rows are not trained."""
        table = self.fold()
        rows = nn.Embedding.from_pretrained(table[frozen:].clone(), freeze=not self.embedding.weight.requires_grad)
        fixed = None
        if frozen:
            fixed = FrozenRows(frozen, table.shape[1]).to(table.device, table.dtype)
            fixed.weight.copy_(table[:frozen])
        return self._replace(embedding=rows.train(self.embedding.training), hidden=None, output=None, frozen=fixed)
