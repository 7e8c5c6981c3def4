"""The layer that holds the virtual tokens of all adapters of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations

import torch
from torch import Tensor, nn

from ..backbone.parallel import find_tensor_parallelism
from ..files.check import check_size
from ..files.contents import TensorSpec
from ..private import get_writes
from ..tuner.layer import AdapterLayer
from ..tuner.running import Row
from .config import PTuningConfig
from .embeddings import InputEmbeddings
from .encoder import PromptEncoder, PromptSizes
from .hooks import PlaceholderHooks
from .names import LAYER_NAME, PREFIX
from .places import Placeholders

# The number of words whose embeddings tell the standard deviation of all.
_SAMPLED_WORDS = 1000


class PTuningLayer(AdapterLayer[Placeholders]):
    """The virtual tokens of all adapters of a model.

    It is never called: hooks (hooks.py) put the virtual tokens into what the embedding modules return.

    Args:
        model: The transformers model.

    Raises:
        ValueError: If it has no table of input embeddings, or if tensor parallelism divides the table in hooks.

    Example:
        ```python
        layer = get_peft_model(model, PTuningConfig()).base_model.layer
        layer.get_vectors("default")  # the virtual tokens, [9, size]
        ```
    """

    noun, layer_name, prefix, config_class = "P-Tuning", LAYER_NAME, PREFIX, PTuningConfig
    adapter_layer_names = tuple(PREFIX + name for name in PromptEncoder._fields)

    def __init__(self, model: nn.Module):
        self._parallelism = find_tensor_parallelism(model)
        embeddings = InputEmbeddings(model)
        if self._parallelism is not None and not embeddings.are_looked_up_whole():
            raise ValueError(
                "P-Tuning does not work here: tensor parallelism divides the word embeddings of "
                f"{type(model).__name__} in hooks on {type(embeddings.main).__name__}, where virtual tokens have no "
                "place. Use transformers' `tp_plan` (5.24 or later), or a prefix (`PrefixTuningV2Config`)."
            )
        super().__init__(model)
        self._embeddings = embeddings
        # The vectors of adapters that are not trained, with the state of the parameters they were computed from.
        self._cache: dict[str, tuple[list[tuple[int, int]], Tensor]] = {}
        self._hooks = PlaceholderHooks(
            model, embeddings, self._adapters, self.get_vectors, self._calls, self.get_rows, self.begin_forward
        )

    @property
    def model(self) -> nn.Module:
        """The model that has the virtual tokens."""
        return self._hooks.model

    @property
    def hooks(self) -> PlaceholderHooks:
        """The hooks on the model."""
        return self._hooks

    @property
    def home(self) -> Sequence[nn.Module]:
        """The table of the input embeddings."""
        return [self._embeddings.table]

    def encoder_of(self, adapter_name: str) -> PromptEncoder:
        """The modules that compute an adapter's virtual tokens."""
        return PromptEncoder(*self.modules_of(adapter_name))

    def dropout_of(self, adapter_name: str) -> float:
        """The dropout probability that applies to an adapter now: 0 in eval mode."""
        return self.encoder_of(adapter_name).dropout

    def placeholders_of(self, adapter_name: str) -> tuple[int, ...]:
        """The token ids of an adapter's virtual tokens, one for each of them, or a single one for all."""
        return self._adapters[adapter_name].ids

    def get_vectors(self, adapter_name: str) -> Tensor:
        """The virtual tokens of an adapter, `[n, size]`. Those of an encoder that is not trained are cached.

        Under tensor parallelism each process has their whole gradient; the mean over the processes is free of
        differences in rounding.
        """
        encoder = self.encoder_of(adapter_name)
        parameters = encoder.parameters()
        if (
            not encoder.output
            or any(parameter.requires_grad for parameter in parameters)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or encoder.dropout
        ):
            vectors = encoder.encode()
            parallelism = self._parallelism
            return vectors if parallelism is None else parallelism.add_gradients(vectors, parallelism.size)
        written, cached = get_writes(parameters), self._cache.get(adapter_name)
        if cached is None or cached[0] != written:
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cache[adapter_name] = written, encoder.encode()
        return cached[1]

    def update_layer(self, adapter_name: str, config: PTuningConfig, on_meta: bool = False) -> None:
        """Add the parameters of a new adapter, on the device of the input embeddings.

        Args:
            adapter_name: Its name.
            config: Its config.
            on_meta: Whether to create the parameters on the meta device, to be loaded later.

        Raises:
            ValueError: If the config names words that the model does not have, or asks for an absurd size, or if its
                file does not fit. Nothing is changed then.
        """
        size, kind, table = self._embeddings.size, config.encoder_reparameterization_type, self._embeddings.table
        unknown = [each for each in config.init_token_ids or () if (each or 0) >= self._embeddings.vocabulary]
        if unknown:
            raise ValueError(
                f"`init_token_ids` has the ids {unknown[:20]}, and {type(self.model).__name__} has "
                f"{self._embeddings.vocabulary} words."
            )
        width = config.encoder_hidden_size or (max(1, size // 2) if kind == "LSTM" else size)
        sizes = PromptSizes(config.num_virtual_tokens, size, kind, width if kind else 0)
        check_size(self.model, sizes.shapes.values())
        specs = {name: TensorSpec(shape, table.weight.dtype) for name, shape in sizes.shapes.items()}
        embeddings = self._check_file(adapter_name, config, specs)
        with torch.device("meta") if on_meta else nullcontext():
            encoder = PromptEncoder.new(sizes, config.encoder_dropout)
        if not on_meta and config.source is None:
            self._draw_start(encoder, config)
        ids = config.find_placeholders(self._embeddings.vocabulary)
        config.note_base_labels(self._labels.own)
        info = Placeholders(ids, config.num_virtual_tokens)
        self._add(adapter_name, config, info, encoder, table, table.weight.dtype, embeddings)
        if self._parallelism is not None and config.source is None and not on_meta:
            # Each process has drawn numbers of its own.
            self._parallelism.broadcast(self.parameters_of(adapter_name))

    @torch.no_grad()
    def _draw_start(self, encoder: PromptEncoder, config: PTuningConfig) -> None:
        """Let the embedding of a new adapter start from real words, or from random numbers."""
        weight, words = encoder.embedding.weight, config.init_token_ids or [None]
        if config.init_std is not None:
            nn.init.normal_(weight, std=config.init_std)
        elif not config.has_encoder:
            count = self._embeddings.vocabulary
            sample = torch.linspace(0, count - 1, min(count, _SAMPLED_WORDS)).long()
            nn.init.normal_(weight, std=self._embed(sample).std().item() or 1.0)
        starts = {row: word for row in range(len(weight)) if (word := words[row % len(words)]) is not None}
        if starts:
            weight[list(starts)] = self._embed(torch.tensor(list(starts.values()))).to(weight)

    def _embed(self, ids: Tensor) -> Tensor:
        """The input embeddings of real words `[n]`, as the model has them without an adapter."""
        main = self._embeddings.main
        device = next((each.device for each in main.parameters() if not each.is_meta), None)
        with self.run(self.new_call(["__base__"])):
            output: Tensor = main(ids.to(device).unsqueeze(0))
        return output[0].float()

    def fold(self, adapter_name: str) -> None:
        """Replace an adapter's encoder by the table that it computes."""
        self._replace_modules(adapter_name, self.encoder_of(adapter_name).folded())
        self._cache.pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, PEFT chooses another one.

        Raises:
            RuntimeError: If a call that is still running uses the adapter.
        """
        super().delete_adapter(adapter_name)
        self._cache.pop(adapter_name, None)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model, and give its config the base model's own label names."""
        self._hooks.remove()
        super().remove_hooks()

    def begin_forward(self) -> list[Row]:
        """Prepare the layer for a forward, and return the adapters of each row.

        Raises:
            ValueError: If two adapters of a row have a placeholder in common, or an adapter of another method was
                added under the name of one of these.
        """
        rows = super().begin_forward()
        for row in rows:
            for one, other in combinations([active.adapter for active in row], 2):
                if common := {*self._adapters[one].ids} & {*self._adapters[other].ids}:
                    raise ValueError(
                        f"The adapters {one!r} and {other!r} are both active, and both have the placeholder "
                        f"{min(common)}. Give one of them other `placeholder_token_ids`, or activate one at a time."
                    )
        return rows
