"""Many adapters on one frozen base model: loaded when they are asked for, mixed in a batch, dropped when unused."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn

from ..config import PrefixTuningV2Config
from ..files.check import SAVED, check_embeddings, check_size
from ..files.source import Source, open_weights
from ..model import PrefixTuningV2Model
from ..prefix.names import LAYER_NAME, PREFIX
from .saved import load_config


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that is in memory.

    Attributes:
        name: what it is called in the model.
        num_bytes: of its prefix and head in memory.
        num_labels: outputs of its task head; `None` without one.
        task_type: PEFT's, as its config says.
    """

    name: str
    num_bytes: int
    num_labels: int | None
    task_type: str | None


class AdapterPool:
    """Adapters of one frozen base model, for inference from any number of threads.

    An adapter is called by its folder, or by its name on the Hub, and is loaded when a batch first asks for it. Each
    row of a batch names its own; a batch is computed in one forward pass whatever adapters it mixes. When the adapters
    in memory have more than `max_bytes`, those that were not asked for the longest time are dropped. MLPs are folded.

    Adapters may differ in all that a config says, and in the number of labels of their heads: in a batch of
    several, logits that a row's own head does not have are `-inf`.

    Calls take turns: a model computes one batch at a time, and loading waits for it. Hub downloads do not.

    Args:
        model: the base model, with the task head that the adapters are for. It is wrapped in place, and is to be used
            through the pool alone.
        max_bytes: of the prefixes and heads in memory; no bound if `None`. While an adapter is loaded it may be in
            memory besides.
        max_virtual_tokens: the longest prefix that is loaded; no bound if `None`. A row pays for each virtual token
            at every token that it reads or writes, and so do the other rows of its batch.
        max_labels: the largest task head that is loaded; no bound if `None`. The logits of all rows of a batch get as
            many columns as its largest head has.

    Raises:
        ValueError: if one of the bounds is not a positive integer.

    Example:
        ```python
        pool = AdapterPool(AutoModelForSequenceClassification.from_pretrained(name), max_bytes=2**30)
        logits = pool(["adapters/nli", "user/topics", None], **batch).logits  # None: the base model itself
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        max_bytes: int | None = None,
        max_virtual_tokens: int | None = 1024,
        max_labels: int | None = 10_000,
    ):
        bounds = {"max_bytes": max_bytes, "max_virtual_tokens": max_virtual_tokens, "max_labels": max_labels}
        for name, bound in bounds.items():
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound <= 0):
                raise ValueError(f"`{name}` must be a positive integer, or None for no bound; got {bound!r}.")
        self.model, self.max_bytes = model.eval(), max_bytes
        self.max_virtual_tokens, self.max_labels = max_virtual_tokens, max_labels
        self._peft_model: PeftModel | None = None
        # The one that was asked for last is the last.
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._count = 0
        # Layers of the base model's heads that are replaced while an adapter is loaded, by their paths.
        self._heads: dict[str, nn.Linear] = {}
        # Of the model, its adapters and the above: taken for every look at them and every batch.
        self._lock = threading.RLock()

    # ---- Adapters

    @property
    def loaded(self) -> dict[str, LoadedAdapter]:
        """The adapters in memory, by what they are called; the one that would be dropped first is first."""
        with self._lock:
            return dict(self._loaded)

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters in memory."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._loaded.values())

    def load(self, adapter: str | os.PathLike[str]) -> LoadedAdapter:
        """Have an adapter in memory, ahead of the first batch that asks for it.

        Args:
            adapter: its folder, or its name on the Hub.

        Raises:
            ValueError: if it is damaged or of another method, does not fit the base model or the task of the other
                adapters, or has more than `max_bytes`, `max_virtual_tokens` or `max_labels`; the pool is what it was.
            FileNotFoundError: if there is none.
            OSError: if the Hub cannot be reached.
        """
        key = str(adapter)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key]
        folder = _folder_of(key)  # a download, if it is one, does not hold up other batches
        with self._lock:
            return self._load(key, folder)

    def remove(self, adapter: str | os.PathLike[str]) -> None:
        """Drop an adapter; asked for again, it is read again.

        Raises:
            KeyError: if it is not in memory.
        """
        with self._lock:
            del self._loaded[str(adapter)]
            self._sweep()

    def _sweep(self) -> None:
        """Take every adapter out of the model that is not among those in memory, and put its own heads back.

        After an error or an interruption the model may have such adapters, whatever was under way.
        """
        layer: Any = getattr(self.model, LAYER_NAME, None)
        names = [adapter.name for adapter in self._loaded.values()]
        found = [] if layer is None else layer.adapter_names
        if set(found) == set(names) and not self._heads and (layer is not None) == bool(names):
            return
        _put_back(self.model, self._heads)
        for name in set(found) - set(names):
            layer.drop_adapter(name)
        if names:
            # PEFT keeps no tuner without an active adapter.
            self._peft().set_adapter(names[0], inference_mode=True)
            return
        self._peft_model = None
        if hasattr(self.model, LAYER_NAME):
            layer.detach()

    def _load(self, key: str, folder: Path | None) -> LoadedAdapter:
        self._sweep()
        if key not in self._loaded:
            try:
                found = self._loaded[key] = self._insert(folder or _folder_of(key))
                self._check_bound(key, "bytes", found.num_bytes, "max_bytes")
            except BaseException:
                self._loaded.pop(key, None)
                self._sweep()
                raise
            for other in [each for each in self._loaded if each != key]:
                if self.max_bytes is None or self.num_bytes <= self.max_bytes:
                    break
                self.remove(other)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _insert(self, folder: Path) -> LoadedAdapter:
        config = load_config(folder, PrefixTuningV2Config)
        others = {adapter.task_type for adapter in self._loaded.values()}
        task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
        if others - {task}:
            raise ValueError(
                f"{folder} is an adapter for {task}, and those in the pool are for {others.pop()}: one model has one "
                "kind of head. Use a pool for each."
            )
        self._check_bound(folder, "virtual tokens", config.num_virtual_tokens, "max_virtual_tokens")
        weights = Source.of(folder).weights()
        with open_weights(weights) as file:
            found = {
                key.removeprefix(SAVED): tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118 (a handle, not a mapping)
            }
        check_size(self.model, found.values())
        shapes = {key: shape for key, shape in found.items() if f".{PREFIX}" not in key}
        self._check_bound(folder, "bytes", _least_bytes(self.model, found), "max_bytes")
        labels = [shape[0] for path, shape in _labels(self.model, shapes)]
        self._check_bound(folder, "labels", max(labels, default=0), "max_labels")
        check_embeddings(weights, self.model, config.modules_to_save or (), "all adapters of the pool")
        name = f"adapter{self._count}"
        self._count += 1
        device = next((str(parameter.device) for parameter in self.model.parameters()), "cpu")
        num_labels = _fit_heads(self.model, shapes, self._heads)
        try:
            if self._peft_model is None:
                self._peft_model = PeftModel.from_pretrained(self.model, str(folder), name, torch_device=device)
            else:
                self._peft_model.load_adapter(str(folder), name, torch_device=device)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        _put_back(self.model, self._heads)
        if config.prefix_projection:
            self._tuner.fold_adapter(name)
        self._peft_model.eval()
        sizes = [p.numel() * p.element_size() for key, p in self.model.named_parameters() if f".{name}." in key]
        return LoadedAdapter(name, sum(sizes), num_labels, task)

    def _check_bound(self, adapter: Any, what: str, number: int, bound: str) -> None:
        limit = getattr(self, bound)
        if limit is not None and number > limit:
            raise ValueError(f"{adapter} has {number:,} {what}; `{bound}` of the pool is {limit:,}.")

    def _peft(self) -> PeftModel:
        assert self._peft_model is not None
        return self._peft_model

    @property
    def _tuner(self) -> PrefixTuningV2Model:
        tuner: Any = self._peft().base_model
        return tuner

    # ---- Batches

    def __call__(self, adapters: Sequence[str | os.PathLike[str] | None], **inputs: Any) -> Any:
        """The model's output for a batch in which each row has an adapter of its own.

        Args:
            adapters: for each row an adapter's folder or name on the Hub, or `None` for the base model.
            **inputs: what the model takes: `input_ids` `[batch, tokens]`, `attention_mask`, ...

        Raises:
            ValueError: if the adapters of the batch do not fit into `max_bytes` together, or their number is not that
                of the rows; and see `load`.
        """
        with self._names(adapters, inputs), torch.inference_mode():
            return self.model(**inputs)

    def generate(self, adapters: Sequence[str | os.PathLike[str] | None], **inputs: Any) -> Any:
        """As calling the pool, for the model's `generate`."""
        generate: Any = self.model.generate
        with self._names(adapters, inputs), torch.inference_mode():
            return generate(**inputs)

    @contextmanager
    def _names(self, adapters: Sequence[str | os.PathLike[str] | None], inputs: dict[str, Any]) -> Iterator[None]:
        """Hold the model, with every row's adapter in memory and in effect."""
        keys = [None if adapter is None else str(adapter) for adapter in adapters]
        needed = dict.fromkeys(key for key in keys if key is not None)
        loaded = self.loaded
        folders = {key: _folder_of(key) for key in needed if key not in loaded}
        with self._lock:
            self._sweep()
            total = sum(self._load(key, folders.get(key)).num_bytes for key in needed)
            if needed.keys() - self._loaded.keys():  # loading one has dropped another
                raise ValueError(
                    f"The adapters of this batch have {total:,} bytes together; `max_bytes` is {self.max_bytes:,}. "
                    "Use smaller batches, or a larger bound."
                )
            if self._peft_model is None:
                yield
                return
            names = ["__base__" if key is None else self._loaded[key].name for key in keys]
            with self._tuner._enable_peft_forward_hooks(adapter_names=names, **inputs):
                yield


