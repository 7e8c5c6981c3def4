"""Many adapters on one frozen base model: loaded on first use, mixed in a batch, removed when memory is short."""

from __future__ import annotations

import math
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
from ..files.check import check_embeddings, check_size
from ..files.contents import SAVED_ROOT, SECOND
from ..model import PrefixTuningV2Model
from ..prefix.names import LAYER_NAME
from .saved import PREFIX_ROOT, AnyPath, open_adapter

# What is downloaded of an adapter. A second adapter is rejected, so its config suffices.
_FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "recipe.yaml", f"{SECOND}/{CONFIG_NAME}"]
# The way out for adapters of other methods.
_OTHERS = (
    "A pool is for prefixes. To have several such adapters on one model, use PEFT's `model.load_adapter`, and name "
    "the adapter of each row in `adapter_names`."
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the memory of a pool.

    Attributes:
        name: Its name in the model.
        num_bytes: The bytes of its prefix and task head in memory.
        num_labels: The number of outputs of its task head; `None` without one.
        task_type: PEFT's task type in its config.
        label_names: The names of the labels of its task head, in their order; `None` if its config has none.

    Example:
        ```python
        pool.load("user/topics").num_labels  # 7
        ```
    """

    name: str
    num_bytes: int
    num_labels: int | None
    task_type: str | None
    label_names: tuple[str, ...] | None = None


class AdapterPool:
    """Adapters of one frozen base model, for inference from any number of threads.

    The folder of an adapter, or its name on the Hub, identifies it. It is loaded by the first batch that names it.
    Each row of a batch has its own adapter, and one forward pass computes the whole batch. When the adapters in memory
    exceed `max_bytes`, the least recently used ones are removed. MLPs are folded.

    Adapters may differ in every setting and in the number of labels. In a batch with several numbers of labels, logits
    that a row's own head does not have are `-inf`.

    The model computes one batch at a time, and loads no adapter meanwhile. Downloads from the Hub run in parallel.

    Args:
        model: The base model with the task head of the adapters. It is wrapped in place; use it through the pool only.
        max_bytes: The bytes of all prefixes and heads in memory; no bound if `None` (default). The adapter that is
            being loaded may exceed it for a moment.
        max_virtual_tokens: The longest prefix that may be loaded (default 1024); no bound if `None`. Every virtual
            token costs time at each token that any row of the batch reads or writes.
        max_labels: The largest task head that may be loaded (default 10,000); no bound if `None`. The logits of all
            rows of a batch have as many columns as its largest head.

    Raises:
        ValueError: If a bound is not a positive integer.

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
        # The most recently used adapter is the last.
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._count = 0
        # The base model's own head layers by path, while resized ones replace them for loading.
        self._replaced_heads: dict[str, nn.Linear] = {}
        # Guards the model and all attributes above, for every batch and every change.
        self._lock = threading.RLock()

    # ---- Adapters

    @property
    def loaded(self) -> dict[str, LoadedAdapter]:
        """The adapters in memory by folder or Hub name, the least recently used one first."""
        with self._lock:
            return dict(self._loaded)

    @property
    def num_bytes(self) -> int:
        """The bytes of all adapters in memory."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._loaded.values())

    def load(self, adapter: AnyPath) -> LoadedAdapter:
        """Load an adapter before the first batch that names it.

        Args:
            adapter: The adapter's folder, or its name on the Hub.

        Raises:
            ValueError: If it is damaged or belongs to another method, does not fit the base model or the task of the
                other adapters, or exceeds `max_bytes`, `max_virtual_tokens` or `max_labels`; the pool is then
                unchanged.
            FileNotFoundError: If there is no such adapter.
            OSError: If the Hub cannot be reached.
        """
        key = str(adapter)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key]
        folder = _find_folder(key)  # without the lock: other batches need not wait
        with self._lock:
            return self._load(key, folder)

    def remove(self, adapter: AnyPath) -> None:
        """Remove an adapter from memory. The next batch that names it loads it again.

        Raises:
            KeyError: If it is not in memory.
        """
        with self._lock:
            del self._loaded[str(adapter)]
            self._clean_model()

    def _clean_model(self) -> None:
        """Remove adapters that are not in `_loaded` from the model, and restore the base model's heads.

        An error or an interruption while an adapter is loaded may leave the model in such a state.
        """
        layer: Any = getattr(self.model, LAYER_NAME, None)
        names = [adapter.name for adapter in self._loaded.values()]
        found = [] if layer is None else layer.adapter_names
        if set(found) == set(names) and not self._replaced_heads and (layer is not None) == bool(names):
            return
        _restore_heads(self.model, self._replaced_heads)
        for name in set(found) - set(names):
            layer.drop_adapter(name)
        if names:
            # A tuner of PEFT always has an active adapter.
            self._peft().set_adapter(names[0], inference_mode=True)
            return
        self._peft_model = None
        if hasattr(self.model, LAYER_NAME):
            layer.detach()

    def _load(self, key: str, folder: Path | None) -> LoadedAdapter:
        """Return an adapter from memory, or load it and remove the least recently used ones beyond `max_bytes`."""
        self._clean_model()
        if key not in self._loaded:
            try:
                found = self._loaded[key] = self._insert(folder or _find_folder(key))
                self._check_bound(key, "bytes", found.num_bytes, "max_bytes")
            except BaseException:
                self._loaded.pop(key, None)
                self._clean_model()
                raise
            for other in [each for each in self._loaded if each != key]:
                if self.max_bytes is None or self.num_bytes <= self.max_bytes:
                    break
                self.remove(other)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _insert(self, folder: Path) -> LoadedAdapter:
        """Check an adapter's files, and put the adapter into the model."""
        saved = open_adapter(folder, PrefixTuningV2Config, instead=_OTHERS)
        config, task = saved.config, saved.task_type
        others = {adapter.task_type for adapter in self._loaded.values()}
        if others - {task}:
            raise ValueError(
                f"{folder} is an adapter for {task}, and the adapters in the pool are for {others.pop()}: a model has "
                "one kind of head. Use a pool for each."
            )
        self._check_bound(folder, "virtual tokens", config.num_virtual_tokens, "max_virtual_tokens")
        shapes = {key: shape for key, (shape, _) in saved.read_header().items()}
        check_size(self.model, shapes.values())
        self._check_bound(folder, "bytes", _min_bytes(self.model, shapes), "max_bytes")
        head_shapes = {
            key.removeprefix(SAVED_ROOT): shape for key, shape in shapes.items() if not key.startswith(PREFIX_ROOT)
        }
        labels = [shape[0] for _, shape in _label_layers(self.model, head_shapes)]
        self._check_bound(folder, "labels", max(labels, default=0), "max_labels")
        check_embeddings(saved.weights_path, self.model, config.modules_to_save or (), "all adapters of the pool")
        name = f"adapter{self._count}"
        self._count += 1
        device = next((str(parameter.device) for parameter in self.model.parameters()), "cpu")
        num_labels = _resize_heads(self.model, head_shapes, self._replaced_heads)
        try:
            if self._peft_model is None:
                self._peft_model = PeftModel.from_pretrained(self.model, str(folder), name, torch_device=device)
                self._tuner.prefix_layer.keep_base_labels()
            else:
                self._peft_model.load_adapter(str(folder), name, torch_device=device)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        _restore_heads(self.model, self._replaced_heads)
        if config.prefix_projection:
            self._tuner.fold_adapter(name)
        self._peft_model.eval()
        sizes = [p.numel() * p.element_size() for key, p in self.model.named_parameters() if f".{name}." in key]
        names = None if config.label_names is None else tuple(config.label_names)
        return LoadedAdapter(name, sum(sizes), num_labels, task, names)

    def _check_bound(self, adapter: AnyPath, unit: str, number: int, bound: str) -> None:
        limit = getattr(self, bound)
        if limit is not None and number > limit:
            raise ValueError(f"{adapter} has {number:,} {unit}; `{bound}` of the pool is {limit:,}.")

    def _peft(self) -> PeftModel:
        assert self._peft_model is not None
        return self._peft_model

    @property
    def _tuner(self) -> PrefixTuningV2Model:
        tuner: Any = self._peft().base_model
        return tuner

    # ---- Batches

    def __call__(self, adapters: Sequence[AnyPath | None], **inputs: Any) -> Any:
        """Run the model on a batch in which each row has its own adapter.

        Args:
            adapters: For each row an adapter's folder or name on the Hub, or `None` for the base model.
            **inputs: The model's arguments: `input_ids` `[batch, tokens]`, `attention_mask`, ...

        Returns:
            The model's output.

        Raises:
            ValueError: If the adapters of the batch exceed `max_bytes` together, their number is not the number of
                rows, or one of them cannot be loaded (see `load`).
        """
        with self._use_adapters(adapters, inputs), torch.inference_mode():
            return self.model(**inputs)

    def generate(self, adapters: Sequence[AnyPath | None], **inputs: Any) -> Any:
        """Run the model's `generate` on a batch in which each row has its own adapter.

        Args:
            adapters: As for calling the pool.
            **inputs: The arguments of `generate`.

        Returns:
            The output of `generate`.

        Raises:
            ValueError: As for calling the pool.
        """
        generate: Any = self.model.generate
        with self._use_adapters(adapters, inputs), torch.inference_mode():
            return generate(**inputs)

    @contextmanager
    def _use_adapters(self, adapters: Sequence[AnyPath | None], inputs: dict[str, Any]) -> Iterator[None]:
        """Lock the model, and load and activate the adapter of each row."""
        keys = [None if adapter is None else str(adapter) for adapter in adapters]
        needed = dict.fromkeys(key for key in keys if key is not None)
        loaded = self.loaded
        folders = {key: _find_folder(key) for key in needed if key not in loaded}
        with self._lock:
            self._clean_model()
            total = sum(self._load(key, folders.get(key)).num_bytes for key in needed)
            if needed.keys() - self._loaded.keys():  # loading one has removed another
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


def _find_folder(adapter: str) -> Path:
    """Return an adapter's folder. An adapter from the Hub is downloaded into its cache."""
    folder = Path(adapter)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(adapter, allow_patterns=_FILES))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"There is no adapter {adapter!r}: no such folder, and none on the Hub.") from error


