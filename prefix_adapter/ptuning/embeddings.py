"""The modules of a model that look up the embeddings of token ids."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


class InputEmbeddings:
    """The input embeddings of a model, and other tables with a row for each token id.

    Attributes:
        parts: The transformers models in the model, itself among them.

    Args:
        model: A transformers model.

    Raises:
        ValueError: If it has no table of input embeddings.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        # Encoders and decoders may have input embeddings of their own, which are tied to those of the model.
        self.parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        table = None if _get_input_embeddings(model) is None else self.table
        if not isinstance(table, nn.Embedding):
            what = "no input embeddings" if table is None else f"input embeddings of the kind {type(table).__name__}"
            raise ValueError(
                f"{type(model).__name__} has {what}. Virtual tokens stand in the place of words, so the model must "
                "have a table of input embeddings (`nn.Embedding`). See `PrefixTuningV2Config` for images and audio."
            )

    @property
    def main(self) -> nn.Module:
        """The module that looks up the input embeddings of the model: the table, or a wrapper of PEFT around it."""
        module = _get_input_embeddings(self._model)
        assert module is not None
        return module

    @property
    def table(self) -> nn.Embedding:
        """The table of the input embeddings."""
        table: Any = unwrap(self.main)
        return table

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self.table.num_embeddings

    @property
    def size(self) -> int:
        """The size of an embedding."""
        return self.table.embedding_dim

    def are_looked_up_whole(self) -> bool:
        """Whether the `forward` of the main module receives all token ids and returns whole embeddings.

        Under tensor parallelism, hooks on the module may divide the ids before it and add the embeddings after it.
        """
        module, seen = self.main, []
        own, on_instance = module.forward, "forward" in vars(module)

        def record(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            seen.append((args[0], output))
            return output

        ids = torch.arange(self.vocabulary - 1, -1, -1, device=self.table.weight.device)[None, :4096]
        try:
            module.forward = record
            with torch.no_grad():
                output = module(ids)
        finally:
            if on_instance:
                module.forward = own
            else:
                del module.forward
        (inner_ids, inner), *_ = seen
        pairs = ((inner_ids, ids), (inner, output))
        return all(type(found) is Tensor and torch.equal(found, whole) for found, whole in pairs)

    def find(self) -> list[nn.Module]:
        """The modules that look up input embeddings now. Other methods of PEFT replace them by wrappers."""
        found, shape = [self.main], self.table.weight.shape
        for part in self.parts:
            module = _get_input_embeddings(part)
            if module is None or any(module is other for other in found):
                continue
            table = unwrap(module)
            if isinstance(table, nn.Embedding) and table.weight.shape == shape:
                found.append(module)
        return found

    def find_other_tables(self) -> list[nn.Embedding]:
        """Other tables that may be asked for the row of a token id, such as the embeddings per layer of Gemma 3n.

        They are recognised by their size: at least half as many rows as the input embeddings.
        """
        inner = {id(part) for module in self.find() for part in module.modules()}
        tables = [module for module in self._model.modules() if isinstance(module, nn.Embedding)]
        return [each for each in tables if id(each) not in inner and 2 * each.num_embeddings >= self.vocabulary]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of PEFT's wrappers."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        module = inner
    return module


def _get_input_embeddings(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