def _folder_of(adapter: str) -> Path:
    """An adapter's folder, in the Hub's cache if it comes from there."""
    folder = Path(adapter)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(adapter, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "recipe.yaml"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"There is no adapter {adapter!r}: no such folder, and none on the Hub.") from error


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module around the one of a path, and its name in it; of a wrapped head the base model's own."""
    *above, last = path.split(".")
    parent = model
    for part in above:
        parent = parent.get_submodule(part)  # the path is of a file, and names modules alone
        if isinstance(parent, ModulesToSaveWrapper):
            parent = parent.original_module
    child = getattr(parent, last, None)
    return (child, "original_module") if isinstance(child, ModulesToSaveWrapper) else (parent, last)


def _fit_heads(model: Any, shapes: dict[str, tuple[int, ...]], replaced: dict[str, nn.Linear]) -> int | None:
    """Let the base model's head have as many labels as an adapter's has, which PEFT makes by copying the base model's.

    Args:
        model: the base model.
        shapes: of the tensors of the adapter's heads, by their names in the base model.
        replaced: gets the base model's own layers that were replaced, by their paths, for `_put_back`.

    Returns:
        The number of labels; `None` if there is no linear layer for them.
    """
    num_labels = None
    for path, shape in _labels(model, shapes):
        parent, name = _place(model, path)
        layer, num_labels = getattr(parent, name), shape[0]
        if num_labels != layer.out_features:
            weight = layer.weight
            new = nn.Linear(shape[1], shape[0], layer.bias is not None, device=weight.device, dtype=weight.dtype)
            replaced[path] = layer
            setattr(parent, name, new.requires_grad_(weight.requires_grad))
    return num_labels