def _find_layer(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the parent of the module at `path`, and its attribute there; for a wrapped head the base model's own."""
    *above, last = path.split(".")
    parent = model
    for part in above:
        parent = parent.get_submodule(part)  # not getattr: the path comes from an untrusted file
        if isinstance(parent, ModulesToSaveWrapper):
            parent = parent.original_module
    child = getattr(parent, last, None)
    return (child, "original_module") if isinstance(child, ModulesToSaveWrapper) else (parent, last)


def _label_layers(model: Any, shapes: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Yield the path, and the shape in the file, of each linear layer of the head with one output per label.

    Tensors that do not fit the model are skipped here. Loading the adapter rejects them.
    """
    for key, shape in shapes.items():
        path, _, kind = key.rpartition(".")
        try:
            parent, name = _find_layer(model, path)
        except AttributeError:
            continue
        layer = getattr(parent, name, None)
        if kind != "weight" or not isinstance(layer, nn.Linear) or layer.out_features != model.config.num_labels:
            continue
        if len(shape) == 2 and shape[1] == layer.in_features:
            yield path, shape


def _resize_heads(model: Any, shapes: dict[str, Shape], replaced: dict[str, nn.Linear]) -> int | None:
    """Give the base model's head as many labels as the adapter's, because PEFT copies the base model's head.

    Args:
        model: The base model.
        shapes: The shapes of the tensors of the adapter's heads, by their names in the base model.
        replaced: Receives the layers of the base model that were replaced by path, for `_restore_heads`.

    Returns:
        The number of labels; `None` if no linear layer has an output per label.
    """
    num_labels = None
    for path, shape in _label_layers(model, shapes):
        parent, name = _find_layer(model, path)
        layer, num_labels = getattr(parent, name), shape[0]
        if num_labels != layer.out_features:
            weight = layer.weight
            new = nn.Linear(shape[1], shape[0], layer.bias is not None, device=weight.device, dtype=weight.dtype)
            replaced[path] = layer
            setattr(parent, name, new.requires_grad_(weight.requires_grad))
    return num_labels


def _restore_heads(model: nn.Module, replaced: dict[str, nn.Linear]) -> None:
    """Undo `_resize_heads`, and empty `replaced`."""
    for path, layer in replaced.items():
        parent, name = _find_layer(model, path)
        setattr(parent, name, layer)
    replaced.clear()


def _min_bytes(model: nn.Module, shapes: dict[str, Shape]) -> int:
    """Return a lower bound for the bytes of an adapter in memory, where MLPs are folded."""
    item_bytes = min((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)
    embedding, bias = shapes.get(f"{PREFIX_ROOT}embedding.weight", (0,)), shapes.get(f"{PREFIX_ROOT}output.bias")
    table = math.prod(embedding if bias is None else (*embedding[:1], *bias))
    encoder = tuple(f"{PREFIX_ROOT}{name}." for name in ("embedding", "hidden", "output"))
    others = sum(math.prod(shape) for key, shape in shapes.items() if not key.startswith(encoder))
    return item_bytes * (table + others)
