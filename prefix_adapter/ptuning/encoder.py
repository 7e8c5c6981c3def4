"""The parameters of one adapter: a table of input embeddings, or the prompt encoder that computes one.

The encoder is that of Liu et al. 2021 (https://arxiv.org/abs/2103.10385, section 3.2). All are plain torch modules:
nothing here knows transformers or PEFT.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderType

_LSTM_LAYERS = 2


class PromptSizes(NamedTuple):
    """The sizes of an adapter's parameters.

    Attributes:
        length: Number of virtual tokens.
        size: Size of an input embedding of the model.
        kind: The encoder; `None` for a table.
        width: Size of each direction of the LSTM, or width of the MLP; not used for a table.
    """

    length: int
    size: int
    kind: EncoderType | None = None
    width: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name."""
        length, size, kind, width = self
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (length, size)}
        if kind is None:
            return shapes
        if kind == "LSTM":
            for layer in range(_LSTM_LAYERS):
                for end in ("", "_reverse"):
                    shapes[f"lstm.weight_ih_l{layer}{end}"] = (4 * width, 2 * width if layer else size)
                    shapes[f"lstm.weight_hh_l{layer}{end}"] = (4 * width, width)
                    shapes[f"lstm.bias_ih_l{layer}{end}"] = shapes[f"lstm.bias_hh_l{layer}{end}"] = (4 * width,)
        hidden = self.hidden
        return shapes | {
            "hidden.weight": (hidden, 2 * width if kind == "LSTM" else size),
            "hidden.bias": (hidden,),
            "output.weight": (size, hidden),
            "output.bias": (size,),
        }

    @property
    def hidden(self) -> int:
        """The size between the two linear layers."""
        return self.size if self.kind == "LSTM" else self.width


class PromptEncoder(NamedTuple):
    """The modules of an adapter. The embedding alone is a table.

    Attributes:
        embedding: Weight `[n, size]`.
        lstm: Bidirectional LSTM with two layers, `size` to twice its hidden size.
        hidden: Linear, to the size between the linear layers.
        output: Linear, to `size`.
    """

    embedding: nn.Embedding
    lstm: nn.LSTM | None = None
    hidden: nn.Linear | None = None
    output: nn.Linear | None = None

    @classmethod
    def new(cls, sizes: PromptSizes, dropout: float = 0.0) -> PromptEncoder:
        """Create the parameters, with torch's own initialisation, as in the reference implementation.

        Args:
            sizes: The sizes of the parameters.
            dropout: Dropout probability between the layers of the LSTM.
        """
        length, size, kind, width = sizes
        embedding, lstm = nn.Embedding(length, size), None
        if kind is None:
            return cls(embedding)
        if kind == "LSTM":
            lstm = nn.LSTM(size, width, _LSTM_LAYERS, dropout=dropout, bidirectional=True, batch_first=True)
        inner = size if lstm is None else 2 * width
        return cls(embedding, lstm, nn.Linear(inner, sizes.hidden), nn.Linear(sizes.hidden, size))

    def parameters(self) -> list[Tensor]:
        """The parameters."""
        return [parameter for module in self if module is not None for parameter in module.parameters()]

    @property
    def dropout(self) -> float:
        """The dropout probability that applies now: 0 in eval mode."""
        return self.lstm.dropout if self.lstm is not None and self.lstm.training else 0.0

    def encode(self) -> Tensor:
        """Compute the virtual tokens, `[n, size]`. An encoder runs on n rows, whatever the batch."""
        table = self.embedding.weight
        if self.hidden is None or self.output is None:
            return table
        # Without autocast: n rows take little time, and a folded table must have the same values.
        with torch.autocast(table.device.type, enabled=False):
            if self.lstm is not None:
                # cuDNN computes no gradients of an LSTM that is in eval mode.
                with nullcontext() if self.lstm.training else torch.backends.cudnn.flags(enabled=False):
                    table = self.lstm(table.unsqueeze(0))[0].squeeze(0)
            output: Tensor = self.output(F.relu(self.hidden(table)))
            return output

    @torch.no_grad()
    def folded(self) -> PromptEncoder:
        """The same adapter with the table in place of the encoder, in the precision of its parameters."""
        training = self.embedding.training
        if self.lstm is not None:
            self.lstm.eval()  # without dropout
        table = nn.Embedding.from_pretrained(self.encode().clone(), freeze=not self.embedding.weight.requires_grad)
        if self.lstm is not None:
            self.lstm.train(training)
        return PromptEncoder(table.train(training))