def _labels(model: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The linear layers of the base model's head that have an output for each label: path, and shape in the file."""
    for key, shape in shapes.items():
        path, _, kind = key.rpartition(".")
        try:
            parent, name = _place(model, path)
        except AttributeError:
            continue  # no such module: loading will say so
        layer = getattr(parent, name, None)
        if kind != "weight" or not isinstance(layer, nn.Linear) or layer.out_features != model.config.num_labels:
            continue
        if len(shape) == 2 and shape[1] == layer.in_features:  # of another shape: as above
            yield path, shape


def _least_bytes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> int:
    """The bytes that an adapter has in memory when an MLP is folded, by the shapes in its file; at least."""
    size = min((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)
    table = f"{LAYER_NAME}.{PREFIX}"
    tokens, columns = shapes.get(f"{table}embedding.weight", (0, 0))[:1], shapes.get(f"{table}output.bias")
    heads = sum(math.prod(shape) for key, shape in shapes.items() if not key.startswith(table))
    prefix = math.prod((*tokens, *columns)) if columns else math.prod(shapes.get(f"{table}embedding.weight", (0,)))
    return size * (prefix + heads)


def _put_back(model: nn.Module, replaced: dict[str, nn.Linear]) -> None:
    """Give the base model its own layers back, and forget them."""
    for path, layer in replaced.items():
        parent, name = _place(model, path)
        setattr(parent, name, layer)
    replaced.clear()
