"""From virtual tokens to the keys and values of a layer (P-Tuning v2, https://arxiv.org/abs/2110.07602, section 3).

Plain tensors and modules: nothing here knows transformers or PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The modules of an encoder: "embedding" alone for a table, all three for an MLP.
MODULE_NAMES = ("embedding", "hidden", "output")


@dataclass(frozen=True)
class KeyValueShape:
    """Heads and head size of the keys and of the values that one attention layer caches; they may differ (MLA)."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def key_columns(self) -> int:
        return self.key_heads * self.key_size

    @property
    def columns(self) -> int:
        return self.key_columns + self.value_heads * self.value_size

    def split(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, n, columns]` to keys `[batch, key_heads, n, key_size]` and values, likewise; no copies."""
        keys, values = prefix[..., : self.key_columns], prefix[..., self.key_columns :]
        keys = keys.unflatten(-1, (self.key_heads, self.key_size))
        values = values.unflatten(-1, (self.value_heads, self.value_size))
        return keys.transpose(1, 2), values.transpose(1, 2)


def build(
    num_virtual_tokens: int, columns: int, std: float, hidden_size: int, encoder_hidden_size: int | None
) -> dict[str, nn.Module]:
    """New modules of an encoder: a table of `[num_virtual_tokens, columns]`, or an MLP if `encoder_hidden_size` is set.

    Weights are drawn from N(0, std^2) and biases are zero, as the reference implementation starts.
    """
    if encoder_hidden_size is None:
        modules: dict[str, nn.Module] = {"embedding": nn.Embedding(num_virtual_tokens, columns)}
    else:
        modules = {
            "embedding": nn.Embedding(num_virtual_tokens, hidden_size),
            "hidden": nn.Linear(hidden_size, encoder_hidden_size),
            "output": nn.Linear(encoder_hidden_size, columns),
        }
    for module in modules.values():
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return modules


def encode(modules: Mapping[str, nn.Module], columns: slice) -> Tensor:
    """The prefix's given columns, `[n, len(columns)]`: those of the table, or of the MLP's last matrix.

    The MLP's cost is that of n rows whatever the batch, and a layer pays for its own columns only.
    """
    table = modules["embedding"].weight
    if "output" not in modules:
        return table[:, columns]
    output = modules["output"]
    # In the parameters' own precision: for n rows there is nothing to save, and a folded table is to be the same.
    with torch.autocast(table.device.type, enabled=False):
        hidden = torch.tanh(modules["hidden"](table))
        return F.linear(hidden, output.weight[columns], output.bias[columns])


@torch.no_grad()
def fold(modules: Mapping[str, nn.Module]) -> Tensor:
    """The table `[n, columns]` that an encoder computes, detached, in the encoder's precision."""
    return encode(modules, slice(None)).clone()
